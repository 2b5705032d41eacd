// Sums of a vector in one fixed order, and its sum of squares (for the gradient norm), as cpp/kernels/total.h states them.
//
// Types    x, out float; sum_of_squares in double from blocks in float.
// Order    blocks of kSumBlock elements counted from the segment's start. In a block thread i adds elements i, i + 256, … in
// one
//          chain; then the butterfly of a warp, then the warps in order. A segment's blocks are added in order. For
//          sum_of_squares kPartBlocks of them make a part, in order; thread i of the last step adds parts i, i + 256, …, then
//          butterfly and warps. All of it is a function of the segment's length (of n) alone.
// Work     reads x once.
// Test     tests/simt/test_total.cc.
#pragma once

#include <cstdint>

#include "cuda/kernels/rows.cuh"
#include "kernels/total.h"

namespace tutelage::cuda {

constexpr int kSumThreads = 256, kSumWarps = kSumThreads / 32;
constexpr int64_t kSumBlock = 4096, kPartBlocks = 64;

// The sum over a block of threads, the same bits in all of them. shared: kSumWarps values that nobody reads any more.
template <class T>
__device__ __forceinline__ T block_sum(T x, T* shared) {
  if constexpr (sizeof(T) == 4) {
    x = warp_sum(x);
  } else {  // a double goes through shuffles in halves
    SIMT_UNROLL
    for (unsigned mask = 16; mask > 0; mask /= 2) {
      Pack<std::uint32_t, 2> halves;
      __builtin_memcpy(&halves, &x, 8);
      halves[0] = shfl_xor(halves[0], mask);
      halves[1] = shfl_xor(halves[1], mask);
      T other;
      __builtin_memcpy(&other, &halves, 8);
      x = x + other;
    }
  }
  if (lane_id() == 0) st_shared(shared + threadIdx.x / 32, x);
  __syncthreads();
  x = 0;
  SIMT_UNROLL
  for (int i = 0; i < kSumWarps; ++i) x = x + ld_shared(shared + i);
  return x;
}

static __global__ void __launch_bounds__(kSumThreads) total_kernel(const Total g) {
  float* shared = dyn_smem<float>();  // [2][kSumWarps]: double, so that one barrier a block is enough
  const int64_t begin = g.cu_seqlens ? ld_global(g.cu_seqlens + blockIdx.x) : 0;
  const int64_t n = g.cu_seqlens ? ld_global(g.cu_seqlens + blockIdx.x + 1) - begin : g.n;
  const float* x = static_cast<const float*>(g.x) + begin;
  const auto* mask = g.mask ? reinterpret_cast<const std::uint8_t*>(g.mask) + begin : nullptr;
  float total = 0;
  int turn = 0;
  for (int64_t first = 0; first < n; first += kSumBlock) {
    float sum = 0;
    for (int64_t i = first + threadIdx.x; i < n && i < first + kSumBlock; i += kSumThreads)
      sum = sum + (mask && ld_global(mask + i) == 0 ? 0.0f : ld_global(x + i));
    total = total + block_sum(sum, shared + turn * kSumWarps);
    turn ^= 1;
  }
  if (threadIdx.x == 0) st_global(static_cast<float*>(g.out) + blockIdx.x, total);
}

static __global__ void __launch_bounds__(kSumThreads) squares_kernel(const float* x, int64_t n, double* parts) {
  float* shared = dyn_smem<float>();
  double part = 0;
  int turn = 0;
  const int64_t begin = int64_t(blockIdx.x) * kPartBlocks * kSumBlock;
  for (int64_t first = begin; first < n && first < begin + kPartBlocks * kSumBlock; first += kSumBlock) {
    float sum = 0;
    for (int64_t i = first + threadIdx.x; i < n && i < first + kSumBlock; i += kSumThreads) {
      const float v = ld_global(x + i);
      sum = sum + v * v;
    }
    part = part + static_cast<double>(block_sum(sum, shared + turn * kSumWarps));
    turn ^= 1;
  }
  if (threadIdx.x == 0) st_global(parts + blockIdx.x, part);
}

static __global__ void __launch_bounds__(kSumThreads) add_parts_kernel(const double* parts, int64_t count, double* out) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kSumThreads) sum = sum + ld_global(parts + i);
  sum = block_sum(sum, dyn_smem<double>());
  if (threadIdx.x == 0) st_global(out, sum);
}

inline void total(const Total& g, cudaStream_t stream) {
  const int64_t segments = g.cu_seqlens ? g.segments : 1;
  launch(total_kernel, dim3(static_cast<unsigned>(segments)), dim3(kSumThreads), 2 * kSumWarps * sizeof(float), stream, g);
}

// How many doubles of scratch memory sum_of_squares wants for n elements.
inline int64_t squares_parts(int64_t n) { return (n + kPartBlocks * kSumBlock - 1) / (kPartBlocks * kSumBlock); }

// g.out and parts on the device; parts [squares_parts(n)].
inline void sum_of_squares(const SumOfSquares& g, double* parts, cudaStream_t stream) {
  const int64_t count = squares_parts(g.n);
  launch(squares_kernel, dim3(static_cast<unsigned>(count)), dim3(kSumThreads), 2 * kSumWarps * sizeof(float), stream,
         static_cast<const float*>(g.x), g.n, parts);
  launch(add_parts_kernel, 1, dim3(kSumThreads), kSumWarps * sizeof(double), stream, static_cast<const double*>(parts), count,
         g.out);
}

}  // namespace tutelage::cuda
