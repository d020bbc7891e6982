#include "pool.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <mutex>
#include <system_error>
#include <thread>

#include "cores.h"
#include "interface.h"

namespace baton {
namespace {

constexpr int64_t kAbiVersion = 6;
constexpr int64_t kSpinNs = 50'000;  // what lies between two regions of a step is shorter, a sleep and a wake-up cost more
constexpr int kPauses = 8;           // between two looks at the clock
// A helper whose core the system gives to other processes keeps the caller waiting. What help saves and what waiting costs
// are weighed against each other, and a helper in debt is left out for a while, twice as long each time.
constexpr int64_t kMostCreditNs = 20'000'000, kLeastRestNs = 5'000'000, kMostRestNs = 160'000'000;
constexpr int kMaxHelpers = cores::kMaxCores;
constexpr int kUnpinned = cores::kMaxCores;  // index of the first helper that belongs to no core

std::atomic<int64_t> wanted_threads{1};
std::atomic<int64_t> helped_items{0};
thread_local char error_message[512];
thread_local int borrowed_core = -1;  // of a helper on a core that is not this process's

inline void pause_briefly() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

inline void futex_wait(std::atomic<uint32_t>& word, uint32_t while_value) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT_PRIVATE, while_value, nullptr, nullptr, 0);
}

inline void futex_wake(std::atomic<uint32_t>& word) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAKE_PRIVATE, 1, nullptr, nullptr, 0);
}

// Spins until `done()`, for up to kSpinNs and while `worth_it()`; returns whether it came true.
template <class Done, class WorthIt>
bool spin(Done done, WorthIt worth_it) {
  if (done()) return true;
  for (const int64_t end = cores::now_ns() + kSpinNs; cores::now_ns() < end && worth_it();)
    for (int i = 0; i < kPauses; ++i) {
      pause_briefly();
      if (done()) return true;
    }
  return false;
}

// One job at a time. A helper takes part in job g when it was invited to g, has counted itself in `active_`, and then
// finds g still open; the caller closes g and then waits for `active_` to fall to 0, so nobody is left behind.
class Pool {
 public:
  void run(int64_t n, const std::function<void(int64_t)>& work, int64_t threads) {
    std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
    const bool on_board = cores::attached();
    int16_t seats[kMaxHelpers];
    int count = 0;
    // Beside a board only the thread that entered is helped: others must not take the helpers away from it.
    if (turn.owns_lock() && (!on_board || cores::entered())) {
      const int64_t most = (n < threads ? n : threads) - 1;
      count = invitees(seats, static_cast<int>(most < kMaxHelpers ? most : kMaxHelpers), on_board);
    }
    if (count == 0) {
      for (int64_t i = 0; i < n; ++i) work(i);
      return;
    }
    work_ = &work;
    count_ = n;
    next_.store(0, std::memory_order_relaxed);
    const uint64_t job = ++last_job_;
    caller_cpu_.store(sched_getcpu(), std::memory_order_relaxed);
    open_.store(job);
    for (int i = 0; i < count; ++i) {
      Helper& helper = *helpers_[seats[i]];
      helper.invited.store(job);
      if (helper.asleep.exchange(0) == 1) futex_wake(helper.asleep);
    }
    const int64_t begin = cores::now_ns();
    for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < n;) work(i);
    open_.store(0);
    const auto alone = [this] { return active_.load() == 0; };
    const int64_t own_end = cores::now_ns();
    int64_t wait = 0;
    // A helper that floats may be waiting for this very core.
    if (!spin(alone, [on_board] { return on_board || sched_yield() == 0; })) {
      caller_waits_.store(true);
      for (uint32_t seen; (seen = active_.load()) != 0;) futex_wait(active_, seen);
      caller_waits_.store(false);
      wait = cores::now_ns() - own_end;
    }
    for (int i = 0; i < count; ++i) {
      Helper& helper = *helpers_[seats[i]];
      if (helper.joined.load(std::memory_order_relaxed) == job) note(helper, own_end - begin - wait, own_end + wait);
    }
  }

 private:
  struct alignas(64) Helper {
    std::atomic<uint64_t> invited{0};
    std::atomic<uint32_t> asleep{0};
    std::atomic<uint64_t> joined{0};
    int64_t rests_until = 0, rest_ns = kLeastRestNs, credit_ns = kMostCreditNs;  // the caller's
  };

  // `saved_ns`: what a job's help has saved, negative where it has cost more.
  static void note(Helper& helper, int64_t saved_ns, int64_t now) {
    helper.credit_ns += saved_ns;
    if (helper.credit_ns >= kMostCreditNs) {
      helper.credit_ns = kMostCreditNs;
      helper.rest_ns = kLeastRestNs;
    } else if (helper.credit_ns < 0) {
      helper.credit_ns = 0;
      helper.rests_until = now + helper.rest_ns;
      helper.rest_ns = helper.rest_ns < kMostRestNs ? 2 * helper.rest_ns : kMostRestNs;
    }
  }

  // Indices into helpers_: beside a board the cores to use, else those of helpers that float.
  int invitees(int16_t* out, int most, bool on_board) {
    int count = most;
    if (on_board)
      count = cores::helpers(out, most);
    else
      for (int i = 0; i < most; ++i) out[i] = static_cast<int16_t>(kUnpinned + i);
    int started = 0;
    const int64_t now = count > 0 ? cores::now_ns() : 0;
    for (int i = 0; i < count; ++i) {
      const Helper* helper = helpers_[out[i]];
      if (helper != nullptr ? now >= helper->rests_until : start(out[i], on_board)) out[started++] = out[i];
    }
    return started;
  }

  bool start(int index, bool on_board) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);  // helpers leave every signal to the application's threads
    auto* helper = new Helper;
    try {
      std::thread([this, helper, index, on_board] { help(*helper, index, on_board); }).detach();
      helpers_[index] = helper;
    } catch (const std::system_error&) {
      // No more threads to be had: the caller and the helpers so far do the work, with the same results.
      delete helper;
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    return helpers_[index] != nullptr;
  }

  void help(Helper& helper, int core, bool on_board) {
    if (on_board) cores::pin_to(core);
    const auto welcome = [core, on_board] { return !on_board || cores::may_use(core); };
    // A helper that floats may sit on the caller's core: spinning there would keep the caller from going on.
    const auto may_spin = [&, this] {
      return on_board ? cores::may_use(core) : sched_getcpu() != caller_cpu_.load(std::memory_order_relaxed);
    };
    bool guest = false;
    for (uint64_t seen = 0;;) {
      const auto invited = [&] { return helper.invited.load() != seen; };
      if (!spin(invited, may_spin)) {
        if (guest) cores::go(core);
        guest = false;
        helper.asleep.store(1);
        while (!invited() && helper.asleep.load() == 1) futex_wait(helper.asleep, 1);
        helper.asleep.store(0);
        if (!invited()) continue;
      }
      seen = helper.invited.load();
      if (on_board && !guest && !cores::is_own(core)) {
        guest = true;
        borrowed_core = core;
        cores::come(core);
      }
      active_.fetch_add(1);
      if (!guest) borrowed_core = -1;
      if (open_.load() == seen) {
        helper.joined.store(seen, std::memory_order_relaxed);
        help_with(*work_, count_, welcome);
      }
      if (active_.fetch_sub(1) == 1 && caller_waits_.load()) futex_wake(active_);
      if (guest && !welcome()) {
        guest = false;
        cores::go(core);
      }
    }
  }

  template <class Welcome>
  void help_with(const std::function<void(int64_t)>& work, int64_t n, Welcome welcome) {
    int64_t done = 0;
    for (int64_t i; welcome() && (i = next_.fetch_add(1, std::memory_order_relaxed)) < n; ++done) work(i);
    helped_items.fetch_add(done, std::memory_order_relaxed);
  }

  std::mutex turn_;  // held by the one caller whose job is on
  Helper* helpers_[2 * kMaxHelpers] = {};
  const std::function<void(int64_t)>* work_ = nullptr;
  int64_t count_ = 0;
  uint64_t last_job_ = 0;
  alignas(64) std::atomic<uint64_t> open_{0};
  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) std::atomic<uint32_t> active_{0};
  std::atomic<bool> caller_waits_{false};
  std::atomic<int> caller_cpu_{-1};
};

