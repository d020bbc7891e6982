// Norm, rotation and gated activation for callers within the library; what they compute stands in ops.py.
#pragma once

#include <cstdint>

#include "interface.h"

namespace baton {

void rms_norm(int64_t dtype, int64_t rows, int64_t heads, int64_t dim, BatonRows x, const void* weight, float eps,
              BatonRows residual, BatonRows out) __attribute__((visibility("hidden")));

// silu(gate) * up; `out` may be the gate's place.
void silu_mul(int64_t dtype, int64_t rows, int64_t dim, const void* gate_up, int64_t in_stride, void* out,
              int64_t out_stride) __attribute__((visibility("hidden")));

struct RotaryTables {  // fp32 [num_positions, half]
  const float *cos, *sin;
  int64_t num_positions, half;
};

// Returns 0, or 1 with an error and nothing written.
int64_t rope_and_cache(int64_t dtype, int64_t rows, int64_t q_heads, BatonRows q, BatonRows k, BatonRows v,
                       const RotaryTables& tables, const int32_t* positions, BatonPages pages, const void* slots,
                       int64_t slot_bytes) __attribute__((visibility("hidden")));

}  // namespace baton
