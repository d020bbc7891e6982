#include "cores.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include <atomic>

#include "interface.h"

namespace baton {
namespace cores {
namespace {

constexpr uint64_t kMagic = 0x31736572'6f634e42;  // "BNcores1"
constexpr int64_t kDeadNs = 2'000'000'000;
constexpr int64_t kRestNs = 500'000;       // an owner that pauses for less is not idle
constexpr int64_t kClearNs = 1'000'000;    // how long an owner waits for guests to leave

struct alignas(64) Header {
  uint64_t magic;
  std::atomic<uint64_t> generation;
};
struct alignas(64) Core {
  std::atomic<uint64_t> owners, guests;
};
struct alignas(64) Slot {
  uint64_t pid;
  uint64_t place;
  std::atomic<int64_t> idle_since, beat;
};
struct Board {
  Header header;
  Core cores[kMaxCores];
  Slot slots[kMaxSlots];
};
static_assert(sizeof(Board) == 64 * (1 + kMaxCores + kMaxSlots), "engine/core_board.py writes this layout");

std::atomic<Board*> board{nullptr};
int own_slot = 0;
uint64_t own_bit = 0;
std::atomic<int64_t> thread_limit{1};
thread_local bool has_entered = false;

// What the compute thread has read from the board at `generation`: cores that change hands are rare.
struct View {
  uint64_t generation = 0;
  int own_core = -1;          // where the thread itself is, or -1
  int num_own = 0, num_cores = 0;
  int16_t cores[kMaxCores];   // those besides own_core: own ones first, then those of others
};
thread_local View view;

bool works(const Slot& slot, int64_t now) {
  return slot.idle_since.load(std::memory_order_seq_cst) == 0 &&
         now - slot.beat.load(std::memory_order_relaxed) < kDeadNs;
}

bool any_works(Board* b, uint64_t slots, int64_t now) {
  for (; slots; slots &= slots - 1)
    if (works(b->slots[__builtin_ctzll(slots)], now)) return true;
  return false;
}

bool all_rest(Board* b, uint64_t slots, int64_t now) {
  for (; slots; slots &= slots - 1) {
    const Slot& slot = b->slots[__builtin_ctzll(slots)];
    const int64_t since = slot.idle_since.load(std::memory_order_relaxed);
    if (works(slot, now) || (since != 0 && now - since < kRestNs)) return false;
  }
  return true;
}

// The compute thread moves to its own first core when the claims have changed.
void settle(Board* b) {
  const uint64_t generation = b->header.generation.load(std::memory_order_acquire);
  if (generation == view.generation) return;
  view.generation = generation;
  view.own_core = -1;
  view.num_cores = 0;
  cpu_set_t set;
  CPU_ZERO(&set);
  for (int pass = 0; pass < 2; ++pass) {
    for (int core = 0; core < kMaxCores; ++core) {
      const uint64_t owners = b->cores[core].owners.load(std::memory_order_relaxed);
      const bool own = (owners & own_bit) != 0;
      if (owners == 0 || own != (pass == 0)) continue;
      if (own && view.own_core < 0) CPU_SET(core, &set);
      if (own && view.own_core < 0)
        view.own_core = core;
      else
        view.cores[view.num_cores++] = static_cast<int16_t>(core);
    }
    if (pass == 0) view.num_own = view.num_cores;
  }
  // Refused where the cores have gone: the thread then stays where it is.
  if (view.own_core >= 0) sched_setaffinity(0, sizeof set, &set);
}

void wait_for_guests(Board* b) {
  const int64_t begin = now_ns();
  for (int i = -1; i < view.num_own; ++i) {
    const int core = i < 0 ? view.own_core : view.cores[i];
    while (core >= 0) {
      const int64_t now = now_ns();
      const uint64_t guests = b->cores[core].guests.load(std::memory_order_seq_cst) & ~own_bit;
      if (!any_works(b, guests, now) || now - begin > kClearNs) break;
      sched_yield();  // a guest that shares this very core needs it to finish its piece
    }
  }
}

}  // namespace

int64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return int64_t{t.tv_sec} * 1'000'000'000 + t.tv_nsec;
}

void pin_to(int core) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(core, &set);
  sched_setaffinity(0, sizeof set, &set);  // refused where the core has gone: the thread then floats
}

