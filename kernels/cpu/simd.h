// Vectors of floats at the width of the instruction set, and exp2, the same code for every lane.
//
// Everything is static or in an unnamed namespace: the three libraries may live in one process.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace baton {
namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

typedef float vf __attribute__((vector_size(kWidth * 4)));
typedef int32_t vi __attribute__((vector_size(kWidth * 4)));
typedef uint32_t vu __attribute__((vector_size(kWidth * 4)));
typedef uint16_t vh __attribute__((vector_size(kWidth * 2)));

inline vf splat(float x) {
  return x - vf{};  // exact for every x, so it compiles to a broadcast
}
inline vf load(const float* p) {
  vf v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }

// Fused where the hardware fuses; the generic build rounds twice. Never left to the compiler's choice.
inline vf fma(vf a, vf b, vf c) {
#if defined(__AVX512F__)
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

inline vf max(vf a, vf b) { return a > b ? a : b; }

// Fixed trees, so the order of the sum depends on nothing.
inline float sum_lanes(vf v) {
  float lane[kWidth];
  store(lane, v);
  for (int width = kWidth / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
  return lane[0];
}
inline float max_lanes(vf v) {
  float lane[kWidth];
  store(lane, v);
  for (int width = kWidth / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lane[i] = lane[i] > lane[i + width] ? lane[i] : lane[i + width];
  return lane[0];
}

// 2^x, relative error about 1e-7; 0 below -126 (so for -inf), 2^127 above 127, NaN for NaN.
inline vf exp2_lanes(vf x) {
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  vf clamped = x < splat(-126.0f) ? splat(-126.0f) : x;
  clamped = clamped > splat(127.0f) ? splat(127.0f) : clamped;
  const vf shifted = clamped + magic;
  const vi exponent = (vi)shifted - (vi)magic;
  const vf f = clamped - (shifted - magic);
  vf p = splat(0.00015461444724808513f);
  p = fma(p, f, splat(0.0013400428177711937f));
  p = fma(p, f, splat(0.00961805667843204f));
  p = fma(p, f, splat(0.05550327226669895f));
  p = fma(p, f, splat(0.24022650922289554f));
  p = fma(p, f, splat(0.6931472067028329f));
  p = fma(p, f, splat(1.0f));
  const vf scaled = (vf)((vi)p + (exponent << 23));
  const vf result = x < splat(-126.0f) ? vf{} : scaled;
  return x != x ? x : result;
}

constexpr float kLog2e = 1.4426950408889634f;

}  // namespace
}  // namespace baton