std::atomic<Pool*> the_pool{nullptr};

// Threads do not survive a fork and locks may be held by ones that are gone: the child leaves the old pool behind.
void forget_pool() { the_pool.store(nullptr); }

Pool& pool() {
  Pool* found = the_pool.load(std::memory_order_acquire);
  if (found == nullptr) {
    static const int registered = pthread_atfork(nullptr, nullptr, forget_pool);
    (void)registered;
    Pool* fresh = new Pool;
    if (the_pool.compare_exchange_strong(found, fresh)) return *fresh;
    delete fresh;
  }
  return *found;
}

}  // namespace

int64_t num_threads() {
  return cores::entered() ? cores::max_threads() : wanted_threads.load(std::memory_order_relaxed);
}

bool may_go_on() { return borrowed_core < 0 || cores::may_use(borrowed_core); }

void parallel_for(int64_t n, const std::function<void(int64_t)>& work) {
  const int64_t threads = num_threads();
  if (threads <= 1 || n <= 1) {
    for (int64_t i = 0; i < n; ++i) work(i);
    return;
  }
  pool().run(n, work, threads);
}

void parallel_rows(int64_t rows, int64_t grain, const std::function<void(int64_t, int64_t)>& work) {
  const int64_t most = 4 * num_threads();
  int64_t pieces = rows / (grain < 1 ? 1 : grain);
  if (num_threads() <= 1 || pieces <= 1) {
    if (rows > 0) work(0, rows);
    return;
  }
  if (pieces > most) pieces = most;
  parallel_for(pieces, [&](int64_t i) { work(rows * i / pieces, rows * (i + 1) / pieces); });
}

int64_t fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(error_message, sizeof error_message, format, arguments);
  va_end(arguments);
  return 1;
}

}  // namespace baton

BATON_EXPORT int64_t baton_abi_version() { return baton::kAbiVersion; }
BATON_EXPORT const char* baton_error() { return baton::error_message; }
BATON_EXPORT void baton_set_num_threads(int64_t threads) { baton::wanted_threads.store(threads < 1 ? 1 : threads); }
BATON_EXPORT int64_t baton_num_threads() { return baton::num_threads(); }
// Pieces of work that helper threads have done since the process began.
BATON_EXPORT int64_t baton_helped_items() { return baton::helped_items.load(); }
