// Linear layers over packed weights: panels are shared out between threads, tiles of rows pass over each.
//
// With few rows time goes into reading weights: one tile takes all rows and fetches the panel some lines ahead of
// itself. With more, several tiles pass over a panel, and fetch the next one into the second-level cache meanwhile.
// Integer weights become bf16 in registers where one or two tiles take all rows, and once per panel where there are
// more; processors without products of bf16 turn a panel into fp32 each time. The numbers are the same, and so are the sums.

#include "linear.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#include <utility>

#include "interface.h"
#include "linear_packing.h"
#include "linear_tile.h"
#include "pool.h"

namespace baton {
namespace {

constexpr int64_t kBlockRows = 264;       // rows between two readings of the weights
constexpr int64_t kChunksPerThread = 8;   // panels are handed out in chunks
constexpr int64_t kSerialWork = 1 << 22;  // below this no other thread is woken
constexpr int64_t kRowsWorthOfReading = 12;
constexpr int64_t kFewRows = 4;
constexpr int64_t kDirectTiles = 2;  // up to so many, looking integers up in registers each time is the faster way
constexpr int64_t kNearBytes = 4096, kFarBytes = 8192;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Memory that a thread keeps from call to call, uninitialised.
template <int kPurpose>
void* scratch(int64_t bytes) {
  struct Free {
    void operator()(void* p) const { ::operator delete(p, std::align_val_t(kLineBytes)); }
  };
  thread_local std::unique_ptr<void, Free> memory;
  thread_local int64_t held = 0;
  if (bytes > held) {
    held = 0;
    memory.reset();
    memory.reset(::operator new((size_t)bytes, std::align_val_t(kLineBytes)));
    held = bytes;
  }
  return memory.get();
}

int64_t padded_k(WeightFormat format, int64_t k) {
  return round_up(k, format == WeightFormat::kDense ? 2 : kIntegerStep);
}

int64_t packed_panel_bytes(int64_t dtype, WeightFormat format, int64_t k) {
  const int64_t elements = padded_k(format, k) * kColumns;
  if (format == WeightFormat::kInt8) return elements;
  if (format == WeightFormat::kInt4) return elements / 2;
  return elements * (dtype == kFloat32 ? 4 : 2);
}

// One block of rows times one weight.
struct Job {
  const PackedLinear* weight;
  const void* x;  // as the arithmetic wants it
  int64_t ldx;
  void* y;
  int64_t ldy, m;
  int64_t pairs, group_pairs;  // of K with its padding, and of a group
  int64_t panels, panels_per_chunk, panel_bytes;
  void (*expand)(const char* packed, int64_t pairs, void* to);  // null where the arithmetic reads packed weights
  int64_t expanded_bytes;                                       // of a panel
  std::atomic<int64_t> next_chunk{0};
};

template <class A, class D, bool kHasGroups, int R>
void tile(const Job& job, const char* weights, int64_t panel, int64_t row, Ahead& ahead) {
  typedef typename D::T T;
  const typename A::X* x = (const typename A::X*)job.x + row * job.ldx;
  vf sums[R][kVectors] = {};
  if constexpr (kHasGroups) {
    const int64_t groups = divide_up(job.pairs, job.group_pairs);
    const uint16_t* scales = (const uint16_t*)job.weight->scales + panel * groups * kColumns;
    float totals[R][kVectors][kWidth] = {};
    for (int64_t pair = 0; pair < job.pairs; pair += job.group_pairs, scales += kColumns) {
      // Totals stay in memory, as registers are for the sums.
      asm volatile("" : : "r"(totals) : "memory");
      const int64_t pairs = std::min(job.group_pairs, job.pairs - pair);
      vf group_sums[R][kVectors] = {};
      accumulate<A, R>(weights + pair / A::kStepPairs * A::kStepBytes, x + 2 * pair, job.ldx, pairs / A::kStepPairs,
                       ahead, group_sums);
      for (int v = 0; v < kVectors; ++v) {
        const vf scale = Bfloat16::load(scales + v * kWidth);
        for (int r = 0; r < R; ++r) store(totals[r][v], fma(group_sums[r][v], scale, load(totals[r][v])));
      }
    }
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < kVectors; ++v) sums[r][v] = load(totals[r][v]);
  } else {
    accumulate<A, R>(weights, x, job.ldx, job.pairs / A::kStepPairs, ahead, sums);
  }
  for (int v = 0; v < kVectors; ++v) {
    const int64_t column = panel * kColumns + v * kWidth;
    const int64_t n = std::min<int64_t>(kWidth, job.weight->n - column);
    if (n <= 0) return;
    vf bias = {};
    if (job.weight->bias != nullptr) bias = load_up_to<D>((const T*)job.weight->bias + column, n);
    for (int r = 0; r < R; ++r) {
      T* y = (T*)job.y + (row + r) * job.ldy + column;
      if (n == kWidth)
        A::template store<D>(y, sums[r][v] + bias);
      else
        store_some<D>(y, sums[r][v] + bias, n);
    }
  }
}

typedef void (*TileFunction)(const Job&, const char*, int64_t, int64_t, Ahead&);

template <class A, class D, bool kHasGroups, size_t... kIndex>
TileFunction tile_of(int64_t rows, std::index_sequence<kIndex...>) {
  static constexpr TileFunction functions[] = {tile<A, D, kHasGroups, kIndex + 1>...};
  return functions[rows - 1];
}

// All rows of the job times one panel; `next` is the packed panel to be fetched meanwhile, or null.
template <class A, class D, bool kHasGroups>
void multiply_panel(const Job& job, int64_t panel, const char* next) {
  const char* weights = (const char*)job.weight->weight + panel * job.panel_bytes;
  const int64_t tiles = divide_up(job.m, kRows);
  Ahead ahead{next, 0, 0};
  if (job.expand != nullptr) {
    void* expanded = scratch<1>(job.expanded_bytes);
    job.expand(weights, job.pairs, expanded);
    weights = (const char*)expanded;
  } else if (tiles == 1) {
    ahead.distance = job.m <= kFewRows ? kNearBytes : kFarBytes;
  }
  if (next != nullptr) ahead.lines = divide_up(job.panel_bytes * kUnrollPairs, job.pairs * tiles * kLineBytes);
  const char* const end = next + job.panel_bytes;
  for (int64_t i = 0, row = 0; i < tiles; ++i) {
    const int64_t last = job.m * (i + 1) / tiles;
    if (ahead.next >= end) ahead.lines = 0;
    tile_of<A, D, kHasGroups>(last - row, std::make_index_sequence<kRows>())(job, weights, panel, row, ahead);
    row = last;
  }
}

// Takes chunks until none is left. The next one is known before a chunk is begun, to be fetched meanwhile.
template <class A, class D, bool kHasGroups>
void take_chunks(Job& job) {
  int64_t begin = job.next_chunk.fetch_add(1, std::memory_order_relaxed) * job.panels_per_chunk;
  while (begin < job.panels) {
    const int64_t after =
        may_go_on() ? job.next_chunk.fetch_add(1, std::memory_order_relaxed) * job.panels_per_chunk : job.panels;
    const int64_t end = std::min(begin + job.panels_per_chunk, job.panels);
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t next = panel + 1 < end ? panel + 1 : after;
      multiply_panel<A, D, kHasGroups>(
          job, panel, next < job.panels ? (const char*)job.weight->weight + next * job.panel_bytes : nullptr);
    }
    begin = after;
  }
}

