// Rotary embedding of q in place, and of k on its way into the pages; v is copied beside it.

#include "dtype.h"
#include "elementwise.h"
#include "pool.h"

namespace baton {
namespace {

constexpr int64_t kElementsPerPiece = 1 << 15;

// to may be from. Every product and sum is rounded to the dtype, as eager torch does.
template <class D>
void rotate(const typename D::T* from, typename D::T* to, const float* cos, const float* sin, int64_t half,
            int64_t dim) {
  for_each_vector(half, [&](int64_t i, auto n) {
    const vf c = D::round(load_up_to<Float32>(cos + i, n)), s = D::round(load_up_to<Float32>(sin + i, n));
    const vf first = load_up_to<D>(from + i, n), second = load_up_to<D>(from + half + i, n);
    store_up_to<D>(to + i, D::round(first * c) - D::round(second * s), n);
    store_up_to<D>(to + half + i, D::round(second * c) + D::round(first * s), n);
  });
  if (to != from)
    std::memcpy(to + 2 * half, from + 2 * half, (size_t)(dim - 2 * half) * sizeof(typename D::T));
}

inline int64_t slot_at(const void* slots, int64_t slot_bytes, int64_t row) {
  return slot_bytes == 4 ? ((const int32_t*)slots)[row] : ((const int64_t*)slots)[row];
}

}  // namespace

int64_t rope_and_cache(int64_t dtype, int64_t rows, int64_t q_heads, BatonRows q, BatonRows k, BatonRows v,
                       const RotaryTables& tables, const int32_t* positions, BatonPages pages, const void* slots,
                       int64_t slot_bytes) {
  for (int64_t row = 0; row < rows; ++row) {
    if (positions[row] < 0 || positions[row] >= tables.num_positions)
      return fail("positions[%lld] is %d, not in [0, %lld)", (long long)row, positions[row],
                  (long long)tables.num_positions);
    const int64_t slot = slot_at(slots, slot_bytes, row);
    if (slot >= pages.num_blocks * pages.block_size)
      return fail("slots[%lld] is %lld, the cache has %lld", (long long)row, (long long)slot,
                  (long long)(pages.num_blocks * pages.block_size));
  }
  const int64_t dim = pages.head_dim, kv_heads = pages.num_heads;
  with_dtype(dtype, [&](auto tag) {
    typedef decltype(tag) D;
    typedef typename D::T T;
    parallel_rows(rows, kElementsPerPiece / ((q_heads + 2 * kv_heads) * dim), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const float* c = tables.cos + positions[row] * tables.half;
        const float* s = tables.sin + positions[row] * tables.half;
        for (int64_t head = 0; head < q_heads; ++head) {
          T* x = (T*)q.data + row * q.row_stride + head * q.head_stride;
          rotate<D>(x, x, c, s, tables.half, dim);
        }
        const int64_t slot = slot_at(slots, slot_bytes, row);
        if (slot < 0) continue;
        T* place = (T*)pages.data + slot / pages.block_size * pages.block_stride +
                   slot % pages.block_size * pages.token_stride;
        for (int64_t head = 0; head < kv_heads; ++head) {
          T* key = place + head * pages.head_stride;
          rotate<D>((const T*)k.data + row * k.row_stride + head * k.head_stride, key, c, s, tables.half, dim);
          std::memcpy(key + pages.pair_stride, (const T*)v.data + row * v.row_stride + head * v.head_stride,
                      (size_t)dim * sizeof(T));
        }
      }
    });
  });
  return 0;
}

}  // namespace baton

BATON_EXPORT int64_t baton_rope_and_cache(int64_t dtype, int64_t rows, int64_t q_heads, BatonRows q, BatonRows k,
                                          BatonRows v, const float* cos, const float* sin, int64_t num_positions,
                                          int64_t half, const int32_t* positions, BatonPages pages, const void* slots,
                                          int64_t slot_bytes) {
  return baton::guarded([&]() -> int64_t {
    const baton::RotaryTables tables{cos, sin, num_positions, half};
    return baton::rope_and_cache(dtype, rows, q_heads, q, k, v, tables, positions, pages, slots, slot_bytes);
  });
}
