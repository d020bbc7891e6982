// Counter-based Gumbel noise of whole rows, see noise.h.

#include "interface.h"
#include "noise.h"
#include "pool.h"

namespace baton {
namespace {

constexpr int64_t kElementsPerPiece = 1 << 13;

void noise_row(uint64_t seed, uint64_t position, int64_t vocab, float* out) {
  const uint64_t key = noise_key(seed, position);
  for (int64_t token = 0; token < vocab; ++token) out[token] = noise_of_bits(noise_bits(key, token));
}

}  // namespace
}  // namespace baton

BATON_EXPORT int64_t baton_gumbel_noise(int64_t rows, int64_t vocab, const int64_t* seeds, const int64_t* positions,
                                        float* out) {
  using namespace baton;
  return guarded([&]() -> int64_t {
    parallel_rows(rows, kElementsPerPiece / vocab, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row)
        noise_row((uint64_t)seeds[row], (uint64_t)positions[row], vocab, out + row * vocab);
    });
    return 0;
  });
}
