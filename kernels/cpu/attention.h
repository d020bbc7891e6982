// What the attention kernels share: the problem, its units of work, and which rows see which keys.
#pragma once

#include <cstdint>
#include <vector>

#include "interface.h"

namespace baton {

struct AttentionUnit {  // consecutive rows of one sequence, for one KV head: the query heads of its group share tiles
  int64_t sequence, first_row, num_rows, first_position, kv_head;
};

struct AttentionProblem {
  BatonRows q, out;
  BatonPages pages;
  const int32_t* block_tables;
  int64_t table_stride;
  int64_t group;   // query heads per KV head
  int64_t window;  // 0: none
  float scale;     // with log2(e)

  int64_t first_visible(int64_t position) const {
    return window == 0 || position + 1 < window ? 0 : position + 1 - window;
  }
};

struct AttentionBatch {  // the sequences' rows, as in ops.paged_attention
  const int32_t* block_tables;
  int64_t table_stride, max_blocks, sequences;
  const int32_t *query_start, *context_lens;
};

// Attention of all rows; `out` may be `q`. Returns 0, or 1 with an error and nothing written.
int64_t paged_attention(int64_t dtype, int64_t rows, int64_t q_heads, BatonRows q, BatonPages pages,
                        const AttentionBatch& batch, float scale, int64_t window, BatonRows out)
    __attribute__((visibility("hidden")));

// Units of a bf16 problem, in order, by products of bf16 pairs; only where the build has them.
#if defined(__AVX512BF16__)
constexpr bool kHasBfloat16Pairs = true;
#else
constexpr bool kHasBfloat16Pairs = false;
#endif
void attend_bfloat16(const AttentionProblem& problem, const AttentionUnit* units, int64_t count)
    __attribute__((visibility("hidden")));

}  // namespace baton
