// Paged attention of bf16 pages by the processor's products of bf16 pairs (AVX512-BF16): sums in fp32.
//
// The order of a row's arithmetic, the same for any company of rows, block size and chunk; tiles of kTile keys are
// aligned to absolute positions and met first to last:
//   score = (sum over pairs of d in order of q[d] * k[d]) * scale       lanes are keys
//   m' = max(m, tile max), p = bf16(2^(score - m')), c = 2^(m - m')
//   l = l * c + sum of p                  o = o * c + sum over pairs of keys in order of p * v      lanes are dimensions
// Keys hidden from a row get p = 0, and where one shares a pair with a visible key its value is masked away.
//
// Lines of the next tile are asked for while this one is computed, also across units: pages lie scattered in the pool,
// so the hardware does not foresee them.

#include "attention.h"

#include "dtype.h"

#if !defined(__AVX512BF16__)

namespace baton {
void attend_bfloat16(const AttentionProblem&, const AttentionUnit*, int64_t) {}
}  // namespace baton

#else

#include <limits>

namespace baton {
namespace {

constexpr int kKeys = 64;                // keys per tile
constexpr int kKeyVectors = kKeys / 16;  // also groups of keys that lie in one page
constexpr int kPairs = kKeys / 2;
constexpr int kRowBlock = 4;  // rows per register block
constexpr int64_t kLine = 64, kLinesPerStep = 2;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct alignas(64) RowState {
  float sums[16];  // of p, by lane
  float top;       // running maximum
  int64_t first, position;  // the keys that the row sees, both included
};

struct Buffers {  // one per thread; grows
  std::vector<char> bytes;
  char* at;
  template <class T>
  T* take(int64_t count) {
    T* found = (T*)at;
    at += ((size_t)count * sizeof(T) + 63) / 64 * 64;
    return found;
  }
};

struct Tile {               // where a tile's keys lie; values come pair_stride after them
  const uint16_t* group[kKeyVectors];  // 16 keys each, token_stride apart; null: keys nobody sees, or in several pages
  int64_t base, first, last;           // position of key 0; keys that some row of the unit sees
};

// Asks for the lines of the next tile, a few at each step of the work on this one: a processor core has only so many
// lines under way, so they must be spread out.
struct Ahead {
  const char *line, *end;                 // of the run of lines that is asked for now
  const char *const *run, *const *last;   // starts of those to come, keys before values
  const char* const* values;
  int64_t bytes;                          // of each

  inline void ask(int64_t lines) {
    for (; lines > 0; --lines) {
      if (line == end) {
        if (run == last) return;
        line = *run++;
        end = line + bytes;
      }
      // Values are needed later, and slabs of 2^n bytes compete for the same places of the first-level cache.
      if (run > values)
        __builtin_prefetch(line, 0, 2);
      else
        __builtin_prefetch(line);
      line += kLine;
    }
  }
};

struct Shape {
  int64_t dim;
  int64_t words;    // pairs of dimensions, a multiple of 4
  int64_t columns;  // vectors of o, two for 32 dimensions
};

inline __m512i load_words(const uint32_t* p) { return _mm512_load_si512(p); }
inline __m512 multiply_pairs(__m512 sum, __m512i a, __m512i b) {
  return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}

// 2^x to bf16's accuracy with room to spare (relative error 2e-7 times 2^x's own rounding); 0 for -inf, NaN for NaN.
inline __m512 exp2_short(__m512 x) {
  const __m512 bounded = _mm512_max_ps(_mm512_set1_ps(-200.0f), x);  // of max(a, NaN) the result is NaN
  const __m512 whole = _mm512_roundscale_ps(bounded, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_sub_ps(bounded, whole);
  __m512 p = _mm512_set1_ps(0.0013400428177711937f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.00961805667843204f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.05550327226669895f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.24022650922289554f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.6931472067028329f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, whole);
}

// keys[word][kKeys] of 16 keys at `column`, from rows `stride` elements apart.
inline void transpose_group(const uint16_t* rows, int64_t stride, int64_t words, uint32_t* keys, Ahead& ahead) {
  Ahead own = ahead;
  const uint16_t *row0 = rows, *row4 = rows + 4 * stride, *row8 = rows + 8 * stride, *row12 = rows + 12 * stride;
  for (int64_t word = 0; word < words; word += 4) {
    __m512i piece[4];
    for (int i = 0; i < 4; ++i) {
      const int64_t at = i * stride + 2 * word;
      __m512i v = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i*)(row0 + at)));
      v = _mm512_mask_broadcast_i32x4(v, 0x00f0, _mm_loadu_si128((const __m128i*)(row4 + at)));
      v = _mm512_mask_broadcast_i32x4(v, 0x0f00, _mm_loadu_si128((const __m128i*)(row8 + at)));
      piece[i] = _mm512_mask_broadcast_i32x4(v, 0xf000, _mm_loadu_si128((const __m128i*)(row12 + at)));
    }
    const __m512i low01 = _mm512_unpacklo_epi32(piece[0], piece[1]), high01 = _mm512_unpackhi_epi32(piece[0], piece[1]);
    const __m512i low23 = _mm512_unpacklo_epi32(piece[2], piece[3]), high23 = _mm512_unpackhi_epi32(piece[2], piece[3]);
    uint32_t* to = keys + word * kKeys;
    _mm512_store_si512(to, _mm512_unpacklo_epi64(low01, low23));
    _mm512_store_si512(to + kKeys, _mm512_unpackhi_epi64(low01, low23));
    _mm512_store_si512(to + 2 * kKeys, _mm512_unpacklo_epi64(high01, high23));
    _mm512_store_si512(to + 3 * kKeys, _mm512_unpackhi_epi64(high01, high23));
    own.ask(kLinesPerStep);
  }
  ahead = own;
}

