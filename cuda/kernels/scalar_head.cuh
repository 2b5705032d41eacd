// The scalar head: a value after every token, and its backward. (What cpp/engine asks for as products with one row or column.)
//
// Shapes   hidden, d_hidden [tokens, d] with a pitch, weight [d], bf16; values, d_values [tokens], d_weight [d], float.
// Formula  values_t = hidden_t . weight;  d_weight += sum over t of d_values_t hidden_t;  d_hidden_t = d_values_t weight
// Order    a value: rows.cuh's, one warp a row, whatever d. d_weight: columns.cuh's, ONE chain over tokens.
// Work     2 bytes an element, each.
// Test     tests/simt/test_scalar_head.cc.
#pragma once

#include "cuda/kernels/arguments.h"
#include "cuda/kernels/columns.cuh"
#include "cuda/kernels/elementwise.cuh"

namespace tutelage::cuda {

template <bool Aligned>
static __global__ void __launch_bounds__(32 * kWarpsOfBlock) values_kernel(const ScalarHead g) {
  const RowPlace<1> place;
  if (place.row >= g.tokens) return;  // whole warps
  float sum = 0;
  each_chunk<32>(g.d, place.thread, [&](auto, int, int64_t first, int64_t n) {
    const Chunk h = load_chunk<Aligned>(g.hidden + place.row * g.row + first, n), w = load_chunk<Aligned>(g.weight + first, n);
    SIMT_UNROLL
    for (int i = 0; i < kChunk; ++i) sum = fma(to_float(h[i]), to_float(w[i]), sum);
  });
  sum = warp_sum(sum);
  if (place.thread == 0) st_global(g.values + place.row, sum);
}

struct ScalarHeadColumns {
  static constexpr int kMatrices = 1, kSums = 1, kStatistics = 1;
  ScalarHeadBackward g;
  __device__ __forceinline__ const bf16* matrix(int, int64_t row) const { return g.hidden + row * g.row; }
  __device__ __forceinline__ float statistic(int, int64_t row) const { return ld_global(g.d_values + row); }
  __device__ __forceinline__ float* sum(int) const { return g.d_weight; }
  __device__ __forceinline__ void add(const float* value, const float* statistic, float* sum) const {
    sum[0] = fma(statistic[0], value[0], sum[0]);
  }
};

template <int N>
static __global__ void __launch_bounds__(kElementThreads) d_hidden_kernel(const ScalarHeadBackward g) {
  const int64_t at = element_thread() * N, t = at / g.d, j = at - t * g.d;
  if (t >= g.tokens) return;
  Floats<N> v = load_floats<N>(g.weight + j);
  const float slope = ld_global(g.d_values + t);
  SIMT_UNROLL
  for (int i = 0; i < N; ++i) v[i] = slope * v[i];
  store_floats<N>(g.d_hidden + t * g.row + j, v);
}

inline void scalar_head(const ScalarHead& g, cudaStream_t stream) {
  const bool aligned = aligned_rows(g.hidden, g.row, g.d) && aligned_rows(g.weight, 0, g.d);
  const RowLaunch<1> l(g.tokens);
  launch(aligned ? values_kernel<true> : values_kernel<false>, l.grid, l.block, 0, stream, g);
}

inline void scalar_head_backward(const ScalarHeadBackward& g, cudaStream_t stream) {
  if (g.d_weight) column_chains(ScalarHeadColumns{g}, aligned_rows(g.hidden, g.row, g.d), g.tokens, g.d, stream);
  if (!g.d_hidden) return;
  const bool aligned = aligned_rows(g.weight, 0, g.d) && aligned_rows(g.d_hidden, g.row, g.d);
  const int64_t n = g.tokens * g.d;
  launch(aligned ? d_hidden_kernel<8> : d_hidden_kernel<1>, element_grid(aligned ? n / 8 : n), dim3(kElementThreads), 0, stream,
         g);
}

}  // namespace tutelage::cuda
