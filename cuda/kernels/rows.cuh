// What the kernels that walk along rows share: eight neighbours at a time, and sums over a row in one fixed order.
//
// Order    a row of d elements is cut into chunks of 8; thread i of the row's Threads takes chunks i, i + Threads, … and adds
//          their elements in one chain; the threads' sums go through a butterfly within each warp (distance 16, 8, 4, 2, 1) and
//          the warps' in index order. All of it is a function of d alone: neither of the number of rows nor of where they lie.
// Test     tests/simt/test_rms_norm.cc, test_layer_norm.cc.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/ptx/memory.h"
#include "cuda/ptx/warp.h"

namespace tutelage::cuda {

using std::int32_t;
using std::int64_t;

constexpr int kChunk = 8;       // bf16 in a 16-byte access
constexpr int kKeptChunks = 4;  // of a thread, in registers between two walks along a row: 4 x 4 registers

// Rows up to this long belong to one warp (32 x 8 x kKeptChunks elements fit its registers), longer ones to a block of 8 warps.
constexpr int64_t kWarpRow = 32 * kChunk * kKeptChunks;
constexpr int kWarpsOfLongRow = 8, kWarpsOfBlock = 4;

using Chunk = Pack<bf16, kChunk>;

// The first n of 8 neighbours, zeros beyond. Aligned: n is 8, and the address a multiple of 16.
template <bool Aligned>
__device__ __forceinline__ Chunk load_chunk(const bf16* p, int64_t n) {
  if constexpr (Aligned) {
    return ld_global(reinterpret_cast<const Chunk*>(p));
  } else {
    Chunk c;
    SIMT_UNROLL
    for (int i = 0; i < kChunk; ++i) c[i] = i < n ? ld_global(p + i) : bf16{0};
    return c;
  }
}
template <bool Aligned>
__device__ __forceinline__ void store_chunk(bf16* p, int64_t n, const Chunk& c) {
  if constexpr (Aligned) {
    st_global(reinterpret_cast<Chunk*>(p), c);
  } else {
    SIMT_UNROLL
    for (int i = 0; i < kChunk; ++i)
      if (i < n) st_global(p + i, c[i]);
  }
}

// Whether rows of d elements, `pitch` apart, can be read 16 bytes at a time from here.
inline bool aligned_rows(const void* p, int64_t pitch, int64_t d) {
  return reinterpret_cast<std::uintptr_t>(p) % 16 == 0 && pitch % kChunk == 0 && d % kChunk == 0;
}

// f(kept, k, first, n) for each of a thread's chunks: the k-th, elements [first, first + n) of the row. `kept` is
// std::true_type for the first kKeptChunks, whose k is known when the loop is unrolled, so that they may index registers.
template <int Threads, class F>
__device__ __forceinline__ void each_chunk(int64_t d, int thread, F f) {
  SIMT_UNROLL
  for (int k = 0; k < kKeptChunks; ++k) {
    const int64_t first = int64_t(k * Threads + thread) * kChunk;
    if (first < d) f(std::true_type(), k, first, d - first < kChunk ? d - first : int64_t(kChunk));
  }
  for (int64_t first = int64_t(kKeptChunks * Threads + thread) * kChunk; first < d; first += Threads * kChunk)
    f(std::false_type(), 0, first, d - first < kChunk ? d - first : int64_t(kChunk));
}

__device__ __forceinline__ float warp_sum(float x) {
  SIMT_UNROLL
  for (unsigned mask = 16; mask > 0; mask /= 2) x = x + shfl_xor(x, mask);
  return x;
}

// The sum over the threads of a row; every thread of it gets the same bits. shared: Warps floats of which no earlier sum's
// reader can be late (another place for each sum of a kernel).
template <int Warps>
__device__ __forceinline__ float row_sum(float x, float* shared) {
  x = warp_sum(x);
  if constexpr (Warps > 1) {
    if (lane_id() == 0) st_shared(shared + threadIdx.x / 32, x);
    __syncthreads();
    x = 0;
    SIMT_UNROLL
    for (int i = 0; i < Warps; ++i) x = x + ld_shared(shared + i);
  }
  return x;
}

// How rows are dealt out to blocks: a warp each, or a block of kWarpsOfLongRow warps each.
template <int Warps>
struct RowPlace {
  int64_t row;
  int thread;  // within the row
  __device__ __forceinline__ RowPlace()
      : row(Warps == 1 ? int64_t(blockIdx.x) * kWarpsOfBlock + threadIdx.x / 32 : int64_t(blockIdx.x)),
        thread(static_cast<int>(Warps == 1 ? threadIdx.x % 32 : threadIdx.x)) {}
};
template <int Warps>
struct RowLaunch {
  dim3 grid, block;
  explicit RowLaunch(int64_t rows)
      : grid(static_cast<unsigned>(Warps == 1 ? (rows + kWarpsOfBlock - 1) / kWarpsOfBlock : rows)),
        block(32 * (Warps == 1 ? kWarpsOfBlock : Warps)) {}
};

__device__ __forceinline__ int64_t source_row(const int32_t* gather, int64_t t) { return gather ? ld_global(gather + t) : t; }

}  // namespace tutelage::cuda