// values[8][columns * 16] of 16 keys, two by two; rows outside [first, last) count as zeros. Lanes: see put_row.
inline void interleave_group(const uint16_t* rows, int64_t stride, int64_t dim, int first, int last, uint32_t* values,
                             int64_t columns, int64_t lines, Ahead& ahead) {
  Ahead own = ahead;
  for (int key = 0; key < 16; key += 2, values += columns * 16) {
    const uint16_t *even = rows + key * stride, *odd = even + stride;
    const bool has_even = key >= first && key < last, has_odd = key + 1 >= first && key + 1 < last;
    int64_t d = 0;
    if (has_even && has_odd)
      for (; d + 32 <= dim; d += 32) {
        const __m512i a = _mm512_loadu_si512(even + d), b = _mm512_loadu_si512(odd + d);
        _mm512_store_si512(values + d, _mm512_unpacklo_epi16(a, b));
        _mm512_store_si512(values + d + 16, _mm512_unpackhi_epi16(a, b));
      }
    for (; d < dim; d += 32) {
      const __mmask32 mask = dim - d < 32 ? (__mmask32)((1u << (dim - d)) - 1) : (__mmask32)~0u;
      const __m512i a = has_even ? _mm512_maskz_loadu_epi16(mask, even + d) : _mm512_setzero_si512();
      const __m512i b = has_odd ? _mm512_maskz_loadu_epi16(mask, odd + d) : _mm512_setzero_si512();
      _mm512_store_si512(values + d, _mm512_unpacklo_epi16(a, b));
      _mm512_store_si512(values + d + 16, _mm512_unpackhi_epi16(a, b));
    }
    own.ask(lines);
  }
  ahead = own;
}

// scores[R][kKeys] = q[R] . keys * scale for the first V vectors of keys.
template <int R, int V>
void score_rows(const uint32_t* q, int64_t words, const uint32_t* keys, float scale, float* scores,
                Ahead& ahead) {
  Ahead own = ahead;
  __m512 sum[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) sum[r][v] = _mm512_setzero_ps();
  for (int64_t w = 0; w < words; ++w) {
    __m512i key[V];
    for (int v = 0; v < V; ++v) key[v] = load_words(keys + w * kKeys + 16 * v);
    for (int r = 0; r < R; ++r) {
      const __m512i x = _mm512_set1_epi32((int)q[r * words + w]);
      for (int v = 0; v < V; ++v) sum[r][v] = multiply_pairs(sum[r][v], x, key[v]);
    }
    own.ask(kLinesPerStep);
  }
  ahead = own;
  const __m512 factor = _mm512_set1_ps(scale);
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) _mm512_store_ps(scores + r * kKeys + 16 * v, _mm512_mul_ps(sum[r][v], factor));
}

