// 64-bit checksum of bytes; reference/checksum.py defines it.

#include <cstring>

#include "interface.h"
#include "mixing.h"

BATON_EXPORT uint64_t baton_checksum(const uint8_t* data, int64_t num_bytes) {
  using namespace baton;
  static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "words are little-endian");
  const int64_t words = num_bytes / 8;
  uint64_t sum = 0;
  for (int64_t i = 0; i < words; ++i) {
    uint64_t word;
    std::memcpy(&word, data + 8 * i, 8);
    sum += mix(word ^ ((uint64_t)(i + 1) * kGolden));
  }
  if (num_bytes % 8 != 0) {
    uint64_t word = 0;
    std::memcpy(&word, data + 8 * words, (size_t)(num_bytes % 8));
    sum += mix(word ^ ((uint64_t)(words + 1) * kGolden));
  }
  return mix(mix(sum) ^ (uint64_t)num_bytes);
}
