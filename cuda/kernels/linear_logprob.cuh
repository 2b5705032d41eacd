// Log-prob, log-sum-exp and entropy of target tokens from hidden states and the vocabulary matrix, and the backward, as
// cpp/kernels/linear_logprob.h states them.
//
// Types    x, weight, dx bf16; logits, statistics, dweight float; the gradient of a logit is rounded to bf16 before its
// products. Order    a logit is matmul's chain, then divided by the temperature; the sums over the vocabulary are
// vocab_tiles.cuh's, which
//          sample.cuh shares: so a token has the same log-prob where it is drawn and where it is scored. dx: one chain over the
//          vocabulary. dweight: one chain over rows, step by step (row_steps), whatever the blocks of rows are.
// Memory   logits of a block of rows at a time (kLogitBytes) where the caller does not keep them; the backward writes the bf16
//          gradient of a logit over the logits, in the first half of each row.
// Work     forward 2, backward 4 (6 with the logits computed again) x rows x hidden x vocab flops; 8 bytes a logit forward.
// Test     tests/simt/test_linear_logprob.cc.   Benchmark  bench/gpu.py (linear_logprob).
#pragma once

#include "cuda/kernels/matmul.cuh"
#include "cuda/kernels/vocab_tiles.cuh"
#include "kernels/linear_logprob.h"

