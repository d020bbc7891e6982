// One tile of keys and values out of the pages, converted to fp32: keys transposed, lanes are keys.
#pragma once

#include "dtype.h"

namespace baton {
namespace {

constexpr int kTile = 32;  // keys per tile; tiles start at multiples of it, counted from position 0

// An 8x8 transposition of 32-bit words.
#if defined(__AVX2__)
inline void transpose8(__m256i r[8]) {
  __m256i t[8], u[8];
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm256_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 2; ++i) {
    u[4 * i + 0] = _mm256_unpacklo_epi64(t[4 * i + 0], t[4 * i + 2]);
    u[4 * i + 1] = _mm256_unpackhi_epi64(t[4 * i + 0], t[4 * i + 2]);
    u[4 * i + 2] = _mm256_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    u[4 * i + 3] = _mm256_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm256_permute2x128_si256(u[i], u[i + 4], 0x20);
    r[i + 4] = _mm256_permute2x128_si256(u[i], u[i + 4], 0x31);
  }
}
#endif

// Columns of 8 keys: to[d * kTile + key] for d < dim. Returns how many d it has done; the caller does the rest.
template <class D>
inline int64_t transpose_keys(const typename D::T* const* rows, int64_t dim, float* to) {
  int64_t d = 0;
#if defined(__AVX2__)
  __m256i r[8];
  if constexpr (std::is_same<D, Bfloat16>::value) {
    for (; d + 16 <= dim; d += 16) {  // pairs of bf16 travel as words and part at the end
      for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_si256((const __m256i*)(rows[i] + d));
      transpose8(r);
      for (int i = 0; i < 8; ++i) {
        float* even = to + (d + 2 * i) * kTile;
        _mm256_storeu_si256((__m256i*)even, _mm256_slli_epi32(r[i], 16));
        _mm256_storeu_si256((__m256i*)(even + kTile), _mm256_and_si256(r[i], _mm256_set1_epi32((int)0xffff0000)));
      }
    }
  } else {
    for (; d + 8 <= dim; d += 8) {
      for (int i = 0; i < 8; ++i) {
        if constexpr (std::is_same<D, Float16>::value)
          r[i] = _mm256_castps_si256(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(rows[i] + d))));
        else
          r[i] = _mm256_loadu_si256((const __m256i*)(rows[i] + d));
      }
      transpose8(r);
      for (int i = 0; i < 8; ++i) _mm256_storeu_si256((__m256i*)(to + (d + i) * kTile), r[i]);
    }
  }
#else
  (void)rows, (void)dim, (void)to;
#endif
  return d;
}

// keys [dim][kTile] from kTile row pointers (all valid to read).
template <class D>
void load_keys(const typename D::T* const* rows, int64_t dim, float* keys) {
  for (int key = 0; key < kTile; key += 8) {
    const int64_t done = transpose_keys<D>(rows + key, dim, keys + key);
    for (int i = key; i < key + 8; ++i)
      for_each_vector(dim - done, [&](int64_t d, auto n) {
        float lane[kWidth];
        store(lane, load_up_to<D>(rows[i] + done + d, n));
        for (int64_t j = 0; j < n; ++j) keys[(done + d + j) * kTile + i] = lane[j];
      });
  }
}

// values [kTile][padded_dim], rows first..last only, each `pair_stride` after its key; columns past dim are zero.
template <class D>
void load_values(const typename D::T* const* key_rows, int64_t pair_stride, int first, int last, int64_t dim,
                 int64_t padded_dim, float* values) {
  for (int i = first; i < last; ++i) {
    const typename D::T* row = key_rows[i] + pair_stride;
    float* to = values + i * padded_dim;
    for_each_vector(dim, [&](int64_t d, auto n) { store(to + d, load_up_to<D>(row + d, n)); });
  }
}

}  // namespace
}  // namespace baton
