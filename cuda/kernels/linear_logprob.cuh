// Log-prob, log-sum-exp and entropy of target tokens from hidden states and the vocabulary matrix, and the backward, as
// cpp/kernels/linear_logprob.h states them.
//
// Types    x, weight, dx bf16; logits, statistics, dweight float; the gradient of a logit is rounded to bf16 before its
//          products.
// Order    a logit is matmul's chain, then divided by the temperature; the sums over the vocabulary are vocab_tiles.cuh's,
// which
//          sample.cuh shares: so a token has the same log-prob where it is drawn and where it is scored. dx: one chain over the
//          vocabulary. dweight: one chain over rows, step by step (row_steps), whatever the blocks of rows are.
// How      a tile of the product is as wide as a tile of the vocabulary, and what is wanted of its logits is computed where
// they
//          lie, in shared memory: forward, maximum and sums; backward, the gradient.
// Memory   forward 12 bytes a row and vocabulary tile; logits only where the caller keeps them. Backward: the gradients of a
//          block of rows (kGradientBytes), which the products with x and weight read; with kept logits they are written over
//          those, in the first half of each row.
// Work     forward 2, backward 4 (6 with the logits computed again) x rows x hidden x vocab flops; 2 bytes a logit backward.
// Test     tests/simt/test_linear_logprob.cc.   Benchmark  bench/gpu.py (linear_logprob).
#pragma once

#include "cuda/kernels/matmul.cuh"
#include "cuda/kernels/vocab_tiles.cuh"
#include "kernels/linear_logprob.h"

namespace tutelage::cuda {

// Gradients of a block of rows. Each block reads and writes dweight once, which with 128 MiB (1,280 rows of 49,152) is less
// than its products take.
constexpr int64_t kGradientBytes = int64_t(128) << 20;
constexpr int kLogitThreads = 256;

struct Logits {
  const bf16 *x, *weight;
  int64_t rows, hidden, vocab;
  float scale;  // 1 / temperature
};

// 64 rows (16 where rows are not aligned: slower, the same bits) and one tile of the vocabulary in 4 warps, by 3 stages: their
// 60 KiB are less than the sums need, of which two fit a multiprocessor of an A100 or an H100 (as do their registers).
template <bool Aligned>
using LogitShape = ProductShape<Aligned ? 64 : 16, kVocabTile, 1, 3, Lies::along, Lies::along, Aligned>;

// The logits, tile by tile; finish(g, tile, its first row, its first column): by the whole block, with the products (not yet
// scaled) in shared memory.
template <bool Aligned, class Finish>
static __global__ void __launch_bounds__(kProductThreads, LogitShape<Aligned>::kBlocks)
    logits_kernel(const Logits g, const Finish finish) {
  using Shape = LogitShape<Aligned>;
  const TilePlace place((g.rows + Shape::kM - 1) / Shape::kM, (g.vocab + kVocabTile - 1) / kVocabTile);
  const int64_t row = place.m * Shape::kM, column = place.n * kVocabTile;
  const Operand a{g.x, g.hidden, Shape::kM, row, g.rows, 0, 0};
  const Operand b{g.weight, g.hidden, kVocabTile, column, g.vocab, 0, 0};
  const ProductTile<Shape> tile(a, b);
  typename ProductTile<Shape>::Sums c;
  SIMT_UNROLL
  for (int i = 0; i < Shape::kSteps; ++i) SIMT_UNROLL
  for (int j = 0; j < Shape::kColumns; ++j) c[i][j][0] = c[i][j][1] = c[i][j][2] = c[i][j][3] = 0;
  tile.multiply(c, nullptr, static_cast<int>(g.hidden));
  tile.put(c, 0);
  __syncthreads();
  finish(g, tile, row, column);
}

template <class Finish>
void launch_logits(const Logits& g, const Finish& finish, cudaStream_t stream) {
  auto with = [&]<bool Aligned>() {
    using Shape = LogitShape<Aligned>;
    const int64_t blocks = (g.rows + Shape::kM - 1) / Shape::kM * vocab_tiles(g.vocab);
    launch(logits_kernel<Aligned, Finish>, static_cast<unsigned>(blocks), dim3(kProductThreads), Shape::kBytes, stream, g,
           finish);
  };
  if (aligned_rows(g.x, g.hidden, g.hidden) && aligned_rows(g.weight, g.hidden, g.hidden))
    with.template operator()<true>();
  else
    with.template operator()<false>();
}

// --- Forward

// What is wanted of a tile: its statistics, the target's logit where the tile has it, all logits where they are kept.
struct LogitStatistics {
  const int32_t* targets;
  TileStatistics* statistics;  // [rows, tiles]
  float *target, *z;           // [rows]; [rows, vocab] or null

