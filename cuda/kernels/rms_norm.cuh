// RMSNorm and its backward, as cpp/kernels/rms_norm.h states them.
//
// Types    x, residual, sum, weight, y, dy, dx bf16; rstd, dweight float. The row that is normed is the rounded sum, which the
//          backward reads again.
// Order    sums over a row: rows.cuh. dweight: columns.cuh.
// Work     forward reads and writes each element once (4 bytes; 8 with a residual), backward 6 bytes and then 4 for dweight.
// Test     tests/simt/test_rms_norm.cc.
#pragma once

#include "cuda/kernels/columns.cuh"
#include "cuda/kernels/rows.cuh"
#include "cuda/ptx/math.h"
#include "kernels/rms_norm.h"

namespace tutelage::cuda {

template <int Warps, bool Aligned>
static __global__ void __launch_bounds__(Warps == 1 ? 128 : 32 * Warps) rms_norm_kernel(const RmsNorm g) {
  constexpr int kThreads = 32 * Warps;
  float* shared = dyn_smem<float>();
  const RowPlace<Warps> place;
  if (place.row >= g.tokens * g.groups) return;  // whole warps, or a whole block
  const int64_t t = place.row / g.groups, inner = place.row % g.groups * g.d;
  const int64_t at = source_row(g.gather, t) * g.x_row + inner;
  const bf16 *x = static_cast<const bf16*>(g.x) + at, *weight = static_cast<const bf16*>(g.weight);
  const bf16* residual = g.residual ? static_cast<const bf16*>(g.residual) + at : nullptr;
  bf16 *sum = g.residual ? static_cast<bf16*>(g.sum) + at : nullptr, *y = static_cast<bf16*>(g.y) + t * g.y_row + inner;

  Chunk kept[kKeptChunks];
  float squares = 0;
  each_chunk<kThreads>(g.d, place.thread, [&](auto keep, int k, int64_t first, int64_t n) {
    Chunk v = load_chunk<Aligned>(x + first, n);
    if (residual) {
      const Chunk r = load_chunk<Aligned>(residual + first, n);
      SIMT_UNROLL
      for (int i = 0; i < kChunk; ++i) v[i] = to_bf16(to_float(v[i]) + to_float(r[i]));
      store_chunk<Aligned>(sum + first, n, v);
    }
    SIMT_UNROLL
    for (int i = 0; i < kChunk; ++i) squares = fma(to_float(v[i]), to_float(v[i]), squares);
    if constexpr (decltype(keep)::value) kept[k] = v;
  });
  const float mean_square = row_sum<Warps>(squares, shared) / static_cast<float>(g.d) + static_cast<float>(g.eps);
  const float rstd = 1.0f / square_root(mean_square);
  if (place.thread == 0) st_global(static_cast<float*>(g.rstd) + place.row, rstd);
  each_chunk<kThreads>(g.d, place.thread, [&](auto keep, int k, int64_t first, int64_t n) {
    Chunk v;
    if constexpr (decltype(keep)::value)
      v = kept[k];
    else
      v = load_chunk<Aligned>((residual ? sum : x) + first, n);
    const Chunk w = load_chunk<Aligned>(weight + first, n);
    SIMT_UNROLL
    for (int i = 0; i < kChunk; ++i) v[i] = to_bf16(to_float(v[i]) * rstd * to_float(w[i]));
    store_chunk<Aligned>(y + first, n, v);
  });
}

template <int Warps, bool Aligned>
static __global__ void __launch_bounds__(Warps == 1 ? 128 : 32 * Warps) rms_norm_backward_kernel(const RmsNormBackward g) {
  constexpr int kThreads = 32 * Warps;
  float* shared = dyn_smem<float>();
  const RowPlace<Warps> place;
  if (place.row >= g.tokens * g.groups) return;
  const int64_t t = place.row / g.groups, inner = place.row % g.groups * g.d, source = source_row(g.gather, t);
  const bf16 *x = static_cast<const bf16*>(g.x) + source * g.x_row + inner, *weight = static_cast<const bf16*>(g.weight);
  const bf16* dy = static_cast<const bf16*>(g.dy) + t * g.dy_row + inner;
  bf16* dx = static_cast<bf16*>(g.dx) + source * g.dx_row + inner;
  const float rstd = ld_global(static_cast<const float*>(g.rstd) + place.row);

  Chunk kept_x[kKeptChunks], kept_dy[kKeptChunks];
  float dot = 0;
  each_chunk<kThreads>(g.d, place.thread, [&](auto keep, int k, int64_t first, int64_t n) {
    const Chunk v = load_chunk<Aligned>(x + first, n), dv = load_chunk<Aligned>(dy + first, n);
    const Chunk w = load_chunk<Aligned>(weight + first, n);
    SIMT_UNROLL
    for (int i = 0; i < kChunk; ++i) dot = fma(to_float(dv[i]) * to_float(w[i]), to_float(v[i]) * rstd, dot);
    if constexpr (decltype(keep)::value) kept_x[k] = v, kept_dy[k] = dv;
  });
  const float mean = row_sum<Warps>(dot, shared) / static_cast<float>(g.d);
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
      const float slope = rstd * (to_float(dv[i]) * to_float(w[i]) - to_float(v[i]) * rstd * mean);
      v[i] = to_bf16(g.accumulate ? to_float(before[i]) + slope : slope);
    }
    store_chunk<Aligned>(dx + first, n, v);
  });
}

