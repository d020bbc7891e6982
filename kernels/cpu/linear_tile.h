// Tiles of a matrix product: up to kRows rows of x by one panel of weights, all of K in one go.
//
// A panel holds kColumns outputs and is contiguous. K runs in pairs, padded with zeros; dense weights:
//   bf16   [pair][column][2]    the two of a pair side by side, as vdpbf16ps wants them
//   others [k][column]
// Every output is one chain of fp32 sums over ascending k, in a lane of its own, however many rows come along: so its
// bits depend on its row and its column alone. Where weights have scales, there is one such chain per group, and the
// groups' sums times their scales make the outer chain.
//
// An arithmetic is a struct of: X, the type of x; kStepPairs and kStepBytes, what one step takes of K and of the panel;
// `step`, which adds a step's products to the sums; `store`, which rounds a vector of sums.
#pragma once

#include "dtype.h"

namespace baton {
namespace {

#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
constexpr bool kHasDot = true;
#else
constexpr bool kHasDot = false;
#endif

constexpr int kVectors = 2;  // per panel: with kRows rows they fill the registers
constexpr int kColumns = kVectors * kWidth;
#if defined(__AVX512F__)
constexpr int kRows = 12;
#else
constexpr int kRows = 6;
#endif
constexpr int kLineBytes = 64;
constexpr int kUnrollPairs = 4;

// Arithmetic on fp32 copies of the weights; x is fp32.
template <class D>
struct Multiply {
  typedef float X;
  static constexpr int kStepPairs = 1;
  static constexpr int64_t kStepBytes = 2 * kColumns * (int64_t)sizeof(typename D::T);

  template <class To>
  static void store(typename To::T* y, vf sum) {
    To::store(y, sum);
  }

  template <int R>
  static void step(const char* w, const float* x, int64_t ldx, vf (&sums)[R][kVectors]) {
    for (int odd = 0; odd < 2; ++odd) {
      vf b[kVectors];
      for (int v = 0; v < kVectors; ++v) {
        if constexpr (std::is_same<D, Bfloat16>::value) {
          vu both;
          std::memcpy(&both, w + v * sizeof both, sizeof both);
          b[v] = (vf)(odd ? both & 0xffff0000u : both << 16);
        } else {
          b[v] = D::load((const typename D::T*)w + odd * kColumns + v * kWidth);
        }
      }
      for (int r = 0; r < R; ++r) {
        const vf a = splat(x[r * ldx + odd]);
        for (int v = 0; v < kVectors; ++v) sums[r][v] = fma(a, b[v], sums[r][v]);
      }
    }
  }
};

#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
// Products of pairs of bf16, which `Weights` gives by steps; x is bf16.
template <class Weights>
struct Dot {
  typedef uint16_t X;
  static constexpr int kStepPairs = Weights::kStepPairs;
  static constexpr int64_t kStepBytes = kVectors * kLineBytes;

  template <class To>
  static void store(uint16_t* y, vf sum) {
    const __m256bh rounded = _mm512_cvtneps_pbh((__m512)sum);
    std::memcpy(y, &rounded, sizeof rounded);
  }

  template <int R>
  static void step(const char* w, const uint16_t* x, int64_t ldx, vf (&sums)[R][kVectors]) {
    __m512i b[kVectors][kStepPairs];
    for (int v = 0; v < kVectors; ++v) Weights::load(w + v * kLineBytes, b[v]);
    for (int pair = 0; pair < kStepPairs; ++pair)
      for (int r = 0; r < R; ++r) {
        int32_t both;
        std::memcpy(&both, x + r * ldx + 2 * pair, sizeof both);
        const __m512i a = _mm512_set1_epi32(both);
        for (int v = 0; v < kVectors; ++v)
          sums[r][v] = (vf)_mm512_dpbf16_ps((__m512)sums[r][v], (__m512bh)a, (__m512bh)b[v][pair]);
      }
  }
};

struct DenseWeights {
  static constexpr int kStepPairs = 1;
  static void load(const char* w, __m512i (&b)[kStepPairs]) { b[0] = _mm512_loadu_si512(w); }
};
#endif

// What is fetched from memory while a tile is computed.
struct Ahead {
  const char* next;  // where the panel after this one goes on, or null
  int64_t lines;     // of `next` per kUnrollPairs pairs
  int64_t distance;  // bytes ahead in this panel, for its first tile; 0 where it is in the cache already
};

// Adds `steps` steps of rows x to sums.
template <class A, int R>
inline void accumulate(const char* w, const typename A::X* x, int64_t ldx, int64_t steps, Ahead& ahead,
                       vf (&sums)[R][kVectors]) {
  constexpr int kUnroll = kUnrollPairs / A::kStepPairs;
  constexpr int64_t kStepX = 2 * A::kStepPairs;
  int64_t i = 0;
  if (ahead.distance != 0) {
    for (; i + kUnroll <= steps; i += kUnroll) {
#pragma GCC unroll 4
      for (int j = 0; j < kUnroll; ++j) {
        const char* at = w + (i + j) * A::kStepBytes;
        for (int64_t line = 0; line < A::kStepBytes; line += kLineBytes)
          __builtin_prefetch(at + ahead.distance + line, 0, 3);
        A::step(at, x + (i + j) * kStepX, ldx, sums);
      }
    }
  } else {
    const char* next = ahead.next;
    for (; i + kUnroll <= steps; i += kUnroll) {
      for (int64_t line = 0; line < ahead.lines; ++line, next += kLineBytes) __builtin_prefetch(next, 0, 2);
#pragma GCC unroll 4
      for (int j = 0; j < kUnroll; ++j) A::step(w + (i + j) * A::kStepBytes, x + (i + j) * kStepX, ldx, sums);
    }
    ahead.next = next;
  }
  for (; i < steps; ++i) A::step(w + i * A::kStepBytes, x + i * kStepX, ldx, sums);
}

}  // namespace
}  // namespace baton
