// A run of decoder layers in one call: what model.py does by one op at a time, with the same arithmetic and rounding.
//
// Workspace belongs to the caller and is given once; a step allocates nothing. A call goes up to the KV write of layer
// end - 1, and first ends layer begin - 1 (its attention and MLP), so that pages can leave in between:
//   run(0, n, finish)  =  run(0, 4), run(4, 8), ..., run(.., n), run(n, n, finish)
// Rows pass through the linear layers in blocks, so what lies between two of them stays in the cache.

#include <chrono>
#include <cstring>

#include "attention.h"
#include "dtype.h"
#include "elementwise.h"
#include "interface.h"
#include "linear.h"
#include "pool.h"

struct BatonLayer {
  const void *input_norm, *post_norm;
  const void *q_norm, *k_norm;  // null where the family has none
  const baton::PackedLinear *qkv, *o, *gate_up, *down;
  BatonPages pages;
  int64_t window;  // 0: none
};

struct BatonDecoder {
  int64_t dtype, hidden, q_heads, kv_heads, head_dim, inner;
  const float *cos, *sin;  // [num_positions, half]
  int64_t num_positions, half;
  double eps, scale;
  const BatonLayer* layers;
  int64_t num_layers;
  const void* embed;  // [vocab, hidden], or null where other stages hold it
  int64_t vocab;
  int64_t max_rows, block_rows;
  void* residual;  // [max_rows, hidden]
  void* delta;     // [max_rows, hidden]
  void* heads;     // [max_rows, (q_heads + 2 * kv_heads) * head_dim]
  void* normed;    // [block_rows, hidden]
  void* gate_up;   // [block_rows, 2 * inner]
  double* times;   // seconds in linear layers, attention and the rest are added here; null: no clock is read
};

struct BatonStep {
  int64_t rows, sequences, max_blocks, table_stride;
  const int64_t* token_ids;  // read where hidden is null
  const void* hidden;        // [rows, hidden], what the layers before gave, or null
  const int32_t* positions;
  const int64_t* slots;
  const int32_t *block_tables, *query_start, *context_lens;
  const int64_t* logit_rows;  // ascending
  int64_t num_logit_rows;
};

namespace baton {
namespace {

enum Part { kLinear, kAttention, kRest, kParts };

class Stopwatch {  // adds the time since it last looked to a part's
 public:
  explicit Stopwatch(double* times) : times_(times) {
    if (times_ != nullptr) then_ = std::chrono::steady_clock::now();
  }
  void add(Part part) {
    if (times_ == nullptr) return;
    const auto now = std::chrono::steady_clock::now();
    times_[part] += std::chrono::duration<double>(now - then_).count();
    then_ = now;
  }

 private:
  double* times_;
  std::chrono::steady_clock::time_point then_;
};

int64_t dtype_bytes(int64_t dtype) { return dtype == kFloat32 ? 4 : 2; }

class Run {
 public:
  Run(const BatonDecoder& decoder, const BatonStep& step)
      : d_(decoder),
        step_(step),
        watch_(decoder.times),
        bytes_(dtype_bytes(decoder.dtype)),
        width_((decoder.q_heads + 2 * decoder.kv_heads) * decoder.head_dim) {}

  int64_t check(int64_t begin, int64_t end) const {
    if (begin < 0 || end > d_.num_layers || begin > end || end == 0)
      return fail("layers [%lld, %lld) of %lld", (long long)begin, (long long)end, (long long)d_.num_layers);
    if (step_.rows > d_.max_rows)
      return fail("a step of %lld rows, the workspace holds %lld", (long long)step_.rows, (long long)d_.max_rows);
    int64_t before = -1;
    for (int64_t i = 0; i < step_.num_logit_rows; ++i) {
      const int64_t row = step_.logit_rows[i];
      if (row <= before || row >= step_.rows)
        return fail("logit_rows[%lld] is %lld after %lld, of %lld rows", (long long)i, (long long)row,
                    (long long)before, (long long)step_.rows);
      before = row;
    }
    if (begin > 0 || step_.hidden != nullptr) return 0;
    if (d_.embed == nullptr) return fail("these layers have no embedding, so a step needs hidden rows");
    for (int64_t row = 0; row < step_.rows; ++row)
      if (step_.token_ids[row] < 0 || step_.token_ids[row] >= d_.vocab)
        return fail("token_ids[%lld] is %lld, the vocabulary has %lld", (long long)row,
                    (long long)step_.token_ids[row], (long long)d_.vocab);
    return 0;
  }

