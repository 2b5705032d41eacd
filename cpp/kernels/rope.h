// Rotary position embedding, the two halves of a head as real and imaginary part (Llama's layout), and its backward.
//
// Shapes   x, y [tokens, heads, d] with token pitches (y may be x), positions int32 [tokens], cos, sin [positions, d / 2].
// Formula  y1 = x1 cos - x2 sin,  y2 = x2 cos + x1 sin;  backward: the same with -sin.   Su et al. 2021, arXiv 2104.09864.
// Order    element-wise: nothing to order.
// Work     6 flops and 8 bytes an element.
// Test     tests/cpp/test_rope.cc, tests/python/test_kernels.py.   Benchmark  bench/kernels.py (rope).
#pragma once

#include <cstdint>

namespace tutelage {

struct Rope {
  std::int64_t tokens = 0, heads = 0, d = 0;
  const void* x = nullptr;
  std::int64_t x_row = 0;
  void* y = nullptr;
  std::int64_t y_row = 0;
  const std::int32_t* positions = nullptr;
  const void *cos = nullptr, *sin = nullptr;
  bool backward = false;
};

}  // namespace tutelage