// x as rows of X with zeros up to the padded K; x itself where it is that already.
template <class A, class D>
void prepare(Job& job) {
  typedef typename D::T T;
  typedef typename A::X X;
  const T* x = (const T*)job.x;
  const int64_t k = job.weight->k, padded = 2 * job.pairs;
  if (std::is_same<T, X>::value && k == padded) return;
  X* to = (X*)scratch<0>(job.m * padded * (int64_t)sizeof(X));
  job.x = to;
  for (int64_t row = 0; row < job.m; ++row, x += job.ldx, to += padded) {
    if constexpr (std::is_same<T, X>::value)
      std::memcpy(to, x, (size_t)k * sizeof(X));
    else
      for_each_vector(k, [&](int64_t i, auto n) { store_up_to<Float32>(to + i, load_up_to<D>(x + i, n), n); });
    std::fill(to + k, to + padded, X(0));
  }
  job.ldx = padded;
}

template <class A, class D, bool kHasGroups>
void run(Job& job) {
  prepare<A, D>(job);
  const PackedLinear& weight = *job.weight;
  const bool is_serial = weight.n * weight.k * (job.m + kRowsWorthOfReading) < kSerialWork;
  const int64_t threads = is_serial ? 1 : num_threads();
  job.expanded_bytes = job.pairs / A::kStepPairs * A::kStepBytes;
  job.panels_per_chunk = std::max<int64_t>(1, job.panels / (threads * kChunksPerThread));
  parallel_for(threads, [&job](int64_t) { take_chunks<A, D, kHasGroups>(job); });
}

