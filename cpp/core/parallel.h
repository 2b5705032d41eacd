// Threads. Two ways to share work, neither ever splits a reduction:
//   parallel_for(threads, n, body)    body(begin, end): [0, n) in one contiguous range a thread, static
//   parallel_tasks(threads, n, body)  body(task): independent tasks of uneven cost, taken in ascending order
// Every result is written by one call of `body` alone, so the number of threads and who runs what change no bit.
//
// Each worker runs with the default floating-point state (round to nearest, denormals kept) and gets its own back.
// Two back ends: OpenMP (shares torch's runtime and its warm threads) and a std::thread pool, which TSan can see.
// A process forked after work was shared works alone, with the same bits: threads do not survive fork.
// An exception thrown by `body` is rethrown in the caller after all workers have stopped (the first that came).
//
// Test: tests/cpp/test_parallel.cc.
#pragma once

#include <cstdint>

namespace tutelage {

namespace detail {
using RangeFunction = void (*)(void* context, std::int64_t begin, std::int64_t end);
// Plain function pointers: the ISA units call this without instantiating anything of the standard library.
void run_ranges(int threads, std::int64_t n, RangeFunction function, void* context);
void run_tasks(int threads, std::int64_t n, RangeFunction function, void* context);
}  // namespace detail

// `static`: an instance belongs to the unit that was compiled for one ISA and must never be merged with another's.
template <class Body>
static inline void parallel_for(int threads, std::int64_t n, Body&& body) {
  detail::run_ranges(
      threads, n, [](void* context, std::int64_t begin, std::int64_t end) { (*static_cast<Body*>(context))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

template <class Body>
static inline void parallel_tasks(int threads, std::int64_t n, Body&& body) {
  detail::run_tasks(
      threads, n, [](void* context, std::int64_t begin, std::int64_t) { (*static_cast<Body*>(context))(begin); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace tutelage
