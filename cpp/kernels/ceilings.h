// What the machine can do at most: fused multiply-adds, and reading memory. Every speed that bench/ states is a fraction of
// one of these, measured in the same run.
//
// Shapes   FmaPeak: none, all operands are registers.  ReadSweep: x [n], contiguous.
// Formula  flops = the number of multiplications and additions done;  sum = sweeps x the sum of x_i.
// Order    not part of any result: `sum` depends on the number of threads, and is there so that nothing is left out.
// Work     FmaPeak: kTileRows independent chains of 16 lanes a thread (12 ymm or 12 zmm registers), more than the
//          latency (4) x units (2) = 8 that keep every unit busy.  ReadSweep: 4 n bytes read `sweeps` times, each thread
//          its own stretch of them, one addition an element.
// Test     tests/cpp/test_ceilings.cc, tests/python/test_bench.py.   Benchmark  bench/ceilings.py.
#pragma once

#include <cstdint>

namespace tutelage {

struct FmaPeak {
  std::int64_t rounds = 0;
  double* flops = nullptr;  // [1]: done by all threads together
};

struct ReadSweep {
  std::int64_t n = 0, sweeps = 1;
  const void* x = nullptr;
  double* sum = nullptr;  // [1]
};

}  // namespace tutelage
