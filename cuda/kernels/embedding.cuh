// Embedding look-up and the gradient of a table, as cpp/kernels/embedding.h states them.
//
// Types    table, position_table, y, dy bf16 (dy float with dy_state); dtable float; ids, positions int32.
// Order    a row of dtable is ONE chain over its tokens in order, continued from what it holds. No atomics: the block of a
// token
//          returns unless it is the first with its id; that one finds the later ones, in order, and adds them all.
// Work     forward 4 bytes an element. Backward 2 bytes an element of dy, 8 of every row that occurs; and a scan of ids of
//          tokens^2 / 2 comparisons, 256 at a time (8,192 tokens: 1.3e5 steps of a block, from cache).
// Test     tests/simt/test_embedding.cc.
#pragma once

#include "cuda/kernels/elementwise.cuh"
#include "kernels/embedding.h"

namespace tutelage::cuda {

template <int N>
static __global__ void __launch_bounds__(kElementThreads) embedding_kernel(const Embedding g) {
  const int64_t at = element_thread() * N, t = at / g.d, j = at - t * g.d;
  if (t >= g.tokens) return;
  const int64_t id = ld_global(g.ids + t);
  Floats<N> v = load_floats<N>(static_cast<const bf16*>(g.table) + id * g.d + j);
  if (g.position_table) {
    const int64_t position = ld_global(g.positions + t);
    const Floats<N> p = load_floats<N>(static_cast<const bf16*>(g.position_table) + position * g.d + j);
    SIMT_UNROLL
    for (int i = 0; i < N; ++i) v[i] = v[i] + p[i];
  }
  store_floats<N>(static_cast<bf16*>(g.y) + at, v);
}

constexpr int kScanThreads = 256;

__device__ __forceinline__ float as_number(bf16 x) { return to_float(x); }
__device__ __forceinline__ float as_number(float x) { return x; }

template <class T>  // of dy
static __global__ void __launch_bounds__(kScanThreads) embedding_backward_kernel(const EmbeddingBackward g) {
  auto* votes = dyn_smem<std::uint32_t>();  // [2][warps]: double, so that one barrier a step is enough
  constexpr int kWarps = kScanThreads / 32;
  const int64_t own = blockIdx.x, thread = threadIdx.x;
  const int32_t id = ld_global(g.ids + own);
  int turn = 0;
  // Which of tokens [first, first + kScanThreads) within [begin, end) have this id: a bit each, for all threads.
  auto matches = [&](int64_t first, int64_t begin, int64_t end) {
    std::uint32_t* mine = votes + turn * kWarps;
    turn ^= 1;
    const int64_t t = first + thread;
    const std::uint32_t vote = ballot(t >= begin && t < end && ld_global(g.ids + t) == id);
    if (lane_id() == 0) st_shared(mine + threadIdx.x / 32, vote);
    __syncthreads();
    return mine;
  };
  for (int64_t first = 0; first < own; first += kScanThreads) {
    const std::uint32_t* found = matches(first, 0, own);
    std::uint32_t any = 0;
    SIMT_UNROLL
    for (int w = 0; w < kWarps; ++w) any |= ld_shared(found + w);
    if (any) return;  // the whole block: an earlier token has this id
  }
  // Columns in passes of a few registers; nearly always one pass is enough.
  constexpr int kPerThread = 8;
  const T* dy = static_cast<const T*>(g.dy);
  float* row = static_cast<float*>(g.dtable) + id * g.d;
  for (int64_t column0 = 0; column0 < g.d; column0 += kPerThread * kScanThreads) {
    float sums[kPerThread];
    auto each = [&](auto f) {
      SIMT_UNROLL
      for (int i = 0; i < kPerThread; ++i) {
        const int64_t j = column0 + i * kScanThreads + thread;
        if (j < g.d) f(i, j);
      }
    };
    each([&](int i, int64_t j) { sums[i] = ld_global(row + j); });
    for (int64_t first = own - own % kScanThreads; first < g.tokens; first += kScanThreads) {
      const std::uint32_t* found = matches(first, own, g.tokens);
      for (int w = 0; w < kWarps; ++w)
        for (std::uint32_t bits = ld_shared(found + w); bits != 0; bits &= bits - 1) {
#if defined(__CUDA_ARCH__)
          const int bit = __ffs(static_cast<int>(bits)) - 1;
#else
          const int bit = __builtin_ctz(bits);
#endif
          const int64_t t = first + w * 32 + bit;
          each([&](int i, int64_t j) { sums[i] = sums[i] + as_number(ld_global(dy + t * g.d + j)); });
        }
    }
    each([&](int i, int64_t j) { st_global(row + j, sums[i]); });
  }
}

inline void embedding(const Embedding& g, cudaStream_t stream) {
  const int64_t n = g.tokens * g.d;
  const bool aligned =
      aligned_rows(g.table, g.d, g.d) && aligned_rows(g.position_table, g.d, g.d) && aligned_rows(g.y, g.d, g.d);
  launch(aligned ? embedding_kernel<8> : embedding_kernel<1>, element_grid(aligned ? n / 8 : n), dim3(kElementThreads), 0,
         stream, g);
}

inline void embedding_backward(const EmbeddingBackward& g, cudaStream_t stream) {
  launch(g.dy_state ? embedding_backward_kernel<float> : embedding_backward_kernel<bf16>, dim3(static_cast<unsigned>(g.tokens)),
         dim3(kScanThreads), 2 * kScanThreads / 32 * sizeof(std::uint32_t), stream, g);
}

}  // namespace tutelage::cuda