// p[kPairs] of a row whose keys [low, high) of the tile are visible; returns the factor of what was before.
inline float soften_row(RowState& row, float* scores, int low, int high, int vectors, uint32_t* p) {
  __m512 x[kKeyVectors];
  const uint64_t seen = (high == 64 ? ~0ull : (1ull << high) - 1) & (~0ull << low);
  const __m512 hidden = _mm512_set1_ps(-kInfinity);
  for (int v = 0; v < kKeyVectors; ++v)
    x[v] = v < vectors ? _mm512_mask_mov_ps(hidden, (__mmask16)(seen >> (16 * v)), _mm512_load_ps(scores + 16 * v))
                       : hidden;
  const float tile_top =
      _mm512_reduce_max_ps(_mm512_max_ps(_mm512_max_ps(x[0], x[1]), _mm512_max_ps(x[2], x[3])));
  const float new_top = tile_top > row.top ? tile_top : row.top;
  const float base = new_top == -kInfinity ? 0.0f : new_top;
  const __m512 shift = _mm512_set1_ps(base);
  for (int v = 0; v < kKeyVectors; ++v) x[v] = exp2_short(_mm512_sub_ps(x[v], shift));
  const __m512i first = (__m512i)_mm512_cvtne2ps_pbh(x[1], x[0]), second = (__m512i)_mm512_cvtne2ps_pbh(x[3], x[2]);
  _mm512_store_si512(p, first);
  _mm512_store_si512(p + 16, second);
  const __m512 factor = exp2_short(_mm512_set1_ps(row.top - base));
  const __m512i ones = _mm512_set1_epi32(0x3f803f80);
  __m512 sum = _mm512_mul_ps(_mm512_load_ps(row.sums), factor);
  sum = multiply_pairs(sum, first, ones);
  sum = multiply_pairs(sum, second, ones);
  _mm512_store_ps(row.sums, sum);
  row.top = new_top;
  return _mm512_cvtss_f32(factor);
}

// o[R][columns] = o * factor + p[R] . values over keys [low, high), vectors [column, column + C).
template <int R, int C>
void mix_columns(float* o, const float* factor, const uint32_t* p, const uint32_t* values, int low, int high,
                 int64_t columns, int64_t column, Ahead& ahead) {
  Ahead own = ahead;
  __m512 sum[R][C];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c)
      sum[r][c] = _mm512_mul_ps(_mm512_load_ps(o + (r * columns + column + c) * 16), _mm512_set1_ps(factor[r]));
  const auto add = [&](int pair, __m512i keep) {
    __m512i value[C];
    for (int c = 0; c < C; ++c)
      value[c] = _mm512_and_si512(load_words(values + (pair * columns + column + c) * 16), keep);
    for (int r = 0; r < R; ++r) {
      const __m512i weight = _mm512_set1_epi32((int)p[r * kPairs + pair]);
      for (int c = 0; c < C; ++c) sum[r][c] = multiply_pairs(sum[r][c], weight, value[c]);
    }
  };
  int pair = low / 2;
  const int whole = high / 2;
  if (low & 1) add(pair++, _mm512_set1_epi32((int)0xffff0000));
  for (; pair < whole; ++pair) {
    __m512i value[C];
    for (int c = 0; c < C; ++c) value[c] = load_words(values + (pair * columns + column + c) * 16);
    for (int r = 0; r < R; ++r) {
      const __m512i weight = _mm512_set1_epi32((int)p[r * kPairs + pair]);
      for (int c = 0; c < C; ++c) sum[r][c] = multiply_pairs(sum[r][c], weight, value[c]);
    }
    own.ask(kLinesPerStep);
  }
  ahead = own;
  if ((high & 1) && pair * 2 < high) add(pair, _mm512_set1_epi32(0x0000ffff));
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) _mm512_store_ps(o + (r * columns + column + c) * 16, sum[r][c]);
}

