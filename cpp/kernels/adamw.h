// One AdamW step over a stretch of parameters, in one pass.
//
// Shapes   p, g, m, v [n].
// Formula  g' = g grad_scale;  p -= lr decay p;  m = beta1 m + (1 - beta1) g';  v = beta2 v + (1 - beta2) g'^2;
//          p -= lr (m / correction1) / (sqrt(v / correction2) + eps),  correction_i = 1 - beta_i^step.
//          Loshchilov & Hutter 2019, arXiv 1711.05101.
// Order    element-wise: nothing to order.
// Work     28 bytes a parameter, about 15 flops: memory-bound.
// Test     tests/cpp/test_adamw.cc, tests/python/test_optimizer.py.   Benchmark  bench/kernels.py (adamw).
#pragma once

#include <cstdint>

namespace tutelage {

struct AdamW {
  std::int64_t n = 0;
  void* p = nullptr;
  const void* g = nullptr;
  void *m = nullptr, *v = nullptr;
  double lr = 0, beta1 = 0, beta2 = 0, eps = 0, weight_decay = 0;
  double correction1 = 1, correction2 = 1, grad_scale = 1;
  void* copy = nullptr;  // of p after the step, in bfloat16, where kernels read that (activation_size 2); null: none
};

}  // namespace tutelage
