// Which cores this process's compute threads may use at this moment: a view of the board that all workers of a host share.
//
//   board file    header | one line per core: owners, guests | one line per worker (slot): pid, place, idle since, beat
//   owners        bit mask of slots, written by whoever claims or gives up a slot (engine/core_board.py, under a lock)
//   guests        bit mask of slots that compute on the core and do not own it, written by their helper threads
//   idle since    0 while the worker works, else when it stopped, CLOCK_MONOTONIC ns, written by its compute thread
//   beat          when its compute thread was last seen; a worker that works and has not been seen for 2 s is dead
//
// A guest first writes itself down, then looks whether an owner works; an owner first says that it works, then waits
// until the guests it can see have gone. One of the two sees the other, so a guest never computes beside an owner for
// longer than the piece of work it is at. Without a board every core is anybody's.
#pragma once

#include <cstdint>

namespace baton {
namespace cores {

constexpr int kMaxCores = 256;
constexpr int kMaxSlots = 64;

// True where a board is attached and this thread is the one that entered.
bool entered() __attribute__((visibility("hidden")));
// Threads that a region of the thread that entered may have where every worker but this one is idle.
int64_t max_threads() __attribute__((visibility("hidden")));
bool attached() __attribute__((visibility("hidden")));

// Cores for helpers besides the caller's, own ones first, then those whose owners are idle; at most `most`.
int helpers(int16_t* out, int most) __attribute__((visibility("hidden")));

// Whether this process may compute on `core` now; a guest asks after each piece of work.
bool may_use(int core) __attribute__((visibility("hidden")));
bool is_own(int core) __attribute__((visibility("hidden")));
void come(int core) __attribute__((visibility("hidden")));  // as a guest
void go(int core) __attribute__((visibility("hidden")));

void pin_to(int core) __attribute__((visibility("hidden")));
void beat() __attribute__((visibility("hidden")));
int64_t now_ns() __attribute__((visibility("hidden")));

}  // namespace cores
}  // namespace baton
