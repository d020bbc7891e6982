#include "pool.h"

#include <pthread.h>
#include <signal.h>

#include <atomic>
#include <condition_variable>
#include <cstdarg>
#include <cstdio>
#include <mutex>
#include <system_error>
#include <thread>

#include "interface.h"

namespace baton {
namespace {

constexpr int64_t kAbiVersion = 3;
constexpr int kSpins = 64;  // about a microsecond

std::atomic<int64_t> wanted_threads{1};
thread_local char error_message[512];

inline void pause_briefly() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

class Pool {
 public:
  void run(int64_t n, const std::function<void(int64_t)>& work, int64_t threads) {
    std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
    if (!turn.owns_lock()) {
      for (int64_t i = 0; i < n; ++i) work(i);
      return;
    }
    grow(threads - 1);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      work_ = &work;
      count_ = n;
      next_.store(0, std::memory_order_relaxed);
      seats_ = (n < threads ? n : threads) - 1;
      generation_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    drain(work, n);
    std::unique_lock<std::mutex> lock(mutex_);
    seats_ = 0;  // helpers that have not woken yet find no seat, and nobody waits for them
    work_ = nullptr;
    if (active_ != 0) {
      lock.unlock();
      for (int spin = 0; spin < kSpins && helpers_.load(std::memory_order_acquire) != 0; ++spin) pause_briefly();
      lock.lock();
      done_.wait(lock, [this] { return active_ == 0; });
    }
  }

 private:
  void drain(const std::function<void(int64_t)>& work, int64_t n) {
    for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < n;) work(i);
  }

  void grow(int64_t helpers) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);  // helpers leave every signal to the application's threads
    try {
      for (; started_ < helpers; ++started_) std::thread([this] { help(); }).detach();
    } catch (const std::system_error&) {
      // No more threads to be had: the caller and the helpers so far do the work, with the same results.
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
  }

  void help() {
    uint64_t seen = 0;
    for (;;) {
      for (int spin = 0; spin < kSpins && generation_.load(std::memory_order_acquire) == seen; ++spin) pause_briefly();
      const std::function<void(int64_t)>* work;
      int64_t n;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return generation_.load(std::memory_order_relaxed) != seen; });
        seen = generation_.load(std::memory_order_relaxed);
        if (seats_ <= 0) continue;
        --seats_;
        ++active_;
        helpers_.store(active_, std::memory_order_relaxed);
        work = work_;
        n = count_;
      }
      drain(*work, n);
      bool last;
      {
        std::lock_guard<std::mutex> lock(mutex_);
        last = --active_ == 0;
        helpers_.store(active_, std::memory_order_release);
      }
      if (last) done_.notify_one();
    }
  }

  std::mutex turn_;   // held by the one caller whose job is on
  std::mutex mutex_;  // guards what follows
  std::condition_variable wake_, done_;
  const std::function<void(int64_t)>* work_ = nullptr;
  int64_t count_ = 0, seats_ = 0, active_ = 0, started_ = 0;
  std::atomic<int64_t> next_{0}, helpers_{0};
  std::atomic<uint64_t> generation_{0};
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

int64_t num_threads() { return wanted_threads.load(std::memory_order_relaxed); }

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