// One tile for R rows that see its keys [low, high).
template <int R, class F>
void attend_rows(const Shape& shape, const uint32_t* q, const uint32_t* keys, const uint32_t* values, float scale,
                 int low, int high, RowState* rows, float* o, Ahead& ahead,
                 const F& before_mixing) {
  alignas(64) float scores[R * kKeys];
  alignas(64) uint32_t p[R * kPairs];
  float factor[R];
  const int vectors = (high + 15) / 16;
  if (vectors == 4)
    score_rows<R, 4>(q, shape.words, keys, scale, scores, ahead);
  else if (vectors == 3)
    score_rows<R, 3>(q, shape.words, keys, scale, scores, ahead);
  else if (vectors == 2)
    score_rows<R, 2>(q, shape.words, keys, scale, scores, ahead);
  else
    score_rows<R, 1>(q, shape.words, keys, scale, scores, ahead);
  for (int r = 0; r < R; ++r)
    factor[r] = soften_row(rows[r], scores + r * kKeys, low, high, vectors, p + r * kPairs);
  before_mixing();
  int64_t column = 0;
  for (; column + 4 <= shape.columns; column += 4)
    mix_columns<R, 4>(o, factor, p, values, low, high, shape.columns, column, ahead);
  if (column < shape.columns)
    mix_columns<R, 2>(o, factor, p, values, low, high, shape.columns, column, ahead);
}

// o times factor to `to`, in the order of dimensions.
inline void put_row(const float* o, __m512 factor, int64_t dim, uint16_t* to) {
  const __m512i lower = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i upper = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
  for (int64_t d = 0; d < dim; d += 32) {
    const __m512 low = _mm512_load_ps(o + d), high = _mm512_load_ps(o + d + 16);
    const vf first = (vf)_mm512_mul_ps(_mm512_permutex2var_ps(low, lower, high), factor);
    const vf second = (vf)_mm512_mul_ps(_mm512_permutex2var_ps(low, upper, high), factor);
    const int64_t left = dim - d;
    store_up_to<Bfloat16>(to + d, first, left < 16 ? left : 16);
    if (left > 16) store_up_to<Bfloat16>(to + d + 16, second, left < 32 ? left - 16 : 16);
  }
}

class UnitRunner {
 public:
  UnitRunner(const AttentionProblem& problem, int64_t most_rows) : problem_(problem) {
    const int64_t dim = problem.pages.head_dim;
    shape_ = {dim, (dim + 7) / 8 * 4, (dim + 31) / 32 * 2};
    in_pages_ = dim % 8 == 0 && problem.pages.block_size % 16 == 0;
    ahead_ = in_pages_ && problem.pages.token_stride == dim;
    thread_local Buffers buffers;
    const size_t needed = (size_t)(most_rows * (shape_.words * 4 + shape_.columns * 64 + (int64_t)sizeof(RowState)) +
                                   shape_.words * kKeys * 4 + kPairs * shape_.columns * 64 + 32 * shape_.words * 2 +
                                   64 * 16);
    if (buffers.bytes.size() < needed) buffers.bytes.resize(needed);
    buffers.at = (char*)(((uintptr_t)buffers.bytes.data() + 63) / 64 * 64);
    q_ = buffers.take<uint32_t>(most_rows * shape_.words);
    o_ = buffers.take<float>(most_rows * shape_.columns * 16);
    rows_ = buffers.take<RowState>(most_rows);
    keys_ = buffers.take<uint32_t>(shape_.words * kKeys);
    values_ = buffers.take<uint32_t>(kPairs * shape_.columns * 16);
    staged_ = buffers.take<uint16_t>(16 * shape_.words * 2);
  }

