// Log-sum-exp of rows of logits.

#include <cmath>
#include <limits>

#include "dtype.h"
#include "interface.h"
#include "pool.h"

namespace baton {
namespace {

constexpr int64_t kElementsPerPiece = 1 << 15;
constexpr int64_t kSpan = 1024;  // summed in fp32 lanes, then added up in fp64

float row_lse(const float* x, int64_t n) {
  vf lanes = splat(-std::numeric_limits<float>::infinity());
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) lanes = max(load(x + i), lanes);
  float top = max_lanes(lanes);
  for (; i < n; ++i) top = x[i] > top ? x[i] : top;
  if (std::isinf(top)) return top;
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += kSpan) {
    const int64_t end = begin + kSpan < n ? begin + kSpan : n;
    vf sum = {};
    for (i = begin; i + kWidth <= end; i += kWidth)
      sum += exp2_lanes((load(x + i) - splat(top)) * splat(kLog2e));
    if (i < end) {
      float rest[kWidth];
      store(rest, splat(-std::numeric_limits<float>::infinity()));
      std::memcpy(rest, x + i, (size_t)(end - i) * sizeof(float));
      sum += exp2_lanes((load(rest) - splat(top)) * splat(kLog2e));
    }
    total += sum_lanes(sum);
  }
  return (float)((double)top + std::log(total));
}

}  // namespace
}  // namespace baton

BATON_EXPORT int64_t baton_logits_lse(int64_t rows, int64_t vocab, const float* logits, int64_t stride, float* out) {
  using namespace baton;
  return guarded([&]() -> int64_t {
    parallel_rows(rows, kElementsPerPiece / (vocab > 0 ? vocab : 1), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) out[row] = row_lse(logits + row * stride, vocab);
    });
    return 0;
  });
}
