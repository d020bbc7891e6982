// A small persistent thread pool. Ownership: made at first use, never destroyed (threads may outlive static objects).
//
// parallel_for(n, work) runs work(0) .. work(n - 1), each once, on the caller and up to num_threads - 1 helpers, and
// returns when all are done. Which thread takes which index is left to chance, so results must not depend on it.
// A call that finds the pool busy (another thread's call, or a nested one) runs inline. A forked child starts afresh.
//
// Beside a board of cores (cores.h) there is one helper per core, pinned to it; a helper on another worker's core leaves
// after the piece of work it is at when that worker begins to work. Between regions helpers spin for 50 us at most.
#pragma once

#include <cstdint>
#include <functional>

namespace baton {

int64_t num_threads() __attribute__((visibility("hidden")));
void parallel_for(int64_t n, const std::function<void(int64_t)>& work) __attribute__((visibility("hidden")));

// Work that takes pieces by itself asks before each but its first: false tells a helper that its core is wanted back.
// The caller goes on until nothing is left, so a helper may stop at any piece.
bool may_go_on() __attribute__((visibility("hidden")));

// Splits rows into pieces of at least `grain` rows: work(begin, end).
void parallel_rows(int64_t rows, int64_t grain, const std::function<void(int64_t, int64_t)>& work)
    __attribute__((visibility("hidden")));

}  // namespace baton
