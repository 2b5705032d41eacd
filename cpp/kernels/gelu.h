// GELU, element by element, and its backward.
//
// Shapes   x, y, dy, dx [n], contiguous.
// Formula  tanh form (Hugging Face's gelu_new): y = x sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3), which is
//          0.5 x (1 + tanh u) without the cancellation.  erf form: y = x Phi(x), Phi(x) = erfc(-x / sqrt 2) / 2.
//          Hendrycks & Gimpel 2016, arXiv 1606.08415.
// Order    element-wise: nothing to order.
// Work     about 30 flops and 8 bytes an element (12 backward).
// Test     tests/cpp/test_gelu.cc, tests/python/test_kernels.py.   Benchmark  bench/kernels.py (gelu).
#pragma once

#include <cstdint>

namespace tutelage {

struct Gelu {
  std::int64_t n = 0;
  const void* x = nullptr;
  void* y = nullptr;
  bool erf = false;
};

struct GeluBackward {
  std::int64_t n = 0;
  const void* x = nullptr;
  const void* dy = nullptr;
  void* dx = nullptr;
  bool erf = false;
};

}  // namespace tutelage
