// Causal attention over packed sequences: cpp/kernels/flash_attention.h on bf16, lse in float. FlashAttention-2's shape (Dao
// 2023, arXiv 2307.08691): a block of 4 warps takes a tile of queries of one head and walks the keys.
//
// Types    q, k, v, o bf16; scores, p, sums, o's accumulators, lse float. p is rounded to bf16 for p v.
// Shapes   head_dim: a multiple of 8 up to 128. Pitches multiples of 8, pointers at multiples of 16 bytes.
// Order    attention_tiles.cuh: of the row's own position and keys alone.
// How      a warp owns 32 rows (D 64: tiles of 128 queries) or 16 (64 queries) and 64 keys at a time. Every 512th key its
//          accumulator is closed and merged into a second one, so that decoding may compute splits apart and have the same
//          bits: that second accumulator takes the registers with which FlashAttention-2 has 32 rows also at D 128. While
//          scores are computed v is fetched, while p v is computed the next keys. Tiles that no row of a warp sees are left
//          out.
// Work     4 D (T^2 / 2) heads flops a causal sequence.
// Test     tests/simt/test_flash_attention.cc.
#pragma once

#include <cstdint>

#include "cuda/kernels/attention_tiles.cuh"
#include "kernels/flash_attention.h"

namespace tutelage::cuda {

// Rows of one sequence, one after the other, and the keys that they attend to.
struct QueryRows {
  int64_t token;  // of the first
  int count;      // rows
  int position;   // of the first
  int keys;       // of the sequence
};
struct KeysAndValues {
  const bf16 *k, *v;  // of the first key of a tile
};

// What attention_kernel is asked for, in one of two forms: the batch itself (here) or a cache (cached_attention.cuh).
struct AttentionProblem {
  int heads, kv_heads, head_dim, window;
  bool causal;
  float scale, c;
  const bf16* q;
  int64_t q_row;
  bf16* o;
  int64_t o_row;
  float* lse;  // may be null
  int tiles;   // of queries, in the longest sequence
};
struct WholeSequences : AttentionProblem {
  const int32_t* cu_seqlens;
  const bf16 *k, *v;
  int64_t k_row, v_row;