  int64_t layers(int64_t begin, int64_t end, bool finish) {
    if (begin == 0) take_input();
    for (int64_t layer = begin; layer < end; ++layer) {
      if (layer > 0 && finish_layer(layer - 1) != 0) return 1;
      if (begin_layer(layer) != 0) return 1;
    }
    return finish ? finish_layer(end - 1) : 0;
  }

 private:
  void take_input() {
    const size_t row_bytes = (size_t)(d_.hidden * bytes_);
    if (step_.hidden != nullptr)
      std::memcpy(d_.delta, step_.hidden, (size_t)step_.rows * row_bytes);
    else
      for (int64_t row = 0; row < step_.rows; ++row)
        std::memcpy((char*)d_.delta + row * row_bytes, (const char*)d_.embed + step_.token_ids[row] * row_bytes,
                    row_bytes);
    std::memset(d_.residual, 0, (size_t)step_.rows * row_bytes);
    watch_.add(kRest);
  }

  // f(first row, rows) of blocks that are as even as can be.
  template <class F>
  void for_each_block(int64_t rows, F f) const {
    const int64_t blocks = (rows + d_.block_rows - 1) / d_.block_rows;
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t begin = rows * i / blocks;
      f(begin, rows * (i + 1) / blocks - begin);
    }
  }

  char* residual(int64_t row) const { return (char*)d_.residual + row * d_.hidden * bytes_; }
  char* delta(int64_t row) const { return (char*)d_.delta + row * d_.hidden * bytes_; }
  BatonRows heads(int64_t row, int64_t head) const {
    return {(char*)d_.heads + (row * width_ + head * d_.head_dim) * bytes_, width_, d_.head_dim};
  }

  void norm(int64_t row, int64_t rows, const void* weight) {
    rms_norm(d_.dtype, rows, 1, d_.hidden, {delta(row), d_.hidden, 0}, weight, (float)d_.eps,
             {residual(row), d_.hidden, 0}, {d_.normed, d_.hidden, 0});
    watch_.add(kRest);
  }

  void multiply(const PackedLinear& weight, const void* x, int64_t ldx, void* y, int64_t ldy, int64_t rows) {
    linear(weight, x, ldx, y, ldy, rows);
    watch_.add(kLinear);
  }

  // Up to the KV write.
  int64_t begin_layer(int64_t index) {
    const BatonLayer& layer = d_.layers[index];
    for_each_block(step_.rows, [&](int64_t row, int64_t rows) {
      norm(row, rows, layer.input_norm);
      multiply(*layer.qkv, d_.normed, d_.hidden, heads(row, 0).data, width_, rows);
    });
    const BatonRows q = heads(0, 0), k = heads(0, d_.q_heads), v = heads(0, d_.q_heads + d_.kv_heads);
    if (layer.q_norm != nullptr && layer.k_norm != nullptr) {
      rms_norm(d_.dtype, step_.rows, d_.q_heads, d_.head_dim, q, layer.q_norm, (float)d_.eps, {}, q);
      rms_norm(d_.dtype, step_.rows, d_.kv_heads, d_.head_dim, k, layer.k_norm, (float)d_.eps, {}, k);
    }
    const int64_t status =
        rope_and_cache(d_.dtype, step_.rows, d_.q_heads, q, k, v, {d_.cos, d_.sin, d_.num_positions, d_.half},
                       step_.positions, layer.pages, step_.slots, sizeof(int64_t));
    watch_.add(kRest);
    return status;
  }