// Chooses how the job's weights are read.
template <class D>
void run_as(Job& job) {
  const WeightFormat format = job.weight->format;
#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
  if constexpr (std::is_same<D, Bfloat16>::value) {
    const bool is_int4 = format == WeightFormat::kInt4;
    if (format == WeightFormat::kDense) return run<Dot<DenseWeights>, D, false>(job);
    if (job.m <= kDirectTiles * kRows && is_int4) return run<Dot<Int4Weights>, D, true>(job);
    if (job.m <= kDirectTiles * kRows) return run<Dot<Int8Weights>, D, true>(job);
    job.expand = is_int4 ? expand_to_bf16<Int4Weights> : expand_to_bf16<Int8Weights>;
    return run<Dot<DenseWeights>, D, true>(job);
  }
#endif
  if (format == WeightFormat::kDense) return run<Multiply<D>, D, false>(job);
  job.expand = format == WeightFormat::kInt4 ? expand_int4 : expand_int8;
  run<Multiply<Float32>, D, true>(job);
}

}  // namespace

void linear(const PackedLinear& weight, const void* x, int64_t ldx, void* y, int64_t ldy, int64_t m) {
  with_dtype(weight.dtype, [&](auto tag) {
    typedef decltype(tag) D;
    typedef typename D::T T;
    const int64_t blocks = divide_up(m, kBlockRows);
    for (int64_t i = 0, row = 0; i < blocks; ++i) {
      const int64_t last = m * (i + 1) / blocks;
      Job job;
      job.weight = &weight;
      job.x = (const T*)x + row * ldx, job.ldx = ldx;
      job.y = (T*)y + row * ldy, job.ldy = ldy;
      job.m = last - row;
      job.pairs = padded_k(weight.format, weight.k) / 2, job.group_pairs = weight.group / 2;
      job.panels = divide_up(weight.n, kColumns);
      job.panel_bytes = packed_panel_bytes(weight.dtype, weight.format, weight.k);
      job.expand = nullptr;
      run_as<D>(job);
      row = last;
    }
  });
}

}  // namespace baton

// Bytes that a weight [n, k] takes packed.
BATON_EXPORT int64_t baton_linear_packed_bytes(int64_t dtype, int64_t format, int64_t n, int64_t k) {
  using namespace baton;
  return divide_up(n, kColumns) * packed_panel_bytes(dtype, (WeightFormat)format, k);
}

// Columns of a panel: scales are bf16 [panel][group][column].
BATON_EXPORT int64_t baton_linear_panel_columns() { return baton::kColumns; }

// Packs rows of a weight [n, k], ldw elements apart, to `packed`, which is all zeros. Integer weights come as int8.
BATON_EXPORT int64_t baton_linear_pack(int64_t dtype, int64_t format, int64_t n, int64_t k, const void* weight,
                                       int64_t ldw, void* packed) {
  using namespace baton;
  return guarded([&]() -> int64_t {
    const int64_t panel_bytes = packed_panel_bytes(dtype, (WeightFormat)format, k);
    with_dtype(dtype, [&](auto tag) {
      typedef decltype(tag) D;
      typedef typename D::T T;
      constexpr bool kForDot = kHasDot && std::is_same<D, Bfloat16>::value;
      parallel_rows(divide_up(n, kColumns), 1, [&](int64_t begin, int64_t end) {
        for (int64_t panel = begin; panel < end; ++panel) {
          const int64_t row = panel * kColumns;
          uint8_t* to = (uint8_t*)packed + panel * panel_bytes;
          if ((WeightFormat)format == WeightFormat::kDense)
            pack_dense<D>((const T*)weight + row * ldw, ldw, n - row, k, to);
          else
            pack_integers<kForDot>((const int8_t*)weight + row * ldw, ldw, n - row, k,
                                   (WeightFormat)format == WeightFormat::kInt4, to);
        }
      });
    });
    return 0;
  });
}

BATON_EXPORT int64_t baton_linear(const baton::PackedLinear* weight, const void* x, int64_t ldx, void* y, int64_t ldy,
                                  int64_t m) {
  return baton::guarded([&]() -> int64_t {
    baton::linear(*weight, x, ldx, y, ldy, m);
    return 0;
  });
}
