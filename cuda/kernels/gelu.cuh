// GELU and its backward, as cpp/kernels/gelu.h states them.
//
// Types    x, y, dy, dx bf16; arithmetic in float.
// Order    element-wise.
// Work     4 bytes an element forward, 6 backward.
// Test     tests/simt/test_gelu.cc.
#pragma once

#include "cuda/kernels/elementwise.cuh"
#include "cuda/kernels/math.cuh"
#include "kernels/gelu.h"

namespace tutelage::cuda {

__device__ __forceinline__ float gelu_sigmoid(float x, float x2) {
  return sigmoid(1.5957691216057308f * x * fma(0.044715f, x2, 1.0f));  // 2 sqrt(2 / pi)
}
template <bool Erf>
__device__ __forceinline__ float gelu_value(float x) {
  return x * (Erf ? normal_cdf(x) : gelu_sigmoid(x, x * x));
}
template <bool Erf>
__device__ __forceinline__ float gelu_slope(float x) {
  if constexpr (Erf) {
    const float density = 0.39894228040143268f * exponential(-0.5f * x * x);
    return fma(x, density, normal_cdf(x));
  } else {
    const float x2 = x * x, s = gelu_sigmoid(x, x2), y = x * s;
    const float two_du = 1.5957691216057308f * fma(static_cast<float>(3 * 0.044715), x2, 1.0f);
    return fma(y * (1.0f - s), two_du, s);
  }
}

template <int N, bool Erf>
static __global__ void __launch_bounds__(kElementThreads) gelu_kernel(const Gelu g) {
  const int64_t at = element_thread() * N;
  if (at >= g.n) return;
  Floats<N> v = load_floats<N>(static_cast<const bf16*>(g.x) + at);
  SIMT_UNROLL
  for (int i = 0; i < N; ++i) v[i] = gelu_value<Erf>(v[i]);
  store_floats<N>(static_cast<bf16*>(g.y) + at, v);
}

template <int N, bool Erf>
static __global__ void __launch_bounds__(kElementThreads) gelu_backward_kernel(const GeluBackward g) {
  const int64_t at = element_thread() * N;
  if (at >= g.n) return;
  Floats<N> v = load_floats<N>(static_cast<const bf16*>(g.x) + at);
  const Floats<N> dy = load_floats<N>(static_cast<const bf16*>(g.dy) + at);
  SIMT_UNROLL
  for (int i = 0; i < N; ++i) v[i] = dy[i] * gelu_slope<Erf>(v[i]);
  store_floats<N>(static_cast<bf16*>(g.dx) + at, v);
}

inline void gelu(const Gelu& g, cudaStream_t stream) {
  if (aligned_rows(g.x, 0, g.n) && aligned_rows(g.y, 0, g.n))
    launch(g.erf ? gelu_kernel<8, true> : gelu_kernel<8, false>, element_grid(g.n / 8), dim3(kElementThreads), 0, stream, g);
  else
    launch(g.erf ? gelu_kernel<1, true> : gelu_kernel<1, false>, element_grid(g.n), dim3(kElementThreads), 0, stream, g);
}

inline void gelu_backward(const GeluBackward& g, cudaStream_t stream) {
  if (aligned_rows(g.x, 0, g.n) && aligned_rows(g.dy, 0, g.n) && aligned_rows(g.dx, 0, g.n))
    launch(g.erf ? gelu_backward_kernel<8, true> : gelu_backward_kernel<8, false>, element_grid(g.n / 8), dim3(kElementThreads),
           0, stream, g);
  else
    launch(g.erf ? gelu_backward_kernel<1, true> : gelu_backward_kernel<1, false>, element_grid(g.n), dim3(kElementThreads), 0,
           stream, g);
}

}  // namespace tutelage::cuda