  void run(const AttentionUnit& unit, const AttentionUnit* next_unit) {
    const int64_t group = problem_.group, rows = unit.num_rows * group;
    take_rows(unit, rows);
    const int64_t begin = problem_.first_visible(unit.first_position), end = unit.first_position + unit.num_rows;
    Tile tile;
    locate(unit, begin / kKeys * kKeys, tile);
    for (;;) {
      const bool is_last = tile.base + kKeys >= end;
      Tile next;
      bool has_next = ahead_;
      if (!is_last)
        locate(unit, tile.base + kKeys, next);
      else if (next_unit != nullptr)
        locate(*next_unit, problem_.first_visible(next_unit->first_position) / kKeys * kKeys, next);
      else
        has_next = false;
      const char* runs[2 * kKeyVectors];
      int num_runs = 0, num_keys = 0;
      for (int pair = 0; pair < 2 && has_next; ++pair) {
        num_keys = num_runs;
        for (int g = 0; g < kKeyVectors; ++g)
          if (next.group[g] != nullptr)
            runs[num_runs++] = (const char*)(next.group[g] + pair * problem_.pages.pair_stride);
      }
      Ahead ahead{nullptr, nullptr, runs, runs + num_runs, runs + num_keys, shape_.words * kLine};
      stage_keys(unit, tile, ahead);
      attend(unit, tile, rows, ahead);
      if (is_last) break;
      tile = next;
    }
    for (int64_t row = 0; row < rows; ++row) {
      const __m512 factor = _mm512_set1_ps(1.0f / sum_lanes(load(rows_[row].sums)));
      put_row(o_ + row * shape_.columns * 16, factor, shape_.dim, address(problem_.out, unit, row));
    }
  }

 private:
  uint16_t* address(const BatonRows& where, const AttentionUnit& unit, int64_t row) const {
    const int64_t group = problem_.group;
    return (uint16_t*)where.data + (unit.first_row + row / group) * where.row_stride +
           (unit.kv_head * group + row % group) * where.head_stride;
  }

  void take_rows(const AttentionUnit& unit, int64_t rows) {
    for (int64_t row = 0; row < rows; ++row) {
      uint16_t* to = (uint16_t*)(q_ + row * shape_.words);
      std::memcpy(to, address(problem_.q, unit, row), (size_t)shape_.dim * 2);
      for (int64_t d = shape_.dim; d < 2 * shape_.words; ++d) to[d] = 0;
      RowState& state = rows_[row];
      _mm512_store_ps(state.sums, _mm512_setzero_ps());
      state.top = -kInfinity;
      state.position = unit.first_position + row / problem_.group;
      state.first = problem_.first_visible(state.position);
    }
    std::memset(o_, 0, (size_t)(rows * shape_.columns) * 64);
  }

  const uint16_t* key_row(const AttentionUnit& unit, int64_t position) const {
    const BatonPages& pages = problem_.pages;
    const int32_t* table = problem_.block_tables + unit.sequence * problem_.table_stride;
    return (const uint16_t*)pages.data + unit.kv_head * pages.head_stride +
           table[position / pages.block_size] * pages.block_stride + position % pages.block_size * pages.token_stride;
  }

  void locate(const AttentionUnit& unit, int64_t base, Tile& tile) const {
    const int64_t begin = problem_.first_visible(unit.first_position), end = unit.first_position + unit.num_rows;
    tile.base = base;
    tile.first = begin > base ? begin : base;
    tile.last = end < base + kKeys ? end : base + kKeys;
    for (int g = 0; g < kKeyVectors; ++g) {
      const int64_t at = base + 16 * g;
      tile.group[g] = in_pages_ && at < tile.last && at + 16 > tile.first ? key_row(unit, at) : nullptr;
    }
  }

  // Calls f(group, first, last) of a tile's groups: keys [first, last) are seen by some row.
  template <class F>
  void for_each_group(const Tile& tile, F f) const {
    for (int g = 0; g < kKeyVectors; ++g) {
      const int64_t at = tile.base + 16 * g, end = at + 16;
      f(g, at > tile.first ? at : tile.first, end < tile.last ? end : tile.last);
    }
  }

  void stage_keys(const AttentionUnit& unit, const Tile& tile, Ahead& ahead) {
    for_each_group(tile, [&](int g, int64_t first, int64_t last) {
      // Scores of keys that nobody sees are masked, whatever they are.
      if (first >= last) return;
      const uint16_t* rows = tile.group[g];
      int64_t stride = problem_.pages.token_stride;
      if (rows == nullptr) {
        rows = copy_rows(unit, first, last, 0);
        stride = 2 * shape_.words;
      }
      transpose_group(rows, stride, shape_.words, keys_ + 16 * g, ahead);
    });
  }

