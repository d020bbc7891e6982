// fp32, bf16 and fp16 in memory, fp32 in registers. Stores round to nearest, ties to even.
#pragma once

#include <type_traits>

#include "simd.h"

namespace baton {
namespace {

enum DtypeCode : int64_t { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };

struct Float32 {
  typedef float T;
  static vf load(const T* p) { return baton::load(p); }
  static void store(T* p, vf v) { baton::store(p, v); }
  static vf round(vf v) { return v; }
};

struct Bfloat16 {
  typedef uint16_t T;
#if defined(__AVX512F__)
  static vf load(const T* p) {
    return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
  }
#elif defined(__AVX2__)
  static vf load(const T* p) {
    return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
  }
#else
  static vf load(const T* p) {
    vh h;
    std::memcpy(&h, p, sizeof h);
    return (vf)(__builtin_convertvector(h, vu) << 16);
  }
#endif
#if defined(__AVX512BF16__)
  // The processor's own rounding: to nearest even as below, but numbers below 2^-126 become zeros.
  static __m256i narrow(vf v) { return (__m256i)_mm512_cvtneps_pbh((__m512)v); }
  static void store(T* p, vf v) { _mm256_storeu_si256((__m256i*)p, narrow(v)); }
  static vf round(vf v) { return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow(v)), 16); }
#else
  static vu rounded_bits(vf v) {
    const vu bits = (vu)v;
    const vu even = bits + 0x7fffu + ((bits >> 16) & 1u);
    return v != v ? vu{} + 0x7fc00000u : even;
  }
  static void store(T* p, vf v) {
    const vh h = __builtin_convertvector(rounded_bits(v) >> 16, vh);
    std::memcpy(p, &h, sizeof h);
  }
  static vf round(vf v) { return (vf)(rounded_bits(v) & 0xffff0000u); }
#endif
};

struct Float16 {
  typedef uint16_t T;
#if defined(__AVX512F__)
  static vf load(const T* p) { return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
  static void store(T* p, vf v) {
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
  }
#elif defined(__F16C__)
  static vf load(const T* p) { return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
  static void store(T* p, vf v) {
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
  }
#else
  static float widen(uint16_t h) {
    const uint32_t sign = (uint32_t)(h & 0x8000) << 16, magnitude = h & 0x7fff;
    uint32_t bits;
    if (magnitude >= 0x7c00) {
      bits = (magnitude << 13) + (112u << 23) + (112u << 23);
    } else if (magnitude >= 0x0400) {
      bits = (magnitude << 13) + (112u << 23);
    } else {
      const float tiny = (float)magnitude * 0x1p-24f;
      std::memcpy(&bits, &tiny, 4);
    }
    bits |= sign;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
  }
  static uint16_t narrow(float f) {
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    const uint16_t sign = (uint16_t)((bits >> 16) & 0x8000);
    bits &= 0x7fffffffu;
    if (bits > 0x7f800000u) return sign | 0x7e00;
    if (bits >= 0x477ff000u) return sign | 0x7c00;
    if (bits < 0x38800000u) {  // subnormal in fp16: adding 0.5 leaves the rounded fraction in the low bits
      float magnitude;
      std::memcpy(&magnitude, &bits, 4);
      magnitude += 0.5f;
      std::memcpy(&bits, &magnitude, 4);
      return sign | (uint16_t)(bits - 0x3f000000u);
    }
    bits += 0xfffu + ((bits >> 13) & 1u);
    return sign | (uint16_t)((bits - (112u << 23)) >> 13);
  }
  static vf load(const T* p) {
    vf v;
    for (int i = 0; i < kWidth; ++i) v[i] = widen(p[i]);
    return v;
  }
  static void store(T* p, vf v) {
    for (int i = 0; i < kWidth; ++i) p[i] = narrow(v[i]);
  }
#endif
  static vf round(vf v) {
    T half[kWidth];
    store(half, v);
    return load(half);
  }
};

// The first n < kWidth elements, zeros after them; the same conversion as whole vectors.
template <class D>
inline vf load_some(const typename D::T* p, int64_t n) {
  typename D::T buffer[kWidth] = {};
  std::memcpy(buffer, p, (size_t)n * sizeof(typename D::T));
  return D::load(buffer);
}
template <class D>
inline void store_some(typename D::T* p, vf v, int64_t n) {
  typename D::T buffer[kWidth];
  D::store(buffer, v);
  std::memcpy(p, buffer, (size_t)n * sizeof(typename D::T));
}

template <class F>
inline void for_each_vector(int64_t n, F f) {  // f(offset, count); count is the constant kWidth but for the last
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) f(i, std::integral_constant<int64_t, kWidth>());
  if (i < n) f(i, n - i);
}
template <class D>
inline vf load_up_to(const typename D::T* p, int64_t n) {
  return n == kWidth ? D::load(p) : load_some<D>(p, n);
}
template <class D>
inline void store_up_to(typename D::T* p, vf v, int64_t n) {
  if (n == kWidth)
    D::store(p, v);
  else
    store_some<D>(p, v, n);
}

// Calls f with the dtype's tag.
template <class F>
inline void with_dtype(int64_t code, F f) {
  if (code == kFloat32)
    f(Float32{});
  else if (code == kBfloat16)
    f(Bfloat16{});
  else
    f(Float16{});
}

}  // namespace
}  // namespace baton
