// The softmax over a vocabulary, tile by tile: what linear_logprob (scoring) and sample (generating) share, so that a token's
// log-prob has the same bits in both (P2). The CPU's definitions (cpp/kernels/linear_logprob.inc), operation by operation.
//
// Order    a tile's 256 logits in 16 lanes (lane i: elements i, i + 16, …, one chain) and the fixed tree; the tiles merged in
//          index order.
// Test     tests/simt/test_sample.cc (memcmp with the CPU's kernels).
#pragma once

#include <cstdint>

#include "cuda/kernels/arguments.h"
#include "cuda/kernels/math.cuh"
#include "cuda/ptx/memory.h"
#include "cuda/ptx/warp.h"

namespace tutelage::cuda {

using std::int32_t;
using std::int64_t;

constexpr int kVocabTile = 256, kTileLanes = 16, kTileLinks = kVocabTile / kTileLanes;

inline int64_t vocab_tiles(int64_t vocab) { return (vocab + kVocabTile - 1) / kVocabTile; }

// Within each half of a warp: the tree of the CPU (lane i with lane i + 8, then + 4, + 2, + 1); all 16 lanes get its root.
__device__ __forceinline__ float half_warp_sum(float x) {
  SIMT_UNROLL
  for (unsigned mask = 8; mask > 0; mask /= 2) x = x + shfl_xor(x, mask);
  return x;
}
__device__ __forceinline__ float half_warp_max(float x) {
  SIMT_UNROLL
  for (unsigned mask = 8; mask > 0; mask /= 2) {
    const float other = shfl_xor(x, mask);
    // lane i < mask holds the tree's left operand; where neither is larger (equal, or a NaN) the right one stays, as there
    const bool left = (lane_id() & mask) == 0;
    x = left ? larger(x, other) : larger(other, x);
  }
  return x;
}

// The half-warp's tile: `value(j)` is its j-th logit, read for j < n. Both halves of a warp take part, with n = 0 for none.
template <class Value>
__device__ __forceinline__ TileStatistics tile_statistics(int n, Value value) {
  const int lane = static_cast<int>(lane_id()) % kTileLanes;
  float z[kTileLinks];
  const float first = n > 0 ? value(0) : 0.0f;
  float most = first;
  SIMT_UNROLL
  for (int i = 0; i < kTileLinks; ++i) {
    z[i] = i * kTileLanes + lane < n ? value(i * kTileLanes + lane) : first;
    if (i * kTileLanes < n) most = larger(most, z[i]);
  }
  const float top = half_warp_max(most);
  float sum = 0, weighted = 0;
  SIMT_UNROLL
  for (int i = 0; i < kTileLinks; ++i)
    if (i * kTileLanes < n) {
      const bool there = i * kTileLanes + lane < n;
      const float distance = there ? z[i] - top : top - top;
      const float e = there ? exponential(distance) : 0.0f;
      sum = sum + e;
      weighted = fma(e, distance, weighted);
    }
  return {top, half_warp_sum(sum), half_warp_sum(weighted)};
}

// Tiles [count] in index order into the row's maximum, log sum exp(z - maximum) and entropy; by one thread.
__device__ __forceinline__ void merge_tiles(const TileStatistics* tiles, int64_t count, float* top_out, float* log_sum,
                                            float* entropy) {
  float top = ld_global(&tiles[0].top);
  for (int64_t t = 1; t < count; ++t) {
    const float own = ld_global(&tiles[t].top);
    top = own > top ? own : top;
  }
  float sum = 0, weighted = 0;
  for (int64_t t = 0; t < count; ++t) {
    const float shift = ld_global(&tiles[t].top) - top, factor = exponential(shift), own = ld_global(&tiles[t].sum);
    sum = fma(own, factor, sum);
    weighted = fma(fma(own, shift, ld_global(&tiles[t].weighted)), factor, weighted);
  }
  *top_out = top;
  *log_sum = logarithm(sum);
  *entropy = *log_sum - weighted / sum;
}

// The statistics of z [rows, vocab], half a warp a tile.
static __global__ void __launch_bounds__(256)
    tile_statistics_kernel(const float* z, int64_t rows, int64_t vocab, TileStatistics* out) {
  const int64_t tiles = (vocab + kVocabTile - 1) / kVocabTile;
  const int64_t own = (int64_t(blockIdx.x) * 256 + threadIdx.x) / kTileLanes, row = own / tiles, t = own - row * tiles;
  const bool there = row < rows;
  const float* from = z + (there ? row * vocab + t * kVocabTile : 0);
  const int n = !there ? 0 : static_cast<int>(vocab - t * kVocabTile < kVocabTile ? vocab - t * kVocabTile : kVocabTile);
  const TileStatistics s = tile_statistics(n, [&](int j) { return ld_global(from + j); });
  if (there && threadIdx.x % kTileLanes == 0) {
    st_global(&out[own].top, s.top), st_global(&out[own].sum, s.sum), st_global(&out[own].weighted, s.weighted);
  }
}

inline void tile_statistics_of(const float* z, int64_t rows, int64_t vocab, TileStatistics* out, cudaStream_t stream) {
  const int64_t threads = rows * vocab_tiles(vocab) * kTileLanes;
  launch(tile_statistics_kernel, dim3(static_cast<unsigned>((threads + 255) / 256)), dim3(256), 0, stream, z, rows, vocab, out);
}

}  // namespace tutelage::cuda