struct RmsNormColumns {  // dweight_j += dy_j (x_j rstd)
  static constexpr int kMatrices = 2, kSums = 1, kStatistics = 1;
  RmsNormBackward g;
  __device__ __forceinline__ const bf16* matrix(int m, int64_t row) const {
    const int64_t t = g.groups == 1 ? row : row / g.groups, inner = (row - t * g.groups) * g.d;
    return m == 0 ? static_cast<const bf16*>(g.dy) + t * g.dy_row + inner
                  : static_cast<const bf16*>(g.x) + source_row(g.gather, t) * g.x_row + inner;
  }
  __device__ __forceinline__ float statistic(int, int64_t row) const {
    return ld_global(static_cast<const float*>(g.rstd) + row);
  }
  __device__ __forceinline__ float* sum(int) const { return static_cast<float*>(g.dweight); }
  __device__ __forceinline__ void add(const float* value, const float* statistic, float* sum) const {
    sum[0] = fma(value[0], value[1] * statistic[0], sum[0]);
  }
};

inline void rms_norm(const RmsNorm& g, cudaStream_t stream) {
  const int64_t rows = g.tokens * g.groups;
  const bool aligned = aligned_rows(g.x, g.x_row, g.d) && aligned_rows(g.residual, g.x_row, g.d) &&
                       aligned_rows(g.sum, g.x_row, g.d) && aligned_rows(g.weight, 0, g.d) && aligned_rows(g.y, g.y_row, g.d);
  if (g.d <= kWarpRow) {
    const RowLaunch<1> l(rows);
    launch(aligned ? rms_norm_kernel<1, true> : rms_norm_kernel<1, false>, l.grid, l.block, 0, stream, g);
  } else {
    const RowLaunch<kWarpsOfLongRow> l(rows);
    launch(aligned ? rms_norm_kernel<kWarpsOfLongRow, true> : rms_norm_kernel<kWarpsOfLongRow, false>, l.grid, l.block,
           kWarpsOfLongRow * sizeof(float), stream, g);
  }
}

inline void rms_norm_backward(const RmsNormBackward& g, cudaStream_t stream) {
  const int64_t rows = g.tokens * g.groups;
  const bool readable = aligned_rows(g.x, g.x_row, g.d) && aligned_rows(g.dy, g.dy_row, g.d);
  const bool aligned = readable && aligned_rows(g.weight, 0, g.d) && aligned_rows(g.dx, g.dx_row, g.d);
  if (g.dweight) column_chains(RmsNormColumns{g}, readable, rows, g.d, stream);  // before dx, which may take x's place
  if (g.d <= kWarpRow) {
    const RowLaunch<1> l(rows);
    launch(aligned ? rms_norm_backward_kernel<1, true> : rms_norm_backward_kernel<1, false>, l.grid, l.block, 0, stream, g);
  } else {
    const RowLaunch<kWarpsOfLongRow> l(rows);
    launch(aligned ? rms_norm_backward_kernel<kWarpsOfLongRow, true> : rms_norm_backward_kernel<kWarpsOfLongRow, false>, l.grid,
           l.block, kWarpsOfLongRow * sizeof(float), stream, g);
  }
}

}  // namespace tutelage::cuda
