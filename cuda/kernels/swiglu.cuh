// SwiGLU and its backward, as cpp/kernels/swiglu.h states them.
//
// Types    all bf16; arithmetic in float.
// Order    element-wise.
// Work     6 bytes an element forward, 10 backward.
// Test     tests/simt/test_swiglu.cc.
#pragma once

#include "cuda/kernels/elementwise.cuh"
#include "cuda/kernels/math.cuh"
#include "kernels/swiglu.h"

namespace tutelage::cuda {

__device__ __forceinline__ float swiglu_value(float gate, float up) { return gate * sigmoid(gate) * up; }

template <int N>
static __global__ void __launch_bounds__(kElementThreads) swiglu_kernel(const Swiglu g) {
  const int64_t at = element_thread() * N, row = at / g.columns, column = at - row * g.columns;
  if (row >= g.rows) return;
  const int64_t from = row * g.in_row + column;
  Floats<N> gate = load_floats<N>(static_cast<const bf16*>(g.gate) + from);
  const Floats<N> up = load_floats<N>(static_cast<const bf16*>(g.up) + from);
  SIMT_UNROLL
  for (int i = 0; i < N; ++i) gate[i] = swiglu_value(gate[i], up[i]);
  store_floats<N>(static_cast<bf16*>(g.y) + row * g.y_row + column, gate);
}

template <int N>
static __global__ void __launch_bounds__(kElementThreads) swiglu_backward_kernel(const SwigluBackward g) {
  const int64_t at = element_thread() * N, row = at / g.columns, column = at - row * g.columns;
  if (row >= g.rows) return;
  const int64_t from = row * g.in_row + column, to = row * g.d_row + column;
  Floats<N> gate = load_floats<N>(static_cast<const bf16*>(g.gate) + from);
  Floats<N> up = load_floats<N>(static_cast<const bf16*>(g.up) + from);
  const Floats<N> dy = load_floats<N>(static_cast<const bf16*>(g.dy) + row * g.dy_row + column);
  SIMT_UNROLL
  for (int i = 0; i < N; ++i) {
    const float s = sigmoid(gate[i]), silu = gate[i] * s;
    gate[i] = dy[i] * up[i] * fma(silu, 1.0f - s, s);
    up[i] = dy[i] * silu;
  }
  store_floats<N>(static_cast<bf16*>(g.d_gate) + to, gate);
  store_floats<N>(static_cast<bf16*>(g.d_up) + to, up);
}

inline void swiglu(const Swiglu& g, cudaStream_t stream) {
  const int64_t n = g.rows * g.columns;
  const bool aligned = aligned_rows(g.gate, g.in_row, g.columns) && aligned_rows(g.up, g.in_row, g.columns) &&
                       aligned_rows(g.y, g.y_row, g.columns);
  launch(aligned ? swiglu_kernel<8> : swiglu_kernel<1>, element_grid(aligned ? n / 8 : n), dim3(kElementThreads), 0, stream, g);
}

inline void swiglu_backward(const SwigluBackward& g, cudaStream_t stream) {
  const int64_t n = g.rows * g.columns;
  const bool aligned = aligned_rows(g.gate, g.in_row, g.columns) && aligned_rows(g.up, g.in_row, g.columns) &&
                       aligned_rows(g.dy, g.dy_row, g.columns) && aligned_rows(g.d_gate, g.d_row, g.columns) &&
                       aligned_rows(g.d_up, g.d_row, g.columns);
  launch(aligned ? swiglu_backward_kernel<8> : swiglu_backward_kernel<1>, element_grid(aligned ? n / 8 : n),
         dim3(kElementThreads), 0, stream, g);
}

}  // namespace tutelage::cuda