  template <class Shape>
  __device__ __forceinline__ void operator()(const Logits& g, const ProductTile<Shape>&, int64_t first_row,
                                             int64_t first_column) const {
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(lane_id());
    const int n = static_cast<int>(g.vocab - first_column < kVocabTile ? g.vocab - first_column : kVocabTile);
    const int64_t tiles = (g.vocab + kVocabTile - 1) / kVocabTile, tile = first_column / kVocabTile;
    // Half a warp a row. The halves' rows are two apart: 2 x kPitch is 16 banks, so the lanes of a warp meet no bank twice.
    static_assert(2 * Shape::kPitch % 32 == 16 && Shape::kM % 8 == 0);
    for (int i = warp / 2 * 4 + warp % 2 + lane / kTileLanes * 2; i < Shape::kM; i += 8) {
      const int64_t row = first_row + i;
      const bool there = row < g.rows;
      const float* own = dyn_smem<float>() + i * Shape::kPitch;
      const TileStatistics s = tile_statistics(there ? n : 0, [&](int j) { return ld_shared(own + j) * g.scale; });
      if (!there || lane % kTileLanes != 0) continue;
      TileStatistics* to = statistics + row * tiles + tile;
      st_global(&to->top, s.top), st_global(&to->sum, s.sum), st_global(&to->weighted, s.weighted);
      const int64_t at = ld_global(targets + row) - first_column;
      if (at >= 0 && at < n) st_global(target + row, ld_shared(own + at) * g.scale);
    }
    if (z == nullptr) return;
    for (int i = warp; i < Shape::kM && first_row + i < g.rows; i += kProductThreads / 32)
      for (int j = lane; j < n; j += 32)
        st_global(z + (first_row + i) * g.vocab + first_column + j,
                  ld_shared(dyn_smem<float>() + i * Shape::kPitch + j) * g.scale);
  }
};

// One thread a row: the tiles' statistics merged.
static __global__ void __launch_bounds__(kLogitThreads)
    linear_logprob_kernel(const LinearLogprob g, const float* target, const TileStatistics* statistics) {
  const int64_t row = int64_t(blockIdx.x) * kLogitThreads + threadIdx.x;
  if (row >= g.rows) return;
  const int64_t count = (g.vocab + kVocabTile - 1) / kVocabTile;
  float top, log_sum, entropy;
  merge_tiles(statistics + row * count, count, &top, &log_sum, &entropy);
  const int64_t out = g.index != nullptr ? ld_global(g.index + row) : row;
  st_global(static_cast<float*>(g.logprob) + out, (ld_global(target + row) - top) - log_sum);
  st_global(static_cast<float*>(g.entropy) + out, entropy);
  st_global(static_cast<float*>(g.lse) + row, top + log_sum);
}

template <class Arguments>  // forward's or backward's, from row `begin` on
Logits logits_of(const Arguments& g, int64_t begin, int64_t rows) {
  return {static_cast<const bf16*>(g.x) + begin * g.hidden,
          static_cast<const bf16*>(g.weight),
          rows,
          g.hidden,
          g.vocab,
          static_cast<float>(1 / g.temperature)};
}

inline int64_t linear_logprob_scratch_bytes(const LinearLogprob& g) {
  return g.rows * (vocab_tiles(g.vocab) * static_cast<int64_t>(sizeof(TileStatistics)) + static_cast<int64_t>(sizeof(float)));
}

inline void linear_logprob(const LinearLogprob& g, cudaStream_t stream, void* scratch) {
  auto* statistics = static_cast<TileStatistics*>(scratch);
  auto* target = reinterpret_cast<float*>(statistics + g.rows * vocab_tiles(g.vocab));
  launch_logits(logits_of(g, 0, g.rows), LogitStatistics{g.targets, statistics, target, static_cast<float*>(g.z)}, stream);
  launch(linear_logprob_kernel, static_cast<unsigned>((g.rows + kLogitThreads - 1) / kLogitThreads), dim3(kLogitThreads), 0,
         stream, g, static_cast<const float*>(target), static_cast<const TileStatistics*>(statistics));
}

// --- Backward

// Of one row: d loss / d (x . weight_j) from z_j.
struct LogitGradient {
  float lse, entropy, d_logprob, d_entropy;  // the gradients divided by the temperature
  int64_t target;
  __device__ __forceinline__ LogitGradient(const LinearLogprobBackward& g, int64_t row, float inverse) {
    const int64_t in = g.index != nullptr ? ld_global(g.index + row) : row;
    lse = ld_global(static_cast<const float*>(g.lse) + row), entropy = ld_global(static_cast<const float*>(g.entropy) + in);
    d_logprob = ld_global(static_cast<const float*>(g.d_logprob) + in) * inverse;
    d_entropy = ld_global(static_cast<const float*>(g.d_entropy) + in) * inverse;
    target = ld_global(g.targets + row);
  }
  __device__ __forceinline__ float operator()(int64_t j, float distance) const {  // z_j - lse
    return (j == target ? d_logprob : 0.0f) - exponential(distance) * fma(d_entropy, distance + entropy, d_logprob);
  }
};

// Of a tile whose logits are computed again, rows from `begin` on: into dz.
struct LogitGradients {
  LinearLogprobBackward of;
  int64_t begin;
  bf16* dz;
  int64_t pitch;

