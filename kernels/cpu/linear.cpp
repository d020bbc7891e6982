// Linear layers over packed weights: panels are shared out between threads, tiles of rows pass over each.
//
// With few rows time goes into reading weights: one tile takes all rows and fetches the panel some lines ahead of
// itself. With more, several tiles pass over a panel, and fetch the next one into the second-level cache meanwhile.

#include "linear.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#include <utility>

#include "interface.h"
#include "linear_tile.h"
#include "pool.h"
#include "tile.h"

namespace baton {
namespace {

constexpr int64_t kBlockRows = 264;        // rows between two readings of the weights
constexpr int64_t kChunksPerThread = 8;    // panels are handed out in chunks
constexpr int64_t kSerialWork = 1 << 22;   // below this no other thread is woken
constexpr int64_t kRowsWorthOfReading = 12;
constexpr int64_t kFewRows = 4;
constexpr int64_t kNearBytes = 4096, kFarBytes = 8192;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Memory that a thread keeps from call to call, uninitialised.
template <int kPurpose>
void* scratch(size_t bytes) {
  struct Free {
    void operator()(void* p) const { ::operator delete(p, std::align_val_t(kLineBytes)); }
  };
  thread_local std::unique_ptr<void, Free> memory;
  thread_local size_t held = 0;
  if (bytes > held) {
    held = 0;
    memory.reset();
    memory.reset(::operator new(bytes, std::align_val_t(kLineBytes)));
    held = bytes;
  }
  return memory.get();
}

// One block of rows times one weight.
struct Job {
  const PackedLinear* weight;
  const void* x;  // as the arithmetic wants it
  int64_t ldx;
  void* y;
  int64_t ldy, m;
  int64_t panels, panels_per_chunk;
  std::atomic<int64_t> next_chunk{0};
};

template <class A, class D, int R>
void tile(const Job& job, int64_t panel, int64_t row, Ahead& ahead) {
  typedef typename D::T T;
  const int64_t pairs = divide_up(job.weight->k, 2);
  vf sums[R][kVectors] = {};
  accumulate<A, R>((const char*)job.weight->weight + panel * pairs * A::kPairBytes,
                   (const typename A::X*)job.x + row * job.ldx, job.ldx, pairs, ahead, sums);
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

typedef void (*TileFunction)(const Job&, int64_t, int64_t, Ahead&);

template <class A, class D, size_t... kIndex>
TileFunction tile_of(int64_t rows, std::index_sequence<kIndex...>) {
  static constexpr TileFunction functions[] = {tile<A, D, kIndex + 1>...};
  return functions[rows - 1];
}

// All rows of the job times one panel.
template <class A, class D>
void multiply_panel(const Job& job, int64_t panel, const char* next) {
  const int64_t tiles = divide_up(job.m, kRows);
  Ahead ahead{next, 0, 0};
  if (tiles == 1)
    ahead.distance = job.m <= kFewRows ? kNearBytes : kFarBytes;
  else if (next != nullptr)
    ahead.lines = divide_up(kUnroll * A::kPairBytes, kLineBytes * tiles);
  const char* const end = next + divide_up(job.weight->k, 2) * A::kPairBytes;
  for (int64_t i = 0, row = 0; i < tiles; ++i) {
    const int64_t last = job.m * (i + 1) / tiles;
    if (ahead.next >= end) ahead.lines = 0;
    tile_of<A, D>(last - row, std::make_index_sequence<kRows>())(job, panel, row, ahead);
    row = last;
  }
}

// Takes chunks until none is left. The next one is known before a chunk is begun, to be fetched meanwhile.
template <class A, class D>
void take_chunks(Job& job) {
  const int64_t panel_bytes = divide_up(job.weight->k, 2) * A::kPairBytes;
  int64_t begin = job.next_chunk.fetch_add(1, std::memory_order_relaxed) * job.panels_per_chunk;
  while (begin < job.panels) {
    const int64_t after = job.next_chunk.fetch_add(1, std::memory_order_relaxed) * job.panels_per_chunk;
    const int64_t end = std::min(begin + job.panels_per_chunk, job.panels);
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t next = panel + 1 < end ? panel + 1 : after;
      multiply_panel<A, D>(job, panel,
                           next < job.panels ? (const char*)job.weight->weight + next * panel_bytes : nullptr);
    }
    begin = after;
  }
}

// x as rows of X with an even number of elements; x itself where it is that already.
template <class A, class D>
const void* prepare(const Job& job, int64_t* ldx) {
  typedef typename D::T T;
  typedef typename A::X X;
  const T* x = (const T*)job.x;
  const int64_t k = job.weight->k, even = k + k % 2;
  if (std::is_same<T, X>::value && k == even) return x;
  X* to = (X*)scratch<0>((size_t)(job.m * even) * sizeof(X));
  for (int64_t row = 0; row < job.m; ++row, x += job.ldx, to += even) {
    if constexpr (std::is_same<T, X>::value)
      std::memcpy(to, x, (size_t)k * sizeof(X));
    else
      for_each_vector(k, [&](int64_t i, auto n) { store_up_to<Float32>(to + i, load_up_to<D>(x + i, n), n); });
    if (k != even) to[k] = 0;
  }
  *ldx = even;
  return to - job.m * even;
}

template <class A, class D>
void multiply(const PackedLinear& weight, const typename D::T* x, int64_t ldx, typename D::T* y, int64_t ldy,
              int64_t m) {
  const int64_t blocks = divide_up(m, kBlockRows);
  for (int64_t i = 0, row = 0; i < blocks; ++i) {
    const int64_t last = m * (i + 1) / blocks;
    Job job{&weight, x + row * ldx, ldx, y + row * ldy, ldy, last - row, divide_up(weight.n, kColumns), 1};
    job.x = prepare<A, D>(job, &job.ldx);
    const bool is_serial = weight.n * weight.k * (job.m + kRowsWorthOfReading) < kSerialWork;
    const int64_t threads = is_serial ? 1 : num_threads();
    job.panels_per_chunk = std::max<int64_t>(1, job.panels / (threads * kChunksPerThread));
    parallel_for(threads, [&job](int64_t) { take_chunks<A, D>(job); });
    row = last;
  }
}

template <class F>
void with_arithmetic(int64_t dtype, F f) {  // f(arithmetic, dtype)
  with_dtype(dtype, [&](auto tag) {
    typedef decltype(tag) D;
#if defined(__AVX512BF16__)
    if constexpr (kHasDot && std::is_same<D, Bfloat16>::value)
      f(Dot{}, tag);
    else
#endif
      f(Multiply<D>{}, tag);
  });
}

// Packs one panel. What stays together are pairs of bf16 and single elements of the others: a `Word`.
template <class D>
void pack_panel(const typename D::T* weight, int64_t ldw, int64_t rows, int64_t k, void* packed) {
  typedef typename D::T T;
  constexpr int64_t kWord = std::is_same<D, Bfloat16>::value ? 2 : 1;
  constexpr int64_t kBlock = 16;  // words: what is written meanwhile stays in the first-level cache
  struct Word {
    T element[kWord];
  };
  const int64_t words = divide_up(k, 2) * 2 / kWord;
  for (int64_t begin = 0; begin < words; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, words), whole = std::min(end, k / kWord);
    for (int64_t column = 0; column < kColumns; ++column) {
      const T* from = weight + column * ldw;
      Word* to = (Word*)packed + column;
      int64_t i = begin;
#if defined(__AVX2__)
      if (sizeof(Word) == 4 && column + 8 <= rows && whole == begin + kBlock) {
        for (; i < whole; i += 8) {
          __m256i square[8];
          for (int r = 0; r < 8; ++r) square[r] = _mm256_loadu_si256((const __m256i*)(from + r * ldw + i * kWord));
          transpose8(square);
          for (int r = 0; r < 8; ++r) _mm256_storeu_si256((__m256i*)(to + (i + r) * kColumns), square[r]);
        }
        column += 7;
        continue;
      }
#endif
      if (column < rows)
        for (; i < whole; ++i) std::memcpy(to + i * kColumns, from + i * kWord, sizeof(Word));
      for (; i < end; ++i) {
        Word rest = {};
        if (column < rows && i * kWord < k) rest.element[0] = from[i * kWord];
        to[i * kColumns] = rest;
      }
    }
  }
}

}  // namespace

