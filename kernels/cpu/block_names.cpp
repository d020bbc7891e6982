// Names of a prompt's blocks: SHA-256 of canonical CBOR, chained. engine/prefix_cache.py defines them.

#include <cstring>
#include <vector>

#include "interface.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif

namespace baton {
namespace {

constexpr uint32_t kRounds[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};
constexpr uint32_t kStart[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
constexpr int64_t kNameBytes = 32;

uint32_t rotate(uint32_t word, int bits) { return word >> bits | word << (32 - bits); }

void store_big(uint8_t* out, uint64_t value, int num_bytes) {
  for (int i = 0; i < num_bytes; ++i) out[i] = (uint8_t)(value >> 8 * (num_bytes - 1 - i));
}

void compress(uint32_t* state, const uint8_t* data, int64_t num_chunks) {
  for (; num_chunks > 0; --num_chunks, data += 64) {
    uint32_t w[64], s[8];
    for (int i = 0; i < 16; ++i) {
      const uint8_t* word = data + 4 * i;
      w[i] = (uint32_t)word[0] << 24 | (uint32_t)word[1] << 16 | (uint32_t)word[2] << 8 | word[3];
    }
    for (int i = 16; i < 64; ++i) {
      const uint32_t low = rotate(w[i - 15], 7) ^ rotate(w[i - 15], 18) ^ w[i - 15] >> 3;
      const uint32_t high = rotate(w[i - 2], 17) ^ rotate(w[i - 2], 19) ^ w[i - 2] >> 10;
      w[i] = w[i - 16] + low + w[i - 7] + high;
    }
    std::memcpy(s, state, sizeof s);
    for (int i = 0; i < 64; ++i) {
      const uint32_t sum_e = rotate(s[4], 6) ^ rotate(s[4], 11) ^ rotate(s[4], 25);
      const uint32_t first = s[7] + sum_e + ((s[4] & s[5]) ^ (~s[4] & s[6])) + kRounds[i] + w[i];
      const uint32_t sum_a = rotate(s[0], 2) ^ rotate(s[0], 13) ^ rotate(s[0], 22);
      const uint32_t second = sum_a + ((s[0] & s[1]) ^ (s[0] & s[2]) ^ (s[1] & s[2]));
      std::memmove(s + 1, s, 7 * sizeof *s);
      s[4] += first;
      s[0] = first + second;
    }
    for (int i = 0; i < 8; ++i) state[i] += s[i];
  }
}

#if defined(__x86_64__)
// The processor's own rounds, two at a time; the state lies as (a, b, e, f) and (c, d, g, h).
__attribute__((target("sha,sse4.1,ssse3"))) void compress_natively(uint32_t* state, const uint8_t* data,
                                                                   int64_t num_chunks) {
  const __m128i swap = _mm_set_epi64x(0x0c0d0e0f08090a0b, 0x0405060700010203);
  __m128i low = _mm_shuffle_epi32(_mm_loadu_si128((const __m128i*)state), 0xB1);
  __m128i high = _mm_shuffle_epi32(_mm_loadu_si128((const __m128i*)(state + 4)), 0x1B);
  __m128i abef = _mm_alignr_epi8(low, high, 8), cdgh = _mm_blend_epi16(high, low, 0xF0);
  for (; num_chunks > 0; --num_chunks, data += 64) {
    const __m128i abef_before = abef, cdgh_before = cdgh;
    __m128i w[4];
    for (int i = 0; i < 16; ++i) {
      __m128i& words = w[i % 4];
      const __m128i next = w[(i + 1) % 4], third = w[(i + 2) % 4], last = w[(i + 3) % 4];
      words = i < 4 ? _mm_shuffle_epi8(_mm_loadu_si128((const __m128i*)(data + 16 * i)), swap)
                    : _mm_sha256msg2_epu32(
                          _mm_add_epi32(_mm_sha256msg1_epu32(words, next), _mm_alignr_epi8(last, third, 4)), last);
      const __m128i added = _mm_add_epi32(words, _mm_loadu_si128((const __m128i*)(kRounds + 4 * i)));
      cdgh = _mm_sha256rnds2_epu32(cdgh, abef, added);
      abef = _mm_sha256rnds2_epu32(abef, cdgh, _mm_shuffle_epi32(added, 0x0E));
    }
    abef = _mm_add_epi32(abef, abef_before);
    cdgh = _mm_add_epi32(cdgh, cdgh_before);
  }
  low = _mm_shuffle_epi32(abef, 0x1B);
  high = _mm_shuffle_epi32(cdgh, 0xB1);
  _mm_storeu_si128((__m128i*)state, _mm_blend_epi16(low, high, 0xF0));
  _mm_storeu_si128((__m128i*)(state + 4), _mm_alignr_epi8(high, low, 8));
}

bool has_sha() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (b >> 29 & 1) != 0;
}
#endif

// `message` is padded in place.
void digest(std::vector<uint8_t>& message, uint8_t* name, void (*compress_chunks)(uint32_t*, const uint8_t*, int64_t)) {
  const uint64_t num_bits = 8 * (uint64_t)message.size();
  message.push_back(0x80);
  message.resize((message.size() + 8 + 63) / 64 * 64);
  store_big(message.data() + message.size() - 8, num_bits, 8);
  uint32_t state[8];
  std::memcpy(state, kStart, sizeof state);
  compress_chunks(state, message.data(), (int64_t)message.size() / 64);
  for (int i = 0; i < 8; ++i) store_big(name + 4 * i, state[i], 4);
}

// The first bytes of a CBOR item: its kind, and a number in as few bytes as it fits.
uint8_t* put_head(uint8_t* out, uint8_t kind, uint32_t value) {
  if (value < 24) {
    *out = (uint8_t)(kind | value);
    return out + 1;
  }
  const int code = value < 1u << 8 ? 0 : value < 1u << 16 ? 1 : 2;
  *out = (uint8_t)(kind | (24 + code));
  store_big(out + 1, value, 1 << code);
  return out + 1 + (1 << code);
}

}  // namespace
}  // namespace baton

// Args: `parent` is the name before the first block, or null; `tail` what stands behind the ids of every block;
// `is_portable` leaves the processor's own rounds out; `names` takes 32 bytes per block.
BATON_EXPORT int64_t baton_block_names(const uint32_t* ids, int64_t num_blocks, uint32_t block_size,
                                       const uint8_t* parent, const uint8_t* tail, int64_t tail_bytes,
                                       int64_t is_portable, uint8_t* names) {
  using namespace baton;
  return guarded([&] {
    auto compress_chunks = compress;
#if defined(__x86_64__)
    if (is_portable == 0 && has_sha()) compress_chunks = compress_natively;
#endif
    std::vector<uint8_t> message;
    for (int64_t block = 0; block < num_blocks; ++block, ids += block_size, names += kNameBytes) {
      message.resize((size_t)(3 + kNameBytes + 5 + 5 * (int64_t)block_size + tail_bytes));
      uint8_t* end = put_head(message.data(), 0x80, 4);
      end = put_head(end, 0x40, parent == nullptr ? 0 : (uint32_t)kNameBytes);
      if (parent != nullptr) {
        std::memcpy(end, parent, kNameBytes);
        end += kNameBytes;
      }
      end = put_head(end, 0x80, block_size);
      for (uint32_t i = 0; i < block_size; ++i) end = put_head(end, 0, ids[i]);
      std::memcpy(end, tail, (size_t)tail_bytes);
      message.resize((size_t)(end + tail_bytes - message.data()));
      digest(message, names, compress_chunks);
      parent = names;
    }
    return 0;
  });
}