  template <class Shape>
  __device__ __forceinline__ void operator()(const Logits& g, const ProductTile<Shape>& tile, int64_t, int64_t) const {
    tile.each_chunk(0, kVocabTile, [&](int64_t row, int64_t column, int n, float* sums) {
      const LogitGradient gradient(of, begin + row, g.scale);
      const Eight z = tile.load_sums(sums);
      Eight d;
      SIMT_UNROLL
      for (int e = 0; e < kChunk; ++e) d[e] = gradient(column + e, z[e] * g.scale - gradient.lse);
      store_eight(dz + row * pitch + column, d, n, n == kChunk);
    });
  }
};

// A block a row: over kept logits; the row's pitch stays 4 vocab bytes.
static __global__ void __launch_bounds__(kLogitThreads)
    logit_gradient_kernel(const LinearLogprobBackward g, float* z, float inverse) {
  const int64_t row = blockIdx.x;
  const int thread = static_cast<int>(threadIdx.x);
  const LogitGradient gradient(g, row, inverse);
  const float* from = z + row * g.vocab;
  auto* to = reinterpret_cast<bf16*>(z + row * g.vocab);
  constexpr int kEach = 4;
  for (int64_t first = 0; first < g.vocab; first += kEach * kLogitThreads) {
    float x[kEach];
    SIMT_UNROLL
    for (int i = 0; i < kEach; ++i) {
      const int64_t j = first + i * kLogitThreads + thread;
      x[i] = j < g.vocab ? ld_global(from + j) - gradient.lse : 0.0f;
    }
    __syncthreads();  // all have read what is written over now; what comes next lies further on
    SIMT_UNROLL
    for (int i = 0; i < kEach; ++i) {
      const int64_t j = first + i * kLogitThreads + thread;
      if (j < g.vocab) st_global(to + j, to_bf16(gradient(j, x[i])));
    }
  }
}

// Gradients of a block of rows that are computed again: rows, whole tiles of matmul's, and what lies between two of them, a
// multiple of 16 bytes.
inline int64_t gradient_pitch(int64_t vocab) { return (vocab + kChunk - 1) / kChunk * kChunk; }
inline int64_t gradient_rows(int64_t rows, int64_t vocab, int64_t bytes) {
  const int64_t fit = bytes / (2 * gradient_pitch(vocab)) / 128 * 128, most = fit > 128 ? fit : 128;
  return rows < most ? rows : most;
}

// `bytes`: what a block's gradients may take (at least 128 rows); block_rows is the CPU's measure.
inline int64_t linear_logprob_backward_scratch_bytes(const LinearLogprobBackward& g, int64_t bytes = kGradientBytes) {
  if (g.z != nullptr) return 0;
  return gradient_rows(g.rows, g.vocab, bytes) * gradient_pitch(g.vocab) * static_cast<int64_t>(sizeof(bf16));
}

inline void linear_logprob_backward(const LinearLogprobBackward& g, cudaStream_t stream, void* scratch,
                                    int64_t bytes = kGradientBytes) {
  const int64_t block = g.z != nullptr ? g.rows : gradient_rows(g.rows, g.vocab, bytes);
  const int64_t pitch = g.z != nullptr ? 2 * g.vocab : gradient_pitch(g.vocab);
  auto* const dz = static_cast<bf16*>(g.z != nullptr ? g.z : scratch);
  const auto* x = static_cast<const bf16*>(g.x);
  int64_t step = 0;  // the first of the block
  for (int64_t begin = 0; begin < g.rows;) {
    int64_t end = g.rows, next = g.row_step_count;
    if (g.row_steps != nullptr && end - begin > block) {  // as many whole steps as fit; a step has at most 16 rows
      for (next = step; g.row_steps_host[2 * next] + g.row_steps_host[2 * next + 1] - begin <= block; ++next) {
      }
      end = g.row_steps_host[2 * next];
    } else if (end - begin > block) {
      end = begin + block;
    }
    const int64_t rows = end - begin;
    const Logits logits = logits_of(g, begin, rows);
    if (g.z == nullptr)
      launch_logits(logits, LogitGradients{g, begin, dz, pitch}, stream);
    else
      launch(logit_gradient_kernel, static_cast<unsigned>(rows), dim3(kLogitThreads), 0, stream, g, static_cast<float*>(g.z),
             logits.scale);
    if (g.dx != nullptr) {
      Matmul dx;
      dx.m = rows, dx.n = g.hidden, dx.k = g.vocab, dx.a = dz, dx.a_row = pitch, dx.b = g.weight, dx.b_row = g.hidden,
      dx.b_col = 1;
      dx.c = static_cast<bf16*>(g.dx) + begin * g.hidden, dx.c_row = g.hidden;
      matmul(dx, stream);
    }
    if (g.dweight != nullptr) {
      Matmul dw;
      dw.m = g.vocab, dw.n = g.hidden, dw.k = rows, dw.a = dz, dw.a_row = 1, dw.a_col = pitch;
      dw.b = x + begin * g.hidden, dw.b_row = g.hidden, dw.b_col = 1;
      dw.c = g.dweight, dw.c_row = g.hidden, dw.c_state = true, dw.accumulate = g.accumulate || begin > 0;
      if (g.row_steps != nullptr) {  // which count rows from the first of all
        dw.k_steps = g.row_steps + 2 * step, dw.k_step_count = next - step;
        dw.a = dz - begin * pitch, dw.b = x;
      }
      matmul(dw, stream);
    }
    begin = end, step = next;
  }
}

}  // namespace tutelage::cuda