void linear(const PackedLinear& weight, const void* x, int64_t ldx, void* y, int64_t ldy, int64_t m) {
  with_arithmetic(weight.dtype, [&](auto arithmetic, auto tag) {
    typedef decltype(tag) D;
    typedef typename D::T T;
    multiply<decltype(arithmetic), D>(weight, (const T*)x, ldx, (T*)y, ldy, m);
  });
}

}  // namespace baton

// Bytes that a weight [n, k] takes packed.
BATON_EXPORT int64_t baton_linear_packed_bytes(int64_t dtype, int64_t n, int64_t k) {
  using namespace baton;
  int64_t bytes = 0;
  with_arithmetic(dtype, [&](auto arithmetic, auto) {
    bytes = divide_up(n, kColumns) * divide_up(k, 2) * decltype(arithmetic)::kPairBytes;
  });
  return bytes;
}

// Packs rows of a weight [n, k], ldw elements apart, to `packed`.
BATON_EXPORT int64_t baton_linear_pack(int64_t dtype, int64_t n, int64_t k, const void* weight, int64_t ldw,
                                       void* packed) {
  using namespace baton;
  return guarded([&]() -> int64_t {
    with_dtype(dtype, [&](auto tag) {
      typedef decltype(tag) D;
      typedef typename D::T T;
      const int64_t panel_elements = divide_up(k, 2) * 2 * kColumns;
      parallel_rows(divide_up(n, kColumns), 1, [&](int64_t begin, int64_t end) {
        for (int64_t panel = begin; panel < end; ++panel)
          pack_panel<D>((const T*)weight + panel * kColumns * ldw, ldw, n - panel * kColumns, k,
                        (T*)packed + panel * panel_elements);
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