  void stage_values(const AttentionUnit& unit, const Tile& tile, Ahead& ahead) {
    for_each_group(tile, [&](int g, int64_t first, int64_t last) {
      uint32_t* to = values_ + 8 * g * shape_.columns * 16;
      // Hidden values count as zeros: memory that nobody wrote must not bring NaN into 0 * NaN.
      if (first >= last) {
        std::memset(to, 0, (size_t)(8 * shape_.columns) * 64);
        return;
      }
      const int64_t pair_stride = problem_.pages.pair_stride;
      const uint16_t* rows = tile.group[g] + pair_stride;
      int64_t stride = problem_.pages.token_stride;
      if (tile.group[g] == nullptr) {
        rows = copy_rows(unit, first, last, pair_stride);
        stride = 2 * shape_.words;
      }
      const int64_t at = tile.base + 16 * g;
      interleave_group(rows, stride, shape_.dim, (int)(first - at), (int)(last - at), to, shape_.columns,
                       (shape_.words + 15) / 16, ahead);
    });
  }

  // Rows [first, last) of a group whose keys do not lie in one page, each after its zeros, at their place among 16.
  const uint16_t* copy_rows(const AttentionUnit& unit, int64_t first, int64_t last, int64_t offset) {
    const int64_t stride = 2 * shape_.words;
    std::memset(staged_, 0, (size_t)(16 * stride) * 2);
    for (int64_t i = first; i < last; ++i)
      std::memcpy(staged_ + i % 16 * stride, key_row(unit, i) + offset, (size_t)shape_.dim * 2);
    return staged_;
  }

  void attend(const AttentionUnit& unit, const Tile& tile, int64_t rows, Ahead& ahead) {
    const auto visible = [&](int64_t row, int& low, int& high) {
      const int64_t from = rows_[row].first - tile.base, to = rows_[row].position + 1 - tile.base;
      low = (int)(from < 0 ? 0 : from > kKeys ? kKeys : from);
      high = (int)(to < 0 ? 0 : to > kKeys ? kKeys : to);
    };
    bool is_staged = false;
    const auto before_mixing = [&]() {
      if (!is_staged) stage_values(unit, tile, ahead);
      is_staged = true;
    };
    for (int64_t row = 0; row < rows;) {
      int low, high, other_low, other_high;
      visible(row, low, high);
      int64_t count = 1;
      for (; count < kRowBlock && row + count < rows; ++count) {
        visible(row + count, other_low, other_high);
        if (other_low != low || other_high != high) break;
      }
      if (low < high) {
        const uint32_t* q = q_ + row * shape_.words;
        float* o = o_ + row * shape_.columns * 16;
        RowState* states = rows_ + row;
        const float scale = problem_.scale;
        if (count == 4)
          attend_rows<4>(shape_, q, keys_, values_, scale, low, high, states, o, ahead, before_mixing);
        else if (count == 3)
          attend_rows<3>(shape_, q, keys_, values_, scale, low, high, states, o, ahead, before_mixing);
        else if (count == 2)
          attend_rows<2>(shape_, q, keys_, values_, scale, low, high, states, o, ahead, before_mixing);
        else
          attend_rows<1>(shape_, q, keys_, values_, scale, low, high, states, o, ahead, before_mixing);
      }
      row += count;
    }
  }

  const AttentionProblem& problem_;
  Shape shape_;
  bool in_pages_, ahead_;
  uint32_t *q_, *keys_, *values_;
  float* o_;
  RowState* rows_;
  uint16_t* staged_;
};

}  // namespace

void attend_bfloat16(const AttentionProblem& problem, const AttentionUnit* units, int64_t count) {
  int64_t most_rows = 0;
  for (int64_t i = 0; i < count; ++i) most_rows = units[i].num_rows > most_rows ? units[i].num_rows : most_rows;
  UnitRunner runner(problem, most_rows * problem.group);
  for (int64_t i = 0; i < count; ++i) runner.run(units[i], i + 1 < count ? &units[i + 1] : nullptr);
}

}  // namespace baton

#endif
