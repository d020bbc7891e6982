// What crosses the C interface: strided views, error reporting. Strides are in elements unless named _bytes.
//
// Entry points return 0, or 1 with a message for baton_error() of the same thread; nothing has been written then.
#pragma once

#include <cstdint>
#include <exception>

#define BATON_EXPORT extern "C" __attribute__((visibility("default")))

struct BatonRows {  // [rows, heads, dim], dim is dense
  void* data;
  int64_t row_stride, head_stride;
};

struct BatonPages {  // one layer of the pool: [num_blocks, 2, num_heads, block_size, head_dim], head_dim is dense
  void* data;
  int64_t num_blocks, num_heads, block_size, head_dim;
  int64_t block_stride, pair_stride, head_stride, token_stride;
};

namespace baton {

// Formats the calling thread's error message; returns 1.
int64_t fail(const char* format, ...) __attribute__((format(printf, 1, 2), visibility("hidden")));

// Runs an entry point's body; no exception may cross the C interface.
template <class F>
int64_t guarded(F body) {
  try {
    return body();
  } catch (const std::exception& error) {
    return fail("CPU kernel failed: %s", error.what());
  }
}

}  // namespace baton