  int64_t finish_layer(int64_t index) {
    const BatonLayer& layer = d_.layers[index];
    const bool is_last = index + 1 == d_.num_layers;
    if (is_last && step_.num_logit_rows == 0) return 0;
    const BatonRows q = heads(0, 0);
    const AttentionBatch batch{step_.block_tables, step_.table_stride, step_.max_blocks,
                               step_.sequences,    step_.query_start,  step_.context_lens};
    if (paged_attention(d_.dtype, step_.rows, d_.q_heads, q, layer.pages, batch, (float)d_.scale, layer.window, q) != 0)
      return 1;
    watch_.add(kAttention);
    int64_t rows = step_.rows;
    if (is_last) {
      // After the last attention no row depends on another: only the wanted ones go on.
      rows = step_.num_logit_rows;
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t row = step_.logit_rows[i];
        if (row == i) continue;
        std::memcpy(residual(i), residual(row), (size_t)(d_.hidden * bytes_));
        std::memcpy(heads(i, 0).data, heads(row, 0).data, (size_t)(d_.q_heads * d_.head_dim * bytes_));
      }
    }
    for_each_block(rows, [&](int64_t row, int64_t count) {
      multiply(*layer.o, heads(row, 0).data, width_, delta(row), d_.hidden, count);
      norm(row, count, layer.post_norm);
      multiply(*layer.gate_up, d_.normed, d_.hidden, d_.gate_up, 2 * d_.inner, count);
      silu_mul(d_.dtype, count, d_.inner, d_.gate_up, 2 * d_.inner, d_.gate_up, 2 * d_.inner);
      watch_.add(kRest);
      multiply(*layer.down, d_.gate_up, 2 * d_.inner, delta(row), d_.hidden, count);
    });
    if (is_last) add_delta(rows);
    return 0;
  }

  void add_delta(int64_t rows) {
    with_dtype(d_.dtype, [&](auto tag) {
      typedef decltype(tag) D;
      typedef typename D::T T;
      T* to = (T*)d_.residual;
      const T* from = (const T*)d_.delta;
      for_each_vector(rows * d_.hidden, [&](int64_t i, auto n) {
        store_up_to<D>(to + i, load_up_to<D>(to + i, n) + load_up_to<D>(from + i, n), n);
      });
    });
    watch_.add(kRest);
  }

  const BatonDecoder& d_;
  const BatonStep& step_;
  Stopwatch watch_;
  const int64_t bytes_;
  const int64_t width_;  // elements of a row of heads
};

}  // namespace
}  // namespace baton

// Layers [begin, end); `finish` ends layer end - 1 too. After the model's last layer residual holds num_logit_rows rows.
BATON_EXPORT int64_t baton_decoder_run(const BatonDecoder* decoder, const BatonStep* step, int64_t begin, int64_t end,
                                       int64_t finish) {
  using namespace baton;
  return guarded([&]() -> int64_t {
    Run run(*decoder, *step);
    if (run.check(begin, end) != 0) return 1;
    return run.layers(begin, end, finish != 0);
  });
}

// Final norm and head of the first `rows` rows of `residual`: fp32 logits [rows, head->n], `narrow` [block_rows, head->n]
// of the dtype in between.
BATON_EXPORT int64_t baton_decoder_logits(const BatonDecoder* decoder, const void* final_norm,
                                          const baton::PackedLinear* head, int64_t rows, void* narrow,
                                          int64_t narrow_rows, float* logits) {
  using namespace baton;
  return guarded([&]() -> int64_t {
    const BatonDecoder& d = *decoder;
    const int64_t bytes = dtype_bytes(d.dtype), most = narrow_rows < d.block_rows ? narrow_rows : d.block_rows;
    for (int64_t row = 0; row < rows; row += most) {
      const int64_t count = rows - row < most ? rows - row : most;
      Stopwatch watch(d.times);
      rms_norm(d.dtype, count, 1, d.hidden, {(char*)d.residual + row * d.hidden * bytes, d.hidden, 0}, final_norm,
               (float)d.eps, {}, {d.normed, d.hidden, 0});
      watch.add(kRest);
      void* const to = d.dtype == kFloat32 ? (void*)(logits + row * head->n) : narrow;
      linear(*head, d.normed, d.hidden, to, head->n, count);
      watch.add(kLinear);
      if (d.dtype == kFloat32) continue;
      with_dtype(d.dtype, [&](auto tag) {
        typedef decltype(tag) D;
        const typename D::T* from = (const typename D::T*)narrow;
        parallel_rows(count, 1, [&](int64_t begin, int64_t end) {
          float* wide = logits + row * head->n;
          for_each_vector((end - begin) * head->n, [&](int64_t i, auto n) {
            const int64_t at = begin * head->n + i;
            store_up_to<Float32>(wide + at, load_up_to<D>(from + at, n), n);
          });
        });
      });
      watch.add(kRest);
    }
    return 0;
  });
}
