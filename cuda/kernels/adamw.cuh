// One AdamW step, as cpp/kernels/adamw.h states it, and the bf16 copy of the parameters that the kernels compute with.
//
// Types    p (the master weights), g, m, v float; copy bf16, or null.
// Order    element-wise.
// Work     28 bytes a parameter, 30 with the copy: memory-bound.
// Test     tests/simt/test_adamw.cc.
#pragma once

#include <cmath>

#include "cuda/kernels/elementwise.cuh"
#include "cuda/ptx/math.h"
#include "kernels/adamw.h"

namespace tutelage::cuda {

struct AdamWNumbers {  // each rounded to float once, on the host, as on the CPU
  float scale, keep, b1, b2, rest1, rest2, step, eps, inverse_root2;
};

template <int N>
static __global__ void __launch_bounds__(kElementThreads) adamw_kernel(const AdamW a, const AdamWNumbers c, bf16* copy) {
  const int64_t at = element_thread() * N;
  if (at >= a.n) return;
  auto* p = reinterpret_cast<Floats<N>*>(static_cast<float*>(a.p) + at);
  auto *m = reinterpret_cast<Floats<N>*>(static_cast<float*>(a.m) + at),
       *v = reinterpret_cast<Floats<N>*>(static_cast<float*>(a.v) + at);
  const Floats<N> g = ld_global(reinterpret_cast<const Floats<N>*>(static_cast<const float*>(a.g) + at));
  Floats<N> parameters = ld_global(p), means = ld_global(m), squares = ld_global(v);
  SIMT_UNROLL
  for (int i = 0; i < N; ++i) {
    const float slope = g[i] * c.scale;
    means[i] = fma(c.b1, means[i], c.rest1 * slope);
    squares[i] = fma(c.b2, squares[i], c.rest2 * slope * slope);
    const float direction = means[i] / fma(square_root(squares[i]), c.inverse_root2, c.eps);
    parameters[i] = fma(c.step, direction, parameters[i] * c.keep);
  }
  st_global(p, parameters);
  st_global(m, means);
  st_global(v, squares);
  if (copy) store_floats<N>(copy + at, parameters);
}

inline void adamw(const AdamW& a, bf16* copy, cudaStream_t stream) {
  const AdamWNumbers c{static_cast<float>(a.grad_scale),
                       static_cast<float>(1 - a.lr * a.weight_decay),
                       static_cast<float>(a.beta1),
                       static_cast<float>(a.beta2),
                       static_cast<float>(1 - a.beta1),
                       static_cast<float>(1 - a.beta2),
                       static_cast<float>(-a.lr / a.correction1),
                       static_cast<float>(a.eps),
                       static_cast<float>(1 / std::sqrt(a.correction2))};
  auto at = [](const void* p, std::uintptr_t bytes) { return reinterpret_cast<std::uintptr_t>(p) % bytes == 0; };
  const bool aligned = a.n % 4 == 0 && at(a.p, 16) && at(a.g, 16) && at(a.m, 16) && at(a.v, 16) && at(copy, 8);
  launch(aligned ? adamw_kernel<4> : adamw_kernel<1>, element_grid(aligned ? a.n / 4 : a.n), dim3(kElementThreads), 0, stream,
         a, c, copy);
}

}  // namespace tutelage::cuda
