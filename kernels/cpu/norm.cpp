// RMS norm of rows, with the residual's addition where asked for.

#include <cmath>
#include <vector>

#include "dtype.h"
#include "elementwise.h"
#include "pool.h"

namespace baton {
namespace {

constexpr int64_t kElementsPerPiece = 1 << 15;
constexpr int kLanes = 16;  // partial sums per row, whatever the instruction set's width
constexpr int kVectors = kLanes / kWidth;

template <class D>
void norm_row(const typename D::T* x, typename D::T* residual, const typename D::T* weight, int64_t dim, float eps,
              typename D::T* out, float* scratch) {
  vf partial[kVectors] = {};
  int which = 0;
  for_each_vector(dim, [&](int64_t i, auto n) {
    vf v = load_up_to<D>(x + i, n);
    if (residual != nullptr) {
      v = D::round(v + load_up_to<D>(residual + i, n));
      store_up_to<D>(residual + i, v, n);
    }
    store(scratch + i, v);
    partial[which] = fma(v, v, partial[which]);
    which = which + 1 == kVectors ? 0 : which + 1;
  });
  for (int width = kVectors / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) partial[i] += partial[i + width];
  const vf factor = splat(1.0f / std::sqrt(sum_lanes(partial[0]) / (float)dim + eps));
  for_each_vector(dim, [&](int64_t i, auto n) {
    store_up_to<D>(out + i, D::round(load(scratch + i) * factor) * load_up_to<D>(weight + i, n), n);
  });
}

}  // namespace

void rms_norm(int64_t dtype, int64_t rows, int64_t heads, int64_t dim, BatonRows x, const void* weight, float eps,
              BatonRows residual, BatonRows out) {
  with_dtype(dtype, [&](auto tag) {
    typedef decltype(tag) D;
    typedef typename D::T T;
    const int64_t row_elements = heads * dim > 0 ? heads * dim : 1;
    parallel_rows(rows, kElementsPerPiece / row_elements, [&](int64_t begin, int64_t end) {
      thread_local std::vector<float> scratch;
      if ((int64_t)scratch.size() < dim + kWidth) scratch.resize((size_t)(dim + kWidth));
      for (int64_t row = begin; row < end; ++row)
        for (int64_t head = 0; head < heads; ++head)
          norm_row<D>((const T*)x.data + row * x.row_stride + head * x.head_stride,
                      residual.data == nullptr ? nullptr : (T*)residual.data + row * residual.row_stride,
                      (const T*)weight, dim, eps, (T*)out.data + row * out.row_stride + head * out.head_stride,
                      scratch.data());
    });
  });
}

}  // namespace baton

BATON_EXPORT int64_t baton_rms_norm(int64_t dtype, int64_t rows, int64_t heads, int64_t dim, BatonRows x,
                                    const void* weight, float eps, BatonRows residual, BatonRows out) {
  return baton::guarded([&]() -> int64_t {
    baton::rms_norm(dtype, rows, heads, dim, x, weight, eps, residual, out);
    return 0;
  });
}
