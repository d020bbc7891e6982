// Linear layers over weights that are packed once: the interface between the layout of weights and whoever multiplies.
#pragma once

#include <cstdint>

namespace baton {

enum class WeightFormat : int32_t { kDense = 0, kInt8 = 1, kInt4 = 2 };

// A weight matrix [n, k] as `linear.cpp` lays it out.
struct PackedLinear {
  int64_t n, k;
  int32_t dtype;         // of input, output and bias, as in dtype.h
  WeightFormat format;
  int64_t group;         // input features that share a scale; 0 where dense
  const void* weight;    // packed
  const void* scales;    // null where dense
  const void* bias;      // [n] or null
};

// y [m, n] = x [m, k] times the transposed weight, plus bias, summed in fp32 and rounded once; rows of x are ldx elements
// apart, rows of y ldy. A row's bits depend on that row alone, for any m and any number of threads.
void linear(const PackedLinear& weight, const void* x, int64_t ldx, void* y, int64_t ldy, int64_t m);

}  // namespace baton