namespace tutelage::cuda {

// Logits of a block of rows. Each block reads and writes dweight once, which with 256 MiB (1,365 rows of 49,152) is less than
// its products take.
constexpr int64_t kLogitBytes = int64_t(256) << 20;
constexpr int kLogitThreads = 256;

inline Matmul logits_of(const bf16* x, const void* weight, float* z, int64_t rows, int64_t hidden, int64_t vocab,
                        double scale) {
  Matmul m;
  m.m = rows, m.n = vocab, m.k = hidden, m.a = x, m.a_row = hidden, m.b = weight, m.b_row = 1, m.b_col = hidden;
  m.c = z, m.c_row = vocab, m.c_state = true, m.scale = scale;
  return m;
}
// Rows of a block, whole tiles of matmul's.
inline int64_t logit_rows(int64_t rows, int64_t vocab) {
  const int64_t most = kLogitBytes / (4 * vocab) / 128 * 128;
  return rows < most ? rows : most > 128 ? most : rows < 128 ? rows : 128;
}

// One thread a row: z of the row's target, the tiles' statistics.
static __global__ void __launch_bounds__(kLogitThreads)
    linear_logprob_kernel(const LinearLogprob g, int64_t begin, int64_t end, const float* z, const TileStatistics* tiles) {
  const int64_t in_block = int64_t(blockIdx.x) * kLogitThreads + threadIdx.x, row = begin + in_block;
  if (row >= end) return;
  const int64_t count = (g.vocab + kVocabTile - 1) / kVocabTile;
  float top, log_sum, entropy;
  merge_tiles(tiles + in_block * count, count, &top, &log_sum, &entropy);
  const int64_t out = g.index != nullptr ? ld_global(g.index + row) : row;
  const float target = ld_global(z + in_block * g.vocab + ld_global(g.targets + row));
  st_global(static_cast<float*>(g.logprob) + out, (target - top) - log_sum);
  st_global(static_cast<float*>(g.entropy) + out, entropy);
  st_global(static_cast<float*>(g.lse) + row, top + log_sum);
}

inline int64_t linear_logprob_scratch_bytes(const LinearLogprob& g) {
  const int64_t rows = logit_rows(g.rows, g.vocab), tiles = vocab_tiles(g.vocab);
  return rows * tiles * static_cast<int64_t>(sizeof(TileStatistics)) + (g.z != nullptr ? 0 : rows * g.vocab * 4);
}

inline void linear_logprob(const LinearLogprob& g, cudaStream_t stream, void* scratch) {
  const int64_t block = logit_rows(g.rows, g.vocab);
  auto* own = static_cast<float*>(scratch);
  auto* tiles = reinterpret_cast<TileStatistics*>(own + (g.z != nullptr ? 0 : block * g.vocab));
  for (int64_t begin = 0; begin < g.rows; begin += block) {
    const int64_t rows = g.rows - begin < block ? g.rows - begin : block;
    float* z = g.z != nullptr ? static_cast<float*>(g.z) + begin * g.vocab : own;
    matmul(logits_of(static_cast<const bf16*>(g.x) + begin * g.hidden, g.weight, z, rows, g.hidden, g.vocab, 1 / g.temperature),
           stream);
    tile_statistics_of(z, rows, g.vocab, tiles, stream);
    launch(linear_logprob_kernel, static_cast<unsigned>((rows + kLogitThreads - 1) / kLogitThreads), dim3(kLogitThreads), 0,
           stream, g, begin, begin + rows, static_cast<const float*>(z), static_cast<const TileStatistics*>(tiles));
  }
}

// A block a row: the gradient of (x . weight_j), bf16, over the logits; the row's pitch stays 4 vocab bytes.
static __global__ void __launch_bounds__(kLogitThreads)
    logit_gradient_kernel(const LinearLogprobBackward g, int64_t begin, float* z, float inverse) {
  const int64_t row = begin + blockIdx.x, in = g.index != nullptr ? ld_global(g.index + row) : row;
  const int thread = static_cast<int>(threadIdx.x);
  const float lse = ld_global(static_cast<const float*>(g.lse) + row);
  const float entropy = ld_global(static_cast<const float*>(g.entropy) + in);
  const float dl = ld_global(static_cast<const float*>(g.d_logprob) + in) * inverse;
  const float de = ld_global(static_cast<const float*>(g.d_entropy) + in) * inverse;
  const int64_t target = ld_global(g.targets + row);
  const float* from = z + int64_t(blockIdx.x) * g.vocab;
  auto* to = reinterpret_cast<bf16*>(z + int64_t(blockIdx.x) * g.vocab);
  constexpr int kEach = 4;
  for (int64_t first = 0; first < g.vocab; first += kEach * kLogitThreads) {
    float x[kEach];
    SIMT_UNROLL
    for (int i = 0; i < kEach; ++i) {
      const int64_t j = first + i * kLogitThreads + thread;
      x[i] = j < g.vocab ? ld_global(from + j) - lse : 0.0f;
    }
    __syncthreads();  // all have read what is written over now; what comes next lies further on
    SIMT_UNROLL
    for (int i = 0; i < kEach; ++i) {
      const int64_t j = first + i * kLogitThreads + thread;
      if (j < g.vocab) st_global(to + j, to_bf16((j == target ? dl : 0.0f) - exponential(x[i]) * fma(de, x[i] + entropy, dl)));
    }
  }
}

inline int64_t linear_logprob_backward_scratch_bytes(const LinearLogprobBackward& g) {
  return g.z != nullptr ? 0 : logit_rows(g.rows, g.vocab) * g.vocab * 4;
}

inline void linear_logprob_backward(const LinearLogprobBackward& g, cudaStream_t stream, void* scratch) {
  const int64_t block = g.z != nullptr ? g.rows : logit_rows(g.rows, g.vocab);
  const float inverse = static_cast<float>(1 / g.temperature);
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
    float* z = g.z != nullptr ? static_cast<float*>(g.z) + begin * g.vocab : static_cast<float*>(scratch);
    if (g.z == nullptr)
      matmul(logits_of(x + begin * g.hidden, g.weight, z, rows, g.hidden, g.vocab, 1 / g.temperature), stream);
    launch(logit_gradient_kernel, static_cast<unsigned>(rows), dim3(kLogitThreads), 0, stream, g, begin, z, inverse);
    const auto* dz = reinterpret_cast<const bf16*>(z);
    const int64_t pitch = 2 * g.vocab;
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
