// The finaliser of splitmix64, shared by noise and checksums; mirrors reference/mixing.py. Checksums of whole words, with
// and without a copy on the way: a checksum is a sum over words, so it may be made piece by piece, in any order.
#pragma once

#include <cstdint>
#include <cstring>

namespace baton {
namespace {

constexpr uint64_t kGolden = 0x9E3779B97F4A7C15u;

inline uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

// The part of a checksum that `words` words give, the first of which is word `index` of the whole.
inline uint64_t sum_words(const uint8_t* data, int64_t words, int64_t index) {
  uint64_t sum = 0;
  for (int64_t i = 0; i < words; ++i) {
    uint64_t word;
    std::memcpy(&word, data + 8 * i, 8);
    sum += mix(word ^ ((uint64_t)(index + i + 1) * kGolden));
  }
  return sum;
}

// The same, and copies them: one pass over memory for both.
inline uint64_t copy_and_sum_words(uint8_t* __restrict to, const uint8_t* __restrict from, int64_t words,
                                   int64_t index) {
  uint64_t sum = 0;
  for (int64_t i = 0; i < words; ++i) {
    uint64_t word;
    std::memcpy(&word, from + 8 * i, 8);
    std::memcpy(to + 8 * i, &word, 8);
    sum += mix(word ^ ((uint64_t)(index + i + 1) * kGolden));
  }
  return sum;
}

// The checksum of which `sum` is the sum over all words.
inline uint64_t finish_sum(uint64_t sum, int64_t num_bytes) { return mix(mix(sum) ^ (uint64_t)num_bytes); }

}  // namespace
}  // namespace baton
