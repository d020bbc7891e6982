// The generator of Gumbel noise, element by element; reference/noise.py spells it out, and this equals it to the last bit.
#pragma once

#include <cstdint>
#include <cstring>

#include "mixing.h"

namespace baton {
namespace {

constexpr uint64_t kPosition = 0xD1342543DE82EF95u;
constexpr uint64_t kOne = 0x3FF0000000000000u;     // bits of 1.0
constexpr uint64_t kSqrt2 = 0x3FF6A09E667F3BCDu;  // bits of 1.4142135623730951

inline double as_double(uint64_t bits) {
  double value;
  std::memcpy(&value, &bits, 8);
  return value;
}
inline uint64_t as_bits(double value) {
  uint64_t bits;
  std::memcpy(&bits, &value, 8);
  return bits;
}

// No branch and no call, so that the loop over tokens vectorises; no fusing (-ffp-contract=off).
inline double log_fixed(double x) {
  const uint64_t bits = as_bits(x);
  const uint64_t significand = (bits & 0xFFFFFFFFFFFFFu) | kOne;
  const uint64_t large = (kSqrt2 - significand) >> 63;  // 1 where the significand exceeds sqrt(2)
  const double mantissa = as_double(significand - (large << 52));
  // A small integer beside the exponent of 2^52 is that integer plus 2^52.
  const double exponent = as_double(((bits >> 52) + large) | 0x4330000000000000u) - (4503599627370496.0 + 1023.0);
  const double s = (mantissa - 1.0) / (mantissa + 1.0);
  const double z = s * s;
  double series = z * (1.0 / 13.0) + 1.0 / 11.0;
  series = series * z + 1.0 / 9.0;
  series = series * z + 1.0 / 7.0;
  series = series * z + 1.0 / 5.0;
  series = series * z + 1.0 / 3.0;
  series = series * z + 1.0;
  return exponent * 0.6931471805599453 + (s + s) * series;
}

inline uint64_t noise_key(uint64_t seed, uint64_t position) { return mix(mix(seed + kGolden) + position * kPosition); }

// The 64 bits that decide a token's noise.
inline uint64_t noise_bits(uint64_t key, int64_t token) { return mix(key + (uint64_t)(token + 1) * kGolden); }

inline float noise_of_bits(uint64_t bits) {
  const double u = (as_double((bits >> 12) | kOne) - 1.0) + 0x1p-53;
  return (float)-log_fixed(-log_fixed(u));
}

}  // namespace
}  // namespace baton
