// Sums of a vector in one fixed order: over all of it, or over each sequence of a batch; and its sum of squares.
//
// Shapes   x [n], mask bool [n] (optional), cu_seqlens int32 [segments + 1] (none: one segment, all of x), out [segments].
// Formula  out_s = sum of x_i over the segment where mask_i;  sum_of_squares = sum of x_i^2, in double.
// Order    blocks of kTotalBlock elements counted from the segment's start, each in 16 lanes and the fixed tree; the blocks'
//          sums are added in order. A segment's sum depends on its own elements only. Masked elements enter as 0.
// Work     reads x once.
// Test     tests/cpp/test_total.cc, tests/python/test_kernels.py.   Benchmark  bench/kernels.py (total).
#pragma once

#include <cstdint>

namespace tutelage {

struct Total {
  std::int64_t n = 0;
  const void* x = nullptr;
  const bool* mask = nullptr;
  std::int64_t segments = 1;
  const std::int32_t* cu_seqlens = nullptr;
  void* out = nullptr;
};

struct SumOfSquares {
  std::int64_t n = 0;
  const void* x = nullptr;
  double* out = nullptr;  // the host's
};

}  // namespace tutelage
