// 64-bit checksum of bytes; reference/checksum.py defines it.

#include <cstring>

#include "interface.h"
#include "mixing.h"

BATON_EXPORT uint64_t baton_checksum(const uint8_t* data, int64_t num_bytes) {
  using namespace baton;
  static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "words are little-endian");
  const int64_t words = num_bytes / 8;
  uint64_t sum = sum_words(data, words, 0);
  if (num_bytes % 8 != 0) {
    uint8_t last[8] = {};
    std::memcpy(last, data + 8 * words, (size_t)(num_bytes % 8));
    sum += sum_words(last, 1, words);
  }
  return finish_sum(sum, num_bytes);
}