bool attached() { return board.load(std::memory_order_acquire) != nullptr; }
bool entered() { return has_entered; }
int64_t max_threads() {
  const int64_t limit = thread_limit.load(std::memory_order_relaxed);
  return limit < view.num_cores + 1 ? limit : view.num_cores + 1;
}

bool is_own(int core) {
  Board* b = board.load(std::memory_order_acquire);
  return b == nullptr || (b->cores[core].owners.load(std::memory_order_relaxed) & own_bit);
}

bool may_use(int core) {
  Board* b = board.load(std::memory_order_acquire);
  if (b == nullptr) return true;
  const uint64_t owners = b->cores[core].owners.load(std::memory_order_relaxed);
  return (owners & own_bit) || !any_works(b, owners, now_ns());
}

void come(int core) {
  if (Board* b = board.load(std::memory_order_acquire)) b->cores[core].guests.fetch_or(own_bit);
}

void go(int core) {
  if (Board* b = board.load(std::memory_order_acquire)) b->cores[core].guests.fetch_and(~own_bit);
}

void beat() {
  if (Board* b = board.load(std::memory_order_acquire))
    b->slots[own_slot].beat.store(now_ns(), std::memory_order_relaxed);
}

int helpers(int16_t* out, int most) {
  Board* b = board.load(std::memory_order_acquire);
  if (b == nullptr) return 0;
  const int64_t now = now_ns();
  b->slots[own_slot].beat.store(now, std::memory_order_relaxed);
  settle(b);
  int count = 0;
  for (int i = 0; i < view.num_cores && count < most; ++i) {
    const int16_t core = view.cores[i];
    if (i < view.num_own || all_rest(b, b->cores[core].owners.load(std::memory_order_relaxed), now)) out[count++] = core;
  }
  return count;
}

}  // namespace cores
}  // namespace baton

using namespace baton;

// Takes part in the board at `path` as `slot`, whose claim stands, with `max_threads` threads at most, the caller's and
// those on borrowed cores included; null ends it. The thread that enters stays on its first core.
// Not while a thread has entered.
BATON_EXPORT int64_t baton_cores_attach(const char* path, int64_t slot, int64_t max_threads) {
  return guarded([&]() -> int64_t {
    if (path == nullptr) {
      cores::board.store(nullptr);  // stays mapped: helper threads may still look at it
      return 0;
    }
    if (slot < 0 || slot >= cores::kMaxSlots) return fail("slot %lld is not below %d", (long long)slot, cores::kMaxSlots);
    const int file = open(path, O_RDWR | O_CLOEXEC);
    if (file < 0) return fail("cannot open %s: %s", path, strerror(errno));
    struct stat found {};
    const bool whole = fstat(file, &found) == 0 && found.st_size >= (off_t)sizeof(cores::Board);
    void* memory =
        whole ? mmap(nullptr, sizeof(cores::Board), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0) : MAP_FAILED;
    close(file);
    if (memory == MAP_FAILED) return fail("cannot map %s as a board of cores", path);
    auto* fresh = static_cast<cores::Board*>(memory);
    if (fresh->header.magic != cores::kMagic) return fail("%s is not a board of cores", path);
    cores::own_slot = static_cast<int>(slot);
    cores::own_bit = uint64_t{1} << slot;
    cores::thread_limit = max_threads < 1 ? 1 : max_threads;
    cores::board.store(fresh, std::memory_order_release);
    return 0;
  });
}

// The calling thread begins to work: it takes its own cores back from guests, and helpers serve this thread from now on.
BATON_EXPORT void baton_cores_enter() {
  cores::Board* b = cores::board.load(std::memory_order_acquire);
  if (b == nullptr) return;
  cores::Slot& slot = b->slots[cores::own_slot];
  slot.beat.store(cores::now_ns(), std::memory_order_relaxed);
  if (cores::has_entered) return;
  cores::has_entered = true;
  slot.idle_since.store(0, std::memory_order_seq_cst);
  cores::settle(b);
  cores::wait_for_guests(b);
}

// It has nothing to do: others may use its cores.
BATON_EXPORT void baton_cores_leave() {
  if (!cores::has_entered) return;
  cores::has_entered = false;
  if (cores::Board* b = cores::board.load(std::memory_order_acquire))
    b->slots[cores::own_slot].idle_since.store(cores::now_ns(), std::memory_order_seq_cst);
}
