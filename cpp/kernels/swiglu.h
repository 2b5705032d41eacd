// SwiGLU, element by element, and its backward.
//
// Shapes   gate, up, y, dy, d_gate, d_up [rows, columns]; gate and up (and their gradients) share a row pitch, so they may be
//          the two halves of one matrix.
// Formula  y = silu(gate) up, silu(g) = g sigmoid(g).  Shazeer 2020, arXiv 2002.05202.
// Order    element-wise: nothing to order.
// Work     about 25 flops and 12 bytes an element (20 backward).
// Test     tests/cpp/test_swiglu.cc, tests/python/test_kernels.py.   Benchmark  bench/kernels.py (swiglu).
#pragma once

#include <cstdint>

namespace tutelage {

struct Swiglu {
  std::int64_t rows = 0, columns = 0;
  const void *gate = nullptr, *up = nullptr;
  std::int64_t in_row = 0;
  void* y = nullptr;
  std::int64_t y_row = 0;
};

struct SwigluBackward {
  std::int64_t rows = 0, columns = 0;
  const void *gate = nullptr, *up = nullptr;
  std::int64_t in_row = 0;
  const void* dy = nullptr;
  std::int64_t dy_row = 0;
  void *d_gate = nullptr, *d_up = nullptr;
  std::int64_t d_row = 0;
};

}  // namespace tutelage
