// LayerNorm and its backward, as cpp/kernels/layer_norm.h states them.
//
// Types    x, residual, sum, weight, bias, y, dy, dx bf16; mean, rstd, dweight, dbias float. The row that is normed is the
//          rounded sum, which the backward reads again.
// Order    sums over a row: rows.cuh, the mean first, then the squares of the distances from it. dweight, dbias: columns.cuh.
// Work     as rms_norm.cuh.
// Test     tests/simt/test_layer_norm.cc.
#pragma once

#include "cuda/kernels/columns.cuh"
#include "cuda/kernels/rows.cuh"
#include "cuda/ptx/math.h"
#include "kernels/layer_norm.h"

namespace tutelage::cuda {

template <int Warps, bool Aligned>
static __global__ void __launch_bounds__(Warps == 1 ? 128 : 32 * Warps) layer_norm_kernel(const LayerNorm g) {
  constexpr int kThreads = 32 * Warps;
  float* shared = dyn_smem<float>();
  const RowPlace<Warps> place;
  if (place.row >= g.tokens) return;  // whole warps, or a whole block
  const int64_t at = source_row(g.gather, place.row) * g.x_row;
  const bf16* x = static_cast<const bf16*>(g.x) + at;
  const bf16 *weight = static_cast<const bf16*>(g.weight), *bias = static_cast<const bf16*>(g.bias);
  const bf16* residual = g.residual ? static_cast<const bf16*>(g.residual) + at : nullptr;
  bf16 *sum = g.residual ? static_cast<bf16*>(g.sum) + at : nullptr, *y = static_cast<bf16*>(g.y) + place.row * g.y_row;
  const bf16* normed = residual ? sum : x;

  Chunk kept[kKeptChunks];
  float total = 0;
  each_chunk<kThreads>(g.d, place.thread, [&](auto keep, int k, int64_t first, int64_t n) {
    Chunk v = load_chunk<Aligned>(x + first, n);
    if (residual) {
      const Chunk r = load_chunk<Aligned>(residual + first, n);
      SIMT_UNROLL
      for (int i = 0; i < kChunk; ++i) v[i] = to_bf16(to_float(v[i]) + to_float(r[i]));
      store_chunk<Aligned>(sum + first, n, v);
    }
    SIMT_UNROLL
    for (int i = 0; i < kChunk; ++i) total = total + to_float(v[i]);
    if constexpr (decltype(keep)::value) kept[k] = v;
  });
  const float mean = row_sum<Warps>(total, shared) / static_cast<float>(g.d);
  float squares = 0;
  each_chunk<kThreads>(g.d, place.thread, [&](auto keep, int k, int64_t first, int64_t n) {
    Chunk v;
    if constexpr (decltype(keep)::value)
      v = kept[k];
    else
      v = load_chunk<Aligned>(normed + first, n);
    SIMT_UNROLL
    for (int i = 0; i < kChunk; ++i) {
      const float distance = i < n ? to_float(v[i]) - mean : 0.0f;
      squares = fma(distance, distance, squares);
    }
  });
  const float variance = row_sum<Warps>(squares, shared + Warps) / static_cast<float>(g.d) + static_cast<float>(g.eps);
  const float rstd = 1.0f / square_root(variance);
  if (place.thread == 0) {
    st_global(static_cast<float*>(g.mean) + place.row, mean);
    st_global(static_cast<float*>(g.rstd) + place.row, rstd);
  }
  each_chunk<kThreads>(g.d, place.thread, [&](auto keep, int k, int64_t first, int64_t n) {
    Chunk v;
    if constexpr (decltype(keep)::value)
      v = kept[k];
    else
      v = load_chunk<Aligned>(normed + first, n);
    const Chunk w = load_chunk<Aligned>(weight + first, n), b = load_chunk<Aligned>(bias + first, n);
    SIMT_UNROLL
    for (int i = 0; i < kChunk; ++i) v[i] = to_bf16(fma((to_float(v[i]) - mean) * rstd, to_float(w[i]), to_float(b[i])));
    store_chunk<Aligned>(y + first, n, v);
  });
}

template <int Warps, bool Aligned>
static __global__ void __launch_bounds__(Warps == 1 ? 128 : 32 * Warps) layer_norm_backward_kernel(const LayerNormBackward g) {
  constexpr int kThreads = 32 * Warps;
  float* shared = dyn_smem<float>();
  const RowPlace<Warps> place;
  if (place.row >= g.tokens) return;
  const int64_t source = source_row(g.gather, place.row);
  const bf16 *x = static_cast<const bf16*>(g.x) + source * g.x_row, *weight = static_cast<const bf16*>(g.weight);
  const bf16* dy = static_cast<const bf16*>(g.dy) + place.row * g.dy_row;
  bf16* dx = static_cast<bf16*>(g.dx) + source * g.dx_row;
  const float centre = ld_global(static_cast<const float*>(g.mean) + place.row);
  const float rstd = ld_global(static_cast<const float*>(g.rstd) + place.row);

  Chunk kept_x[kKeptChunks], kept_dy[kKeptChunks];
  float sum_w = 0, sum_wh = 0;
  each_chunk<kThreads>(g.d, place.thread, [&](auto keep, int k, int64_t first, int64_t n) {
    const Chunk v = load_chunk<Aligned>(x + first, n), dv = load_chunk<Aligned>(dy + first, n);
    const Chunk w = load_chunk<Aligned>(weight + first, n);  // zeros beyond n, so that nothing is added there
    SIMT_UNROLL
    for (int i = 0; i < kChunk; ++i) {
      const float slope = to_float(dv[i]) * to_float(w[i]);
      sum_w = sum_w + slope;
      sum_wh = fma(slope, (to_float(v[i]) - centre) * rstd, sum_wh);
    }
    if constexpr (decltype(keep)::value) kept_x[k] = v, kept_dy[k] = dv;
  });
  const float mean_w = row_sum<Warps>(sum_w, shared) / static_cast<float>(g.d);
  const float mean_wh = row_sum<Warps>(sum_wh, shared + Warps) / static_cast<float>(g.d);
  each_chunk<kThreads>(g.d, place.thread, [&](auto keep, int k, int64_t first, int64_t n) {
    Chunk v, dv, before = {};
    if constexpr (decltype(keep)::value)
      v = kept_x[k], dv = kept_dy[k];
    else
      v = load_chunk<Aligned>(x + first, n), dv = load_chunk<Aligned>(dy + first, n);
    const Chunk w = load_chunk<Aligned>(weight + first, n);
    if (g.accumulate) before = load_chunk<Aligned>(dx + first, n);
    SIMT_UNROLL
    for (int i = 0; i < kChunk; ++i) {
      const float normal = (to_float(v[i]) - centre) * rstd;
      const float slope = rstd * ((to_float(dv[i]) * to_float(w[i]) - mean_w) - normal * mean_wh);
      v[i] = to_bf16(g.accumulate ? to_float(before[i]) + slope : slope);
    }
    store_chunk<Aligned>(dx + first, n, v);
  });
}

struct LayerNormColumns {  // dweight_j += dy_j h_j, dbias_j += dy_j
  static constexpr int kMatrices = 2, kSums = 2, kStatistics = 2;
  LayerNormBackward g;
  __device__ __forceinline__ const bf16* matrix(int m, int64_t row) const {
    return m == 0 ? static_cast<const bf16*>(g.dy) + row * g.dy_row
                  : static_cast<const bf16*>(g.x) + source_row(g.gather, row) * g.x_row;
  }
  __device__ __forceinline__ float statistic(int s, int64_t row) const {
    return ld_global(static_cast<const float*>(s == 0 ? g.mean : g.rstd) + row);
  }
  __device__ __forceinline__ float* sum(int s) const { return static_cast<float*>(s == 0 ? g.dweight : g.dbias); }
  __device__ __forceinline__ void add(const float* value, const float* statistic, float* sum) const {
    sum[0] = fma(value[0], (value[1] - statistic[0]) * statistic[1], sum[0]);
    sum[1] = sum[1] + value[0];
  }
};

inline void layer_norm(const LayerNorm& g, cudaStream_t stream) {
  const bool aligned = aligned_rows(g.x, g.x_row, g.d) && aligned_rows(g.residual, g.x_row, g.d) &&
                       aligned_rows(g.sum, g.x_row, g.d) && aligned_rows(g.weight, 0, g.d) && aligned_rows(g.bias, 0, g.d) &&
                       aligned_rows(g.y, g.y_row, g.d);
  if (g.d <= kWarpRow) {
    const RowLaunch<1> l(g.tokens);
    launch(aligned ? layer_norm_kernel<1, true> : layer_norm_kernel<1, false>, l.grid, l.block, 0, stream, g);
  } else {
    const RowLaunch<kWarpsOfLongRow> l(g.tokens);
    launch(aligned ? layer_norm_kernel<kWarpsOfLongRow, true> : layer_norm_kernel<kWarpsOfLongRow, false>, l.grid, l.block,
           2 * kWarpsOfLongRow * sizeof(float), stream, g);
  }
}

inline void layer_norm_backward(const LayerNormBackward& g, cudaStream_t stream) {
  const bool readable = aligned_rows(g.x, g.x_row, g.d) && aligned_rows(g.dy, g.dy_row, g.d);
  const bool aligned = readable && aligned_rows(g.weight, 0, g.d) && aligned_rows(g.dx, g.dx_row, g.d);
  if (g.dweight || g.dbias)
    column_chains(LayerNormColumns{g}, readable, g.tokens, g.d, stream);  // before dx may take x's place
  if (g.d <= kWarpRow) {
    const RowLaunch<1> l(g.tokens);
    launch(aligned ? layer_norm_backward_kernel<1, true> : layer_norm_backward_kernel<1, false>, l.grid, l.block, 0, stream, g);
  } else {
    const RowLaunch<kWarpsOfLongRow> l(g.tokens);
    launch(aligned ? layer_norm_backward_kernel<kWarpsOfLongRow, true> : layer_norm_backward_kernel<kWarpsOfLongRow, false>,
           l.grid, l.block, 2 * kWarpsOfLongRow * sizeof(float), stream, g);
  }
}

}  // namespace tutelage::cuda
