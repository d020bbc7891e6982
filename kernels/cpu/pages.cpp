// Copies of whole blocks, and between the pool and contiguous buffers. All sizes and strides in bytes.

#include <cstring>

#include "interface.h"
#include "mixing.h"

BATON_EXPORT int64_t baton_block_copy(uint8_t* pool, int64_t block_bytes, const int64_t* pairs, int64_t num_pairs) {
  for (int64_t i = 0; i < num_pairs; ++i)
    std::memcpy(pool + pairs[2 * i + 1] * block_bytes, pool + pairs[2 * i] * block_bytes, (size_t)block_bytes);
  return 0;
}

// pool [blocks, layers, 2, heads, block_size, row], strided; data [layers, 2, heads, tokens, row], contiguous. Where
// `checksum` is not null it gets the checksum of data, made in the same pass; rows must be whole words then.
BATON_EXPORT int64_t baton_move_pages(uint8_t* pool, int64_t num_blocks, int64_t block_stride, int64_t layer_stride,
                                      int64_t pair_stride, int64_t head_stride, int64_t token_stride, int64_t heads,
                                      int64_t block_size, int64_t row_bytes, int64_t layer_begin, int64_t layer_end,
                                      int64_t num_ids, const int64_t* block_ids, int64_t token_begin,
                                      int64_t token_end, uint8_t* data, int64_t to_pool, uint64_t* checksum) {
  using namespace baton;
  if (token_end > num_ids * block_size)
    return fail("token %lld lies past the %lld block ids", (long long)token_end, (long long)num_ids);
  for (int64_t i = 0; i < num_ids; ++i)
    if (block_ids[i] < 0 || block_ids[i] >= num_blocks)
      return fail("block id %lld is not in [0, %lld)", (long long)block_ids[i], (long long)num_blocks);
  if (checksum != nullptr && row_bytes % 8 != 0)
    return fail("rows of %lld bytes are not whole words", (long long)row_bytes);
  const int64_t tokens = token_end - token_begin;
  const int64_t data_bytes = (layer_end - layer_begin) * 2 * heads * tokens * row_bytes;
  uint64_t sum = 0;
  // Block by block: a block is contiguous over its layers, so the pool is walked in order.
  for (int64_t token = token_begin; token < token_end;) {
    const int64_t offset = token % block_size;
    const int64_t left = block_size - offset;
    const int64_t run = token_end - token < left ? token_end - token : left;
    uint8_t* block = pool + block_ids[token / block_size] * block_stride + offset * token_stride;
    for (int64_t layer = layer_begin; layer < layer_end; ++layer)
      for (int64_t pair = 0; pair < 2; ++pair)
        for (int64_t head = 0; head < heads; ++head) {
          uint8_t* page = block + layer * layer_stride + pair * pair_stride + head * head_stride;
          const int64_t row = (((layer - layer_begin) * 2 + pair) * heads + head) * tokens + (token - token_begin);
          const int64_t pieces = token_stride == row_bytes ? 1 : run;
          const int64_t piece_bytes = token_stride == row_bytes ? run * row_bytes : row_bytes;
          for (int64_t piece = 0; piece < pieces; ++piece) {
            const int64_t at = (row + piece) * row_bytes;
            uint8_t* to = to_pool ? page + piece * token_stride : data + at;
            const uint8_t* from = to_pool ? data + at : page + piece * token_stride;
            // The pool is walked in order, which the processor foresees; the payload in strides, which it does not, and
            // another core has just read or written it: its lines are asked for one piece ahead.
            const int64_t next = at + tokens * row_bytes;
            for (int64_t line = next; pieces == 1 && line < next + piece_bytes && line < data_bytes; line += 64)
              __builtin_prefetch(data + line);
            if (checksum != nullptr)
              sum += copy_and_sum_words(to, from, piece_bytes / 8, at / 8);
            else
              std::memcpy(to, from, (size_t)piece_bytes);
          }
        }
    token += run;
  }
  if (checksum != nullptr)
    *checksum = finish_sum(sum, data_bytes);
  return 0;
}
