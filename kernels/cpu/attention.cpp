// Row-invariant paged attention: causal, grouped query heads, optional sliding window, fp32 arithmetic.
//
// A query row meets its keys in tiles of kTile, aligned to absolute positions, first tile to last, with online softmax:
//   score = (sum over d in order of q[d] * k[d]) * scale          lanes are keys: no sum across lanes
//   m' = max(m, tile max), p = 2^(score - m'), c = 2^(m - m')
//   l = l * c + sum of p (fixed tree)      o = o * c + sum over keys in order of p * v          lanes are dimensions
// Every step is per row and spelled out to the last rounding, so how rows are grouped into units and register blocks
// changes nothing. A tile without a visible key is skipped for the row; hidden keys get p = 0, and their values
// are not touched.
//
// A unit of work is (sequence, KV head, a few consecutive rows): all query heads of the group share a tile's load.

#include <cmath>
#include <limits>
#include <vector>

#include "attention.h"
#include "dtype.h"
#include "interface.h"
#include "pool.h"
#include "tile.h"

namespace baton {
namespace {

constexpr int64_t kRowsPerUnit = 64;   // (position, head) rows
constexpr int64_t kPiecesPerThread = 16;  // runs of units that a thread takes at a time
constexpr int kBlock = 4;             // rows per register block
constexpr int kTileVectors = kTile / kWidth;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct alignas(64) Softmax {  // of one row
  float sums[kWidth];  // partial sums of p, by lane
  float top;           // running maximum
};

struct Scratch {  // grows, one per thread
  std::vector<float> floats;
  std::vector<Softmax> softmax;
  float* take(int64_t& used, int64_t n) {
    float* at = floats.data() + used;
    used += (n + 15) / 16 * 16;
    return at;
  }
};

// scores[R][kTile] = q[R][dim] . keys[dim][kTile] * scale
template <int R>
void score_rows(const float* q, int64_t dim, const float* keys, float scale, float* scores) {
  constexpr int kColumns = kTileVectors < 2 ? 1 : 2;
  for (int column = 0; column < kTile; column += kColumns * kWidth) {
    vf sum[R][kColumns] = {};
    for (int64_t d = 0; d < dim; ++d) {
      vf key[kColumns];
      for (int c = 0; c < kColumns; ++c) key[c] = load(keys + d * kTile + column + c * kWidth);
      for (int r = 0; r < R; ++r) {
        const vf x = splat(q[r * dim + d]);
        for (int c = 0; c < kColumns; ++c) sum[r][c] = fma(x, key[c], sum[r][c]);
      }
    }
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < kColumns; ++c) store(scores + r * kTile + column + c * kWidth, sum[r][c] * splat(scale));
  }
}

// Turns one row's scores into p, for visible keys [low, high) of the tile; returns the factor for what was before.
inline float softmax_row(Softmax& row, float* scores, int low, int high) {
  if (low > 0 || high < kTile) {
    for (int i = 0; i < low; ++i) scores[i] = -kInfinity;
    for (int i = high; i < kTile; ++i) scores[i] = -kInfinity;
  }
  vf top = load(scores);
  for (int i = 1; i < kTileVectors; ++i) top = max(load(scores + i * kWidth), top);
  const float tile_top = max_lanes(top);
  const float new_top = tile_top > row.top ? tile_top : row.top;
  const float base = new_top == -kInfinity ? 0.0f : new_top;
  vf sum = {};
  for (int i = 0; i < kTileVectors; ++i) {
    const vf p = exp2_lanes(load(scores + i * kWidth) - splat(base));
    store(scores + i * kWidth, p);
    sum += p;
  }
  const vf factor = exp2_lanes(splat(row.top - base));
  store(row.sums, fma(load(row.sums), factor, sum));
  row.top = new_top;
  return factor[0];
}

// o[R][padded] = o * factor + p[R][low..high) . values[low..high)[padded], C vectors of columns at `column`
template <int R, int C>
void mix_columns(float* o, const float* factor, const float* p, const float* values, int low, int high, int64_t padded,
                 int64_t column) {
  vf sum[R][C];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) sum[r][c] = load(o + r * padded + column + c * kWidth) * splat(factor[r]);
  for (int i = low; i < high; ++i) {
    vf value[C];
    for (int c = 0; c < C; ++c) value[c] = load(values + i * padded + column + c * kWidth);
    for (int r = 0; r < R; ++r) {
      const vf weight = splat(p[r * kTile + i]);
      for (int c = 0; c < C; ++c) sum[r][c] = fma(weight, value[c], sum[r][c]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) store(o + r * padded + column + c * kWidth, sum[r][c]);
}

template <int R>
void mix_rows(float* o, const float* factor, const float* p, const float* values, int low, int high, int64_t padded) {
  int64_t column = 0;
  for (; column + 2 * kWidth <= padded; column += 2 * kWidth)
    mix_columns<R, 2>(o, factor, p, values, low, high, padded, column);
  if (column < padded) mix_columns<R, 1>(o, factor, p, values, low, high, padded, column);
}

// One tile for R rows that see the same keys of it.
template <int R>
void attend(const float* q, int64_t dim, const float* keys, const float* values, float scale, int low, int high,
            int64_t padded, Softmax* softmax, float* o) {
  alignas(64) float scores[R * kTile];
  float factor[R];
  score_rows<R>(q, dim, keys, scale, scores);
  for (int r = 0; r < R; ++r) factor[r] = softmax_row(softmax[r], scores + r * kTile, low, high);
  mix_rows<R>(o, factor, scores, values, low, high, padded);
}

// Pages lie scattered in the pool, so the hardware does not foresee the next ones.
template <class T>
inline void prefetch(const T* key_row, int64_t pair_stride, int64_t dim) {
  for (int64_t d = 0; d < dim; d += 64 / (int64_t)sizeof(T)) {
    __builtin_prefetch(key_row + d);
    __builtin_prefetch(key_row + pair_stride + d);
  }
}

template <class D>
void run_unit(const AttentionProblem& problem, const AttentionUnit& unit) {
  typedef typename D::T T;
  const BatonPages& pages = problem.pages;
  const int64_t dim = pages.head_dim, padded = (dim + kWidth - 1) / kWidth * kWidth, group = problem.group;
  const int64_t rows = unit.num_rows * group, kv_head = unit.kv_head;

  thread_local Scratch scratch;
  const size_t needed = (size_t)(rows * (dim + padded) + kTile * (dim + padded) + dim + 16 * 8);
  if (scratch.floats.size() < needed) scratch.floats.resize(needed);
  if (scratch.softmax.size() < (size_t)rows) scratch.softmax.resize((size_t)rows);
  int64_t used = 0;
  float* q = scratch.take(used, rows * dim + kWidth);
  float* o = scratch.take(used, rows * padded);
  float* keys = scratch.take(used, kTile * dim);
  float* values = scratch.take(used, kTile * padded);
  T* absent = (T*)scratch.take(used, dim);  // stands in for keys that no row sees
  Softmax* softmax = scratch.softmax.data();

  std::memset(o, 0, (size_t)(rows * padded) * sizeof(float));
  std::memset(values, 0, (size_t)(kTile * padded) * sizeof(float));
  std::memset((void*)absent, 0, (size_t)dim * sizeof(T));
  for (int64_t row = 0; row < rows; ++row) {
    const T* from = (const T*)problem.q.data + (unit.first_row + row / group) * problem.q.row_stride +
                    (kv_head * group + row % group) * problem.q.head_stride;
    for_each_vector(dim, [&](int64_t d, auto n) {
      store_up_to<Float32>(q + row * dim + d, load_up_to<D>(from + d, n), n);
    });
    softmax[row] = Softmax{};
    softmax[row].top = -kInfinity;
  }

  const int32_t* table = problem.block_tables + unit.sequence * problem.table_stride;
  const T* pool = (const T*)pages.data + kv_head * pages.head_stride;
  const int64_t begin = problem.first_visible(unit.first_position), end = unit.first_position + unit.num_rows;
  // Key rows of the tile at `base`; `absent` for keys that no row of the unit sees.
  const auto locate = [&](int64_t base, const T** rows_of_tile) {
    const int64_t first = begin > base ? begin : base, last = end < base + kTile ? end : base + kTile;
    for (int i = 0; i < kTile; ++i) rows_of_tile[i] = absent;
    int64_t block = first / pages.block_size, offset = first % pages.block_size;
    for (int64_t position = first; position < last; ++block, offset = 0) {
      const T* row = pool + table[block] * pages.block_stride + offset * pages.token_stride;
      for (; offset < pages.block_size && position < last; ++offset, ++position, row += pages.token_stride)
        rows_of_tile[position - base] = row;
    }
  };
  const T* key_rows[kTile];
  const T* next_rows[kTile];
  int64_t base = begin / kTile * kTile;
  locate(base, next_rows);
  for (; base < end; base += kTile) {
    const int first = (int)(begin > base ? begin - base : 0), last = (int)(end - base < kTile ? end - base : kTile);
    std::memcpy(key_rows, next_rows, sizeof key_rows);
    if (base + kTile < end) {
      locate(base + kTile, next_rows);
      for (int i = 0; i < kTile && next_rows[i] != absent; ++i) prefetch(next_rows[i], pages.pair_stride, dim);
    }
    load_keys<D>(key_rows, dim, keys);
    load_values<D>(key_rows, pages.pair_stride, first, last, dim, padded, values);

    const auto visible = [&](int64_t row, int& low, int& high) {
      const int64_t position = unit.first_position + row / group;
      const int64_t from = problem.first_visible(position) - base, to = position + 1 - base;
      low = (int)(from < 0 ? 0 : from > kTile ? kTile : from);
      high = (int)(to < 0 ? 0 : to > kTile ? kTile : to);
    };
    for (int64_t row = 0; row < rows; row += kBlock) {
      const int64_t count = rows - row < kBlock ? rows - row : kBlock;
      int low, high, other_low, other_high;
      visible(row, low, high);
      bool together = count == kBlock;
      for (int64_t other = row + 1; other < row + count; ++other) {
        visible(other, other_low, other_high);
        together = together && other_low == low && other_high == high;
      }
      if (together) {
        if (low < high)
          attend<kBlock>(q + row * dim, dim, keys, values, problem.scale, low, high, padded, softmax + row,
                         o + row * padded);
        continue;
      }
      for (int64_t single = row; single < row + count; ++single) {
        visible(single, low, high);
        if (low < high)
          attend<1>(q + single * dim, dim, keys, values, problem.scale, low, high, padded, softmax + single,
                    o + single * padded);
      }
    }
  }

  for (int64_t row = 0; row < rows; ++row) {
    T* to = (T*)problem.out.data + (unit.first_row + row / group) * problem.out.row_stride +
            (kv_head * group + row % group) * problem.out.head_stride;
    const vf factor = splat(1.0f / sum_lanes(load(softmax[row].sums)));
    for_each_vector(dim, [&](int64_t d, auto n) {
      store_up_to<D>(to + d, load(o + row * padded + d) * factor, n);
    });
  }
}

// Fails on the first index that would lead out of q, the tables or the pool.
int64_t check(const AttentionProblem& problem, int64_t rows, const AttentionBatch& batch) {
  const BatonPages& pages = problem.pages;
  const int32_t *query_start = batch.query_start, *context_lens = batch.context_lens;
  const int64_t sequences = batch.sequences, max_blocks = batch.max_blocks;
  if (query_start[0] != 0) return fail("query_start must begin with 0, got %d", query_start[0]);
  for (int64_t s = 0; s < sequences; ++s) {
    const int64_t n = (int64_t)query_start[s + 1] - query_start[s];
    if (n < 0 || query_start[s + 1] > rows)
      return fail("query_start goes from %d to %d at sequence %lld; q has %lld rows", query_start[s],
                  query_start[s + 1], (long long)s, (long long)rows);
    if (n == 0) continue;
    const int64_t context = context_lens[s];
    if (context < n)
      return fail("context_lens[%lld] is %lld, less than the sequence's %lld rows", (long long)s, (long long)context,
                  (long long)n);
    const int64_t blocks = (context + pages.block_size - 1) / pages.block_size;
    if (blocks > max_blocks)
      return fail("sequence %lld needs %lld blocks for context %lld, block_tables is %lld wide", (long long)s,
                  (long long)blocks, (long long)context, (long long)max_blocks);
    const int32_t* table = problem.block_tables + s * problem.table_stride;
    for (int64_t i = problem.first_visible(context - n) / pages.block_size; i < blocks; ++i)
      if (table[i] < 0 || table[i] >= pages.num_blocks)
        return fail("block_tables[%lld, %lld] is %d, the cache has %lld blocks", (long long)s, (long long)i, table[i],
                    (long long)pages.num_blocks);
  }
  return 0;
}

}  // namespace

int64_t paged_attention(int64_t dtype, int64_t rows, int64_t q_heads, BatonRows q, BatonPages pages,
                        const AttentionBatch& batch, float scale, int64_t window, BatonRows out) {
  const AttentionProblem problem{
      q, out, pages, batch.block_tables, batch.table_stride, q_heads / pages.num_heads, window, scale * kLog2e};
  if (check(problem, rows, batch) != 0) return 1;
  const int64_t step = kRowsPerUnit / problem.group > 1 ? kRowsPerUnit / problem.group : 1;
  thread_local std::vector<AttentionUnit> units;
  units.clear();
  for (int64_t s = 0; s < batch.sequences; ++s)
    for (int64_t row = batch.query_start[s]; row < batch.query_start[s + 1]; row += step) {
      const int64_t left = batch.query_start[s + 1] - row;
      for (int64_t head = 0; head < pages.num_heads; ++head)
        units.push_back({s, row, left < step ? left : step, batch.context_lens[s] - left, head});
    }
  const AttentionUnit* const all = units.data();
  const int64_t count = (int64_t)units.size(), most = num_threads() > 1 ? kPiecesPerThread * num_threads() : 1;
  const int64_t pieces = count < most ? count : most;
  const bool is_paired = dtype == kBfloat16 && kHasBfloat16Pairs;
  with_dtype(dtype, [&](auto tag) {
    typedef decltype(tag) D;
    parallel_for(pieces, [&](int64_t i) {
      const int64_t begin = count * i / pieces, end = count * (i + 1) / pieces;
      if (is_paired) return attend_bfloat16(problem, all + begin, end - begin);
      for (int64_t unit = begin; unit < end; ++unit) run_unit<D>(problem, all[unit]);
    });
    for (int64_t row = batch.query_start[batch.sequences]; row < rows; ++row)
      for (int64_t head = 0; head < q_heads; ++head)
        std::memset((typename D::T*)out.data + row * out.row_stride + head * out.head_stride, 0,
                    (size_t)pages.head_dim * sizeof(typename D::T));
  });
  return 0;
}

}  // namespace baton

BATON_EXPORT int64_t baton_paged_attention(int64_t dtype, int64_t rows, int64_t q_heads, BatonRows q, BatonPages pages,
                                           const int32_t* block_tables, int64_t table_stride, int64_t max_blocks,
                                           int64_t sequences, const int32_t* query_start, const int32_t* context_lens,
                                           float scale, int64_t window, BatonRows out) {
  using namespace baton;
  return guarded([&]() -> int64_t {
    const AttentionBatch batch{block_tables, table_stride, max_blocks, sequences, query_start, context_lens};
    return paged_attention(dtype, rows, q_heads, q, pages, batch, scale, window, out);
  });
}