  __device__ __forceinline__ QueryRows rows(int64_t sequence) const {
    const int begin = ld_global(cu_seqlens + sequence), length = ld_global(cu_seqlens + sequence + 1) - begin;
    return {begin, length, 0, length};
  }
  // Keys k0, k0 + 1, … of a kv head, k_pitch() and v_pitch() apart.
  __device__ __forceinline__ KeysAndValues tile(int64_t, const QueryRows& all, int kv_head, int k0) const {
    return {k + (all.token + k0) * k_row + kv_head * head_dim, v + (all.token + k0) * v_row + kv_head * head_dim};
  }
  __device__ __forceinline__ int64_t k_pitch() const { return k_row; }
  __device__ __forceinline__ int64_t v_pitch() const { return v_row; }
};

// The next tile's scores of 16 rows become p; maximum and (this lane's) sum of rows lane / 4 and + 8 take it in, and say by
// what the row's features must be multiplied.
template <int N>
__device__ __forceinline__ void soften(float (&s)[N][4], float (&top)[2], float (&sum)[2], float (&factor)[2], float c) {
  static_assert(8 * N == kKeyTile);
  SIMT_UNROLL
  for (int h = 0; h < 2; ++h) {
    float now = top[h];
    SIMT_UNROLL
    for (int n = 0; n < N; ++n) now = maximum(now, maximum(s[n][2 * h], s[n][2 * h + 1]));
    now = quad_maximum(now);
    const float base = finite_top(now), shift = 0.0f - base * c;
    factor[h] = rescaling(top[h], base, c);
    top[h] = now;
    SIMT_UNROLL
    for (int n = 0; n < N; ++n) SIMT_UNROLL
    for (int i = 0; i < 2; ++i) s[n][2 * h + i] = weight_of(s[n][2 * h + i], c, shift);
    float group[4];
    SIMT_UNROLL
    for (int w = 0; w < 4; ++w)
      group[w] = group_sum(s[2 * w][2 * h], s[2 * w][2 * h + 1], s[2 * w + 1][2 * h], s[2 * w + 1][2 * h + 1]);
    sum[h] = sum[h] * factor[h] + tile_sum(group[0], group[1], group[2], group[3]);
  }
}

template <int D, int M, int Split, class Problem>
static __global__ void __launch_bounds__(kAttentionThreads) attention_kernel(const Problem g) {
  using R = SharedRows<D>;
  constexpr int kRows = 64 * M, N = kKeyTile / 8;
  bf16* q = dyn_smem<bf16>();
  bf16 *k = q + R::elements(kRows), *v = k + R::elements(kKeyTile);
  // maxima and sums of this thread's rows in all closed splits: seldom needed, and registers are short
  float* totals = reinterpret_cast<float*>(v + R::elements(kKeyTile)) + threadIdx.x;  // [4 M][threads]
  const int lane = static_cast<int>(lane_id()), warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t sequence = blockIdx.x / static_cast<unsigned>(g.tiles);
  // the last queries first: they have the most keys
  const int q0 = (g.tiles - 1 - static_cast<int>(blockIdx.x % static_cast<unsigned>(g.tiles))) * kRows;
  const int head = static_cast<int>(blockIdx.y), kv_head = head / (g.heads / g.kv_heads);
  const QueryRows all = g.rows(sequence);
  if (q0 >= all.count) return;
  const int chunks = g.head_dim / kChunk, rows = all.count - q0 < kRows ? all.count - q0 : kRows;
  const int position = all.position + q0;
  const Visible earliest = visible_keys(g.causal, g.window, position, all.keys);
  const int last = visible_keys(g.causal, g.window, position + rows - 1, all.keys).last;
  const int first = earliest.first / kKeyTile * kKeyTile;

  auto fetch_keys = [&](int k0) {
    fetch_rows<R, kKeyTile>(k, g.tile(sequence, all, kv_head, k0).k, g.k_pitch(), all.keys - k0, chunks);
    cp_async_commit();
  };
  auto fetch_values = [&](int k0) {
    fetch_rows<R, kKeyTile>(v, g.tile(sequence, all, kv_head, k0).v, g.v_pitch(), all.keys - k0, chunks);
    cp_async_commit();
  };
  fetch_rows<R, kRows>(q, g.q + (all.token + q0) * g.q_row + head * g.head_dim, g.q_row, rows, chunks);
  fetch_keys(first);

  // this warp's rows
  const int own = warp * 16 * M, own_position = position + own;
  const int own_rows = rows - own < 16 * M ? rows - own : 16 * M;  // none: <= 0
  bf16* own_q = q + R::elements(own);
  const Visible own_first = visible_keys(g.causal, g.window, own_position, all.keys);
  const Visible own_last = visible_keys(g.causal, g.window, own_position + own_rows - 1, all.keys);

  float o[M][D / 8][4], total[M][D / 8][4], top[M][2], sum[M][2];
  auto open = [&] {
    SIMT_UNROLL
    for (int m = 0; m < M; ++m) {
      SIMT_UNROLL
      for (int i = 0; i < D / 2; ++i) o[m][i / 4][i % 4] = 0;
      top[m][0] = top[m][1] = minus_infinity(), sum[m][0] = sum[m][1] = 0;
    }
  };
  open();
  SIMT_UNROLL
  for (int m = 0; m < M; ++m) {
    SIMT_UNROLL
    for (int i = 0; i < D / 2; ++i) total[m][i / 4][i % 4] = 0;
    SIMT_UNROLL
    for (int i = 0; i < 4; ++i) st_shared(totals + (4 * m + i) * kAttentionThreads, i % 2 == 0 ? minus_infinity() : 0.0f);
  }

  for (int k0 = first; k0 < last; k0 += kKeyTile) {
    const bool sees = own_rows > 0 && k0 < own_last.last && k0 + kKeyTile > own_first.first;  // of the whole warp
    cp_async_wait_group<0>();
    __syncthreads();  // the keys are there, and nobody needs the values any more
    fetch_values(k0);
    float s[M][N][4];
    if (sees) row_products<R, M, N>(s, own_q, k);
    cp_async_wait_group<0>();
    __syncthreads();  // the values are there, and nobody needs the keys any more
    if (k0 + kKeyTile < last) fetch_keys(k0 + kKeyTile);
    if (sees) {
      const bool masked = k0 + kKeyTile > own_first.last || k0 < own_last.first;
      SIMT_UNROLL
      for (int m = 0; m < M; ++m) {
        if (masked) {
          SIMT_UNROLL
          for (int h = 0; h < 2; ++h) {
            const Visible keys = visible_keys(g.causal, g.window, own_position + 16 * m + 8 * h + lane / 4, all.keys);
            SIMT_UNROLL
            for (int n = 0; n < N; ++n) SIMT_UNROLL
            for (int i = 0; i < 2; ++i) {
              const int j = k0 + 8 * n + 2 * (lane % 4) + i;
              if (j < keys.first || j >= keys.last) s[m][n][2 * h + i] = minus_infinity();
            }
          }
        }
        float factor[2];
        soften(s[m], top[m], sum[m], factor, g.c);
        SIMT_UNROLL
        for (int i = 0; i < D / 2; ++i) o[m][i / 4][i % 4] = o[m][i / 4][i % 4] * factor[i % 4 / 2];
      }
      add_weighted_rows<R, M, N>(o, s, v);
    }
    if ((k0 + kKeyTile) % Split == 0 || k0 + kKeyTile >= last) {
      SIMT_UNROLL
      for (int m = 0; m < M; ++m) {
        MergeFactors f[2];
        SIMT_UNROLL
        for (int h = 0; h < 2; ++h) {
          float* total_top = totals + (4 * m + 2 * h) * kAttentionThreads;
          float whole_top = ld_shared(total_top), whole_sum = ld_shared(total_top + kAttentionThreads);
          f[h] = merge(whole_top, whole_sum, top[m][h], quad_sum(sum[m][h]), g.c);
          st_shared(total_top, whole_top), st_shared(total_top + kAttentionThreads, whole_sum);
        }
        SIMT_UNROLL
        for (int i = 0; i < D / 2; ++i)
          total[m][i / 4][i % 4] = merged(total[m][i / 4][i % 4], o[m][i / 4][i % 4], f[i % 4 / 2]);
      }
      open();
    }
  }
  cp_async_wait_group<0>();
  if (own_rows <= 0) return;

  // through this warp's own part of q, so that whole rows are written
  SIMT_UNROLL
  for (int m = 0; m < M; ++m) SIMT_UNROLL
  for (int h = 0; h < 2; ++h) {
    const int row = 16 * m + 8 * h + lane / 4;
    const float* total_top = totals + (4 * m + 2 * h) * kAttentionThreads;
    const float whole_sum = ld_shared(total_top + kAttentionThreads), inverse = 1.0f / whole_sum;
    SIMT_UNROLL
    for (int n = 0; n < D / 8; ++n)
      st_shared(reinterpret_cast<std::uint32_t*>(own_q + R::at(row, n)) + lane % 4,
                pack_bf16x2(normalized(total[m][n][2 * h], inverse), normalized(total[m][n][2 * h + 1], inverse)));
    if (g.lse && lane % 4 == 0 && row < own_rows)
      st_global(g.lse + (all.token + q0 + own + row) * g.heads + head, ld_shared(total_top) * g.scale + logarithm(whole_sum));
  }
  __syncwarp();
  bf16* to = g.o + (all.token + q0 + own) * g.o_row + head * g.head_dim;
  for (int i = lane; i < 16 * M * R::kChunks; i += 32) {
    const auto [row, chunk] = chunk_place<D>(i);
    if (row < own_rows && chunk < chunks)
      st_global(reinterpret_cast<Chunk*>(to + row * g.o_row + chunk * kChunk),
                ld_shared(reinterpret_cast<const Chunk*>(own_q + R::at(row, chunk))));
  }
}

// Sequences of at most `longest` query rows each, in tiles of 64 M.
template <int D, int M, int Split, class Problem>
void launch_attention(Problem problem, int64_t sequences, int64_t longest, cudaStream_t stream) {
  problem.tiles = static_cast<int>((longest + 64 * M - 1) / (64 * M));
  launch(attention_kernel<D, M, Split, Problem>,
         dim3(static_cast<unsigned>(sequences * problem.tiles), static_cast<unsigned>(problem.heads)), dim3(kAttentionThreads),
         sizeof(bf16) * SharedRows<D>::elements(64 * M + 2 * kKeyTile) + sizeof(float) * 4 * M * kAttentionThreads, stream,
         problem);
}

// Split: another size than kSplit gives other bits (the tests' control).
template <int Split = kSplit>
void flash_attention(const Attention& g, cudaStream_t stream) {
  const AttentionShape& s = g.shape;
  if (s.longest == 0) return;
  WholeSequences p;
  p.heads = static_cast<int>(s.heads), p.kv_heads = static_cast<int>(s.kv_heads), p.head_dim = static_cast<int>(s.head_dim);
  p.window = short_window(s.window), p.causal = s.causal;
  p.scale = static_cast<float>(s.scale), p.c = exponent_scale(s.scale);
  p.q = static_cast<const bf16*>(g.q), p.q_row = g.q_row, p.o = static_cast<bf16*>(g.o), p.o_row = g.o_row;
  p.lse = static_cast<float*>(g.lse), p.tiles = 0, p.cu_seqlens = s.cu_seqlens;
  p.k = static_cast<const bf16*>(g.k), p.v = static_cast<const bf16*>(g.v), p.k_row = g.k_row, p.v_row = g.v_row;
  with_head_dim(s.head_dim,
                [&](auto d) { launch_attention<d.value, d.value == 64 ? 2 : 1, Split>(p, s.sequences, s.longest, stream); });
}

}  // namespace tutelage::cuda
