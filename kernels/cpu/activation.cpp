// silu(gate) * up.

#include "dtype.h"
#include "elementwise.h"
#include "pool.h"

namespace baton {
namespace {

constexpr int64_t kElementsPerPiece = 1 << 15;

}  // namespace

void silu_mul(int64_t dtype, int64_t rows, int64_t dim, const void* gate_up, int64_t in_stride, void* out,
              int64_t out_stride) {
  with_dtype(dtype, [&](auto tag) {
    typedef decltype(tag) D;
    typedef typename D::T T;
    parallel_rows(rows, kElementsPerPiece / (dim > 0 ? dim : 1), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const T* gate = (const T*)gate_up + row * in_stride;
        const T* up = gate + dim;
        T* to = (T*)out + row * out_stride;
        for_each_vector(dim, [&](int64_t i, auto n) {
          const vf g = load_up_to<D>(gate + i, n);
          const vf silu = D::round(g / (exp2_lanes(g * splat(-kLog2e)) + splat(1.0f)));
          store_up_to<D>(to + i, silu * load_up_to<D>(up + i, n), n);
        });
      }
    });
  });
}

}  // namespace baton

BATON_EXPORT int64_t baton_silu_mul(int64_t dtype, int64_t rows, int64_t dim, const void* gate_up, int64_t in_stride,
                                    void* out, int64_t out_stride) {
  return baton::guarded([&]() -> int64_t {
    baton::silu_mul(dtype, rows, dim, gate_up, in_stride, out, out_stride);
    return 0;
  });
}
