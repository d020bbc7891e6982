// How weights lie in a panel, and how integer ones become numbers again.
//
// Integers are exact in bf16, so scales can wait until a group is summed: expanding is a look-up. Layouts of a panel:
//   dense      see linear_tile.h
//   with Dot   64 bytes are 16 columns by 4 k (int8: a sign and a magnitude) or by 8 k (int4: two's complement)
//   otherwise  int8 [k][column]; int4 [k / 2][column], the even k in the low bits
#pragma once

#include <algorithm>

#include "linear_tile.h"
#include "tile.h"

namespace baton {
namespace {

constexpr int64_t kIntegerStep = 8;  // K of integer weights is padded to a multiple of this, groups are multiples of it

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
constexpr uint16_t bf16_of_integer(int value) {
  const uint32_t sign = value < 0 ? 0x8000u : 0u;
  const uint32_t magnitude = (uint32_t)(value < 0 ? -value : value);
  if (magnitude == 0) return 0;
  uint32_t exponent = 0;
  while (magnitude >> (exponent + 1)) ++exponent;
  return (uint16_t)(sign | (127 + exponent) << 7 | ((magnitude << (7 - exponent)) & 0x7f));
}

struct Int8Table {
  alignas(kLineBytes) uint8_t low[128], high[128];
  constexpr Int8Table() : low(), high() {
    for (int i = 0; i < 128; ++i) low[i] = bf16_of_integer(i) & 0xff, high[i] = (uint8_t)(bf16_of_integer(i) >> 8);
  }
};
struct Int4Table {
  alignas(kLineBytes) uint16_t value[32];  // twice: only four of an index's five bits count
  constexpr Int4Table() : value() {
    for (int i = 0; i < 32; ++i) value[i] = bf16_of_integer(i % 16 < 8 ? i % 16 : i % 16 - 16);
  }
};
constexpr Int8Table kInt8Table;
constexpr Int4Table kInt4Table;

// Each 16-byte lane: 4 columns by (pair 0: 2 k, pair 1: 2 k).
struct Int8Weights {
  static constexpr int kStepPairs = 2;
  static void load(const char* w, __m512i (&b)[kStepPairs]) {
    const __m512i q = _mm512_loadu_si512(w);
    const __m512i low = _mm512_permutex2var_epi8(_mm512_load_si512(kInt8Table.low), q,
                                                 _mm512_load_si512(kInt8Table.low + kLineBytes));
    const __m512i magnitude = _mm512_permutex2var_epi8(_mm512_load_si512(kInt8Table.high), q,
                                                       _mm512_load_si512(kInt8Table.high + kLineBytes));
    const __m512i high = _mm512_ternarylogic_epi32(magnitude, q, _mm512_set1_epi8((char)0x80), 0xf8);  // a | (b & c)
    b[0] = _mm512_unpacklo_epi8(low, high);
    b[1] = _mm512_unpackhi_epi8(low, high);
  }
};

// Each 16-bit word: one column, one k of a pair, four pairs.
struct Int4Weights {
  static constexpr int kStepPairs = 4;
  static void load(const char* w, __m512i (&b)[kStepPairs]) {
    const __m512i q = _mm512_loadu_si512(w), table = _mm512_load_si512(kInt4Table.value);
    b[0] = _mm512_permutexvar_epi16(q, table);
    b[1] = _mm512_permutexvar_epi16(_mm512_srli_epi16(q, 4), table);
    b[2] = _mm512_permutexvar_epi16(_mm512_srli_epi16(q, 8), table);
    b[3] = _mm512_permutexvar_epi16(_mm512_srli_epi16(q, 12), table);
  }
};

template <class Weights>
void expand_to_bf16(const char* packed, int64_t pairs, void* to) {
  __m512i b[Weights::kStepPairs];
  for (int64_t i = 0; i < pairs; i += Weights::kStepPairs)
    for (int v = 0; v < kVectors; ++v, packed += kLineBytes) {
      Weights::load(packed, b);
      for (int j = 0; j < Weights::kStepPairs; ++j)
        _mm512_store_si512((char*)to + ((i + j) * kVectors + v) * kLineBytes, b[j]);
    }
}
#endif

// A panel of integers to fp32 [k][column].
inline void expand_int8(const char* packed, int64_t pairs, void* to) {
  for (int64_t i = 0; i < 2 * pairs * kColumns; ++i) ((float*)to)[i] = (float)((const int8_t*)packed)[i];
}
inline void expand_int4(const char* packed, int64_t pairs, void* to) {
  const int8_t* from = (const int8_t*)packed;
  float* out = (float*)to;
  for (int64_t i = 0; i < pairs; ++i, from += kColumns, out += 2 * kColumns)
    for (int column = 0; column < kColumns; ++column) {
      out[column] = (float)((int8_t)((uint8_t)from[column] << 4) >> 4);
      out[kColumns + column] = (float)(from[column] >> 4);
    }
}

// Packs the integers (-127..127, or -8..7) of one panel; `rows` of its columns are there. `packed` is zero so far.
template <bool kForDot>
void pack_integers(const int8_t* weight, int64_t ldw, int64_t rows, int64_t k, bool is_int4, uint8_t* packed) {
  for (int64_t column = 0; column < std::min<int64_t>(rows, kColumns); ++column, weight += ldw)
    for (int64_t i = 0; i < k; ++i) {
      const int8_t q = weight[i];
      const uint8_t nibble = (uint8_t)(q & 15);
      if (kForDot && is_int4) {
        const int64_t word = i / 8 * kColumns * 2 + column * 2 + i % 2;
        packed[2 * word + i % 8 / 4] |= (uint8_t)(nibble << (i % 4 / 2 * 4));
      } else if (kForDot) {
        const int64_t lane = i / 4 * kColumns * 4 + column / 4 * 16;
        packed[lane + i % 4 / 2 * 8 + column % 4 * 2 + i % 2] = (uint8_t)(q < 0 ? 0x80 - q : q);
      } else if (is_int4) {
        packed[i / 2 * kColumns + column] |= (uint8_t)(nibble << (i % 2 * 4));
      } else {
        packed[i * kColumns + column] = (uint8_t)q;
      }
    }
}

// Packs one panel of dense weights. What stays together are pairs of bf16 and single elements of others: a `Word`.
template <class D>
void pack_dense(const typename D::T* weight, int64_t ldw, int64_t rows, int64_t k, void* packed) {
  typedef typename D::T T;
  constexpr int64_t kWord = std::is_same<D, Bfloat16>::value ? 2 : 1;
  constexpr int64_t kBlock = 16;  // words: what is written meanwhile stays in the first-level cache
  struct Word {
    T element[kWord];
  };
  const int64_t words = round_up(k, 2) / kWord;
  for (int64_t begin = 0; begin < words; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, words), whole = std::min(end, k / kWord);
    for (int64_t column = 0; column < kColumns; ++column) {
      const T* from = weight + column * ldw;
      Word* to = (Word*)packed + column;
      int64_t i = begin;
#if defined(__AVX2__)
      if (sizeof(Word) == 4 && column + 8 <= rows && whole == begin + kBlock) {
        for (; i < whole; i += 8) {
          __m256i square[8];
          for (int r = 0; r < 8; ++r) square[r] = _mm256_loadu_si256((const __m256i*)(from + r * ldw + i * kWord));
          transpose8(square);
          for (int r = 0; r < 8; ++r) _mm256_storeu_si256((__m256i*)(to + (i + r) * kColumns), square[r]);
        }
        column += 7;
        continue;
      }
#endif
      if (column < rows)
        for (; i < whole; ++i) std::memcpy(to + i * kColumns, from + i * kWord, sizeof(Word));
      for (; i < end; ++i) {
        Word rest = {};
        if (column < rows && i * kWord < k) rest.element[0] = from[i * kWord];
        to[i * kColumns] = rest;
      }
    }
  }
}

}  // namespace
}  // namespace baton
