// The finaliser of splitmix64, shared by noise and checksum; mirrors reference/mixing.py.
#pragma once

#include <cstdint>

namespace baton {
namespace {

constexpr uint64_t kGolden = 0x9E3779B97F4A7C15u;

inline uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

}  // namespace
}  // namespace baton
