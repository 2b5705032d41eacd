// The gradients of attention over packed sequences: cpp/kernels/flash_attention.h on bf16, lse in float.
//
// Types    q, k, v, o, d_o, dq, dk, dv bf16; scores, p, ds and all accumulators float. p and ds are rounded to bf16 for the
//          products that follow.
// Shapes   as flash_attention.cuh.
// Order    dk, dv: one chain of m16n8k16 over (query head of the group, query), dq one over the keys; both of the sequence
//          alone. delta: a chain of 8 features a lane, a butterfly over 16 lanes (distance 8, 4, 2, 1). No atomics: the same
//          bits always.
// How      delta_kernel: do.o of each row. keys_kernel: a block of 4 warps keeps 64 keys and values of a kv head and walks the
//          queries that see them; a warp owns 16 keys, scores are computed as k q^T, so that p^T and ds^T are where the
//          products for dv and dk want them and pass through no memory. queries_kernel: 64 queries stay and keys go by. Both
//          compute p and ds: 7 products for the 5 of a version that adds dq with atomics, 1.4 times its flops. Two tiles are in
//          flight.
// Work     7 D T^2 heads flops a causal sequence. scratch: 8 bytes a query row and head.
// Test     tests/simt/test_flash_attention.cc.
#pragma once

#include <cstdint>

#include "cuda/kernels/flash_attention.cuh"

namespace tutelage::cuda {

// Of a query row, from delta_kernel. p = 2^(score c + shift), ds = p (dp - delta).
struct RowStatistics {
  float shift, delta;
};

struct BackwardProblem {
  int heads, kv_heads, head_dim, window;
  bool causal;
  float scale, c;
  const int32_t* cu_seqlens;
  const bf16 *q, *k, *v, *d_o;
  int64_t q_row, k_row, v_row, d_o_row;
  bf16 *dq, *dk, *dv;
  int64_t dq_row, dk_row, dv_row;
  const RowStatistics* statistics;  // [heads, tokens]
  int64_t tokens;
  int tiles;  // of the longest sequence

  __device__ __forceinline__ QueryRows rows(int64_t sequence) const {
    const int begin = ld_global(cu_seqlens + sequence), length = ld_global(cu_seqlens + sequence + 1) - begin;
    return {begin, length, 0, length};
  }
};

// With gaps also where D = 128: an address needs fewer registers then, and two blocks do not fit an RTX 4090 anyway.
template <int D>
using BackwardRows = SharedRows<D, false>;

constexpr int kDeltaThreads = 256, kLanesOfRow = 16;

// Half a warp a row: two tokens of one head, whose results lie side by side.
static __global__ void __launch_bounds__(kDeltaThreads)
    delta_kernel(int64_t tokens, int heads, int head_dim, const bf16* o, int64_t o_row, const bf16* d_o, int64_t d_o_row,
                 const float* lse, RowStatistics* out) {
  const int64_t pair = int64_t(blockIdx.x) * (kDeltaThreads / 32) + threadIdx.x / 32;
  const int lane = static_cast<int>(lane_id()), chunk = lane % kLanesOfRow, head = static_cast<int>(pair % heads);
  const int64_t token = pair / heads * 2 + lane / kLanesOfRow;
  float sum = 0;
  if (token < tokens && chunk * kChunk < head_dim) {
    const int64_t at = int64_t(head) * head_dim + chunk * kChunk;
    const Chunk x = load_chunk<true>(o + token * o_row + at, kChunk), y = load_chunk<true>(d_o + token * d_o_row + at, kChunk);
    SIMT_UNROLL
    for (int i = 0; i < kChunk; ++i) sum = fma(to_float(x[i]), to_float(y[i]), sum);
  }
  SIMT_UNROLL
  for (unsigned mask = kLanesOfRow / 2; mask > 0; mask /= 2) sum = sum + shfl_xor(sum, mask);
  if (token < tokens && chunk == 0)
    st_global(out + head * tokens + token, RowStatistics{0.0f - ld_global(lse + token * heads + head) * 1.44269504f, sum});
}

// 16 rows of a warp, times `factor`, through its own part of a tile in shared memory.
template <int D>
__device__ __forceinline__ void write_rows(const float (&x)[1][D / 8][4], float factor, bf16* tile, bf16* to, int64_t pitch,
                                           int rows, int chunks) {
  using R = BackwardRows<D>;
  const int lane = static_cast<int>(lane_id());
  __syncwarp();  // every lane has read what is written over now
  SIMT_UNROLL
  for (int h = 0; h < 2; ++h) SIMT_UNROLL
  for (int n = 0; n < D / 8; ++n)
    st_shared(reinterpret_cast<std::uint32_t*>(tile + R::at(8 * h + lane / 4, n)) + lane % 4,
              pack_bf16x2(normalized(x[0][n][2 * h], factor), normalized(x[0][n][2 * h + 1], factor)));
  __syncwarp();
  for (int i = lane; i < 16 * R::kChunks; i += 32) {
    const auto [row, chunk] = chunk_place<D>(i);
    if (row < rows && chunk < chunks)
      st_global(reinterpret_cast<Chunk*>(to + row * pitch + chunk * kChunk),
                ld_shared(reinterpret_cast<const Chunk*>(tile + R::at(row, chunk))));
  }
}

// 64 keys of one kv head. Walk: queries a tile.
template <int D, int Walk>
static __global__ void __launch_bounds__(kAttentionThreads) keys_kernel(const BackwardProblem g) {
  using R = BackwardRows<D>;
  constexpr int N = Walk / 8;
  bf16* k = dyn_smem<bf16>();
  bf16 *v = k + R::elements(kKeyTile), *staged = v + R::elements(kKeyTile);             // staged: [2][q, d_o][Walk][D]
  auto* statistics = reinterpret_cast<RowStatistics*>(staged + 4 * R::elements(Walk));  // [2][Walk]
  const int lane = static_cast<int>(lane_id()), warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t sequence = blockIdx.x / static_cast<unsigned>(g.tiles);
  const int k0 =
      static_cast<int>(blockIdx.x % static_cast<unsigned>(g.tiles)) * kKeyTile;  // the first are seen by the most queries
  const int kv_head = static_cast<int>(blockIdx.y), group = g.heads / g.kv_heads;
  const QueryRows all = g.rows(sequence);
  if (k0 >= all.keys) return;
  const int chunks = g.head_dim / kChunk, rows = all.keys - k0 < kKeyTile ? all.keys - k0 : kKeyTile;
  const int first = g.causal ? k0 / Walk * Walk : 0;  // query
  const int last = g.window > 0 && k0 + rows - 1 + g.window < all.keys ? k0 + rows - 1 + g.window : all.keys;

  const int last_head = (kv_head + 1) * group;
  int stage = 0;  // the one in use
  auto fetch = [&](int head, int q0, int to_stage) {
    if (head < last_head) {
      bf16* to = staged + to_stage * 2 * R::elements(Walk);
      fetch_rows<R, Walk>(to, g.q + (all.token + q0) * g.q_row + head * g.head_dim, g.q_row, all.count - q0, chunks);
      fetch_rows<R, Walk>(to + R::elements(Walk), g.d_o + (all.token + q0) * g.d_o_row + head * g.head_dim, g.d_o_row,
                          all.count - q0, chunks);
      const int row = static_cast<int>(threadIdx.x);
      if (row < Walk)  // a row that is not there: p = 2^-inf = 0
        st_shared(statistics + to_stage * Walk + row, q0 + row < all.count
                                                          ? ld_global(g.statistics + head * g.tokens + all.token + q0 + row)
                                                          : RowStatistics{minus_infinity(), 0});
    }
    cp_async_commit();
  };
  fetch_rows<R, kKeyTile>(k, g.k + (all.token + k0) * g.k_row + kv_head * g.head_dim, g.k_row, rows, chunks);
  fetch_rows<R, kKeyTile>(v, g.v + (all.token + k0) * g.v_row + kv_head * g.head_dim, g.v_row, rows, chunks);
  fetch(kv_head * group, first, 0);

  bf16 *own_k = k + R::elements(16 * warp), *own_v = v + R::elements(16 * warp);
  const int j0 = k0 + 16 * warp;
  float dk[1][D / 8][4], dv[1][D / 8][4];
  SIMT_UNROLL
  for (int i = 0; i < D / 2; ++i) dk[0][i / 4][i % 4] = dv[0][i / 4][i % 4] = 0;
  for (int head = kv_head * group, i0 = first; head < last_head; stage ^= 1) {
    cp_async_wait_group<0>();
    __syncthreads();  // this tile is there, and nobody needs the one before it any more
    const int here = i0;
    i0 += Walk;
    if (i0 >= last) i0 = first, ++head;
    fetch(head, i0, stage ^ 1);
    if (j0 >= all.keys || (g.causal && j0 > here + Walk - 1) || (g.window > 0 && j0 + 15 + g.window <= here))
      continue;  // unseen
    const bf16* q = staged + stage * 2 * R::elements(Walk);
    const bf16* d_o = q + R::elements(Walk);
    const RowStatistics* of_row = statistics + stage * Walk;
    const bool masked = (g.causal && j0 + 15 > here) || (g.window > 0 && j0 + g.window <= here + Walk - 1);
    float p[1][N][4], ds[1][N][4];
    row_products<R, 1, N>(p, own_k, q);
    row_products<R, 1, N>(ds, own_v, d_o);
    SIMT_UNROLL
    for (int n = 0; n < N; ++n) {
      const auto two = ld_shared(reinterpret_cast<const Pack<RowStatistics, 2>*>(of_row + 8 * n + 2 * (lane % 4)));
      SIMT_UNROLL
      for (int e = 0; e < 4; ++e) {
        const int i = here + 8 * n + 2 * (lane % 4) + e % 2, j = j0 + e / 2 * 8 + lane / 4;
        float& weight = p[0][n][e];
        weight = weight_of(weight, g.c, two[e % 2].shift);
        if (masked && ((g.causal && j > i) || (g.window > 0 && j + g.window <= i))) weight = 0;
        ds[0][n][e] = weight * (ds[0][n][e] - two[e % 2].delta);
      }
    }
    add_weighted_rows<R, 1, N>(dv, p, d_o);
    add_weighted_rows<R, 1, N>(dk, ds, q);
  }
  cp_async_wait_group<0>();
  const int own_rows = all.keys - j0 < 16 ? all.keys - j0 : 16;
  if (own_rows <= 0) return;
  write_rows<D>(dk, g.scale, own_k, g.dk + (all.token + j0) * g.dk_row + kv_head * g.head_dim, g.dk_row, own_rows, chunks);
  write_rows<D>(dv, 1.0f, own_v, g.dv + (all.token + j0) * g.dv_row + kv_head * g.head_dim, g.dv_row, own_rows, chunks);
}

// 64 queries of one head. Walk: keys a tile.
template <int D, int Walk>
static __global__ void __launch_bounds__(kAttentionThreads) queries_kernel(const BackwardProblem g) {
  using R = BackwardRows<D>;
  constexpr int N = Walk / 8, kRows = 64;
  bf16* q = dyn_smem<bf16>();
  bf16 *d_o = q + R::elements(kRows), *staged = d_o + R::elements(kRows);  // staged: [2][k, v][Walk][D]
  const int lane = static_cast<int>(lane_id()), warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t sequence = blockIdx.x / static_cast<unsigned>(g.tiles);
  const int q0 = (g.tiles - 1 - static_cast<int>(blockIdx.x % static_cast<unsigned>(g.tiles))) * kRows;
  const int head = static_cast<int>(blockIdx.y), kv_head = head / (g.heads / g.kv_heads);
  const QueryRows all = g.rows(sequence);
  if (q0 >= all.count) return;
  const int chunks = g.head_dim / kChunk, rows = all.count - q0 < kRows ? all.count - q0 : kRows;
  const int first = visible_keys(g.causal, g.window, q0, all.keys).first / Walk * Walk;
  const int last = visible_keys(g.causal, g.window, q0 + rows - 1, all.keys).last;

  auto fetch = [&](int k0) {
    if (k0 < last) {
      bf16* to = staged + k0 / Walk % 2 * 2 * R::elements(Walk);
      fetch_rows<R, Walk>(to, g.k + (all.token + k0) * g.k_row + kv_head * g.head_dim, g.k_row, all.keys - k0, chunks);
      fetch_rows<R, Walk>(to + R::elements(Walk), g.v + (all.token + k0) * g.v_row + kv_head * g.head_dim, g.v_row,
                          all.keys - k0, chunks);
    }
    cp_async_commit();
  };
  fetch_rows<R, kRows>(q, g.q + (all.token + q0) * g.q_row + head * g.head_dim, g.q_row, rows, chunks);
  fetch_rows<R, kRows>(d_o, g.d_o + (all.token + q0) * g.d_o_row + head * g.head_dim, g.d_o_row, rows, chunks);
  fetch(first);

  const int own = q0 + 16 * warp, own_rows = all.count - own < 16 ? all.count - own : 16;
  bf16 *own_q = q + R::elements(16 * warp), *own_d_o = d_o + R::elements(16 * warp);
  RowStatistics of_row[2];
  SIMT_UNROLL
  for (int h = 0; h < 2; ++h) {
    const int row = 8 * h + lane / 4;
    of_row[h] =
        row < own_rows ? ld_global(g.statistics + head * g.tokens + all.token + own + row) : RowStatistics{minus_infinity(), 0};
  }
  const Visible own_first = visible_keys(g.causal, g.window, own, all.keys);
  const Visible own_last = visible_keys(g.causal, g.window, own + own_rows - 1, all.keys);
  float dq[1][D / 8][4];
  SIMT_UNROLL
  for (int i = 0; i < D / 2; ++i) dq[0][i / 4][i % 4] = 0;
  for (int k0 = first; k0 < last; k0 += Walk) {
    cp_async_wait_group<0>();
    __syncthreads();  // this tile is there, and nobody needs the one before it any more
    fetch(k0 + Walk);
    if (own_rows <= 0 || k0 >= own_last.last || k0 + Walk <= own_first.first) continue;  // unseen
    const bf16* k = staged + k0 / Walk % 2 * 2 * R::elements(Walk);
    const bf16* v = k + R::elements(Walk);
    const bool masked = k0 + Walk > own_first.last || k0 < own_last.first;
    float p[1][N][4], ds[1][N][4];
    row_products<R, 1, N>(p, own_q, k);
    row_products<R, 1, N>(ds, own_d_o, v);
    SIMT_UNROLL
    for (int h = 0; h < 2; ++h) {
      const Visible keys = visible_keys(g.causal, g.window, own + 8 * h + lane / 4, all.keys);
      SIMT_UNROLL
      for (int n = 0; n < N; ++n) SIMT_UNROLL
      for (int e = 2 * h; e < 2 * h + 2; ++e) {
        const int j = k0 + 8 * n + 2 * (lane % 4) + e % 2;
        float weight = weight_of(p[0][n][e], g.c, of_row[h].shift);
        if (masked && (j < keys.first || j >= keys.last)) weight = 0;
        ds[0][n][e] = weight * (ds[0][n][e] - of_row[h].delta);
      }
    }
    add_weighted_rows<R, 1, N>(dq, ds, k);
  }
  cp_async_wait_group<0>();
  if (own_rows <= 0) return;
  write_rows<D>(dq, g.scale, own_q, g.dq + (all.token + own) * g.dq_row + head * g.head_dim, g.dq_row, own_rows, chunks);
}

inline int64_t flash_attention_backward_scratch_bytes(const AttentionBackward& g) {
  return g.shape.tokens * g.shape.heads * int64_t(sizeof(RowStatistics));
}

// scratch: flash_attention_backward_scratch_bytes(g), aligned to 16 bytes.
inline void flash_attention_backward(const AttentionBackward& g, cudaStream_t stream, void* scratch) {
  const AttentionShape& s = g.shape;
  if (s.tokens == 0) return;
  auto* statistics = static_cast<RowStatistics*>(scratch);
  BackwardProblem p;
  p.heads = static_cast<int>(s.heads), p.kv_heads = static_cast<int>(s.kv_heads), p.head_dim = static_cast<int>(s.head_dim);
  p.window = short_window(s.window), p.causal = s.causal;
  p.scale = static_cast<float>(s.scale), p.c = exponent_scale(s.scale), p.cu_seqlens = s.cu_seqlens;
  p.q = static_cast<const bf16*>(g.q), p.k = static_cast<const bf16*>(g.k), p.v = static_cast<const bf16*>(g.v);
  p.d_o = static_cast<const bf16*>(g.d_o), p.q_row = g.q_row, p.k_row = g.k_row, p.v_row = g.v_row, p.d_o_row = g.d_o_row;
  p.dq = static_cast<bf16*>(g.dq), p.dk = static_cast<bf16*>(g.dk), p.dv = static_cast<bf16*>(g.dv);
  p.dq_row = g.dq_row, p.dk_row = g.dk_row, p.dv_row = g.dv_row;
  p.statistics = statistics, p.tokens = s.tokens, p.tiles = static_cast<int>((s.longest + kKeyTile - 1) / kKeyTile);

  with_head_dim(s.head_dim, [&](auto d) {
    constexpr int D = d.value, kWalk = D >= 80 ? 32 : 64;  // registers and shared memory
    const int64_t pairs = (s.tokens + 1) / 2 * s.heads;
    launch(delta_kernel, dim3(static_cast<unsigned>((pairs + kDeltaThreads / 32 - 1) / (kDeltaThreads / 32))),
           dim3(kDeltaThreads), 0, stream, s.tokens, p.heads, p.head_dim, static_cast<const bf16*>(g.o), g.o_row, p.d_o,
           p.d_o_row, static_cast<const float*>(g.lse), statistics);
    const std::size_t bytes = sizeof(bf16) * BackwardRows<D>::elements(2 * kKeyTile + 4 * kWalk);
    const unsigned blocks = static_cast<unsigned>(s.sequences * p.tiles);
    launch(keys_kernel<D, kWalk>, dim3(blocks, static_cast<unsigned>(p.kv_heads)), dim3(kAttentionThreads),
           bytes + sizeof(RowStatistics) * 2 * kWalk, stream, p);
    launch(queries_kernel<D, kWalk>, dim3(blocks, static_cast<unsigned>(p.heads)), dim3(kAttentionThreads), bytes, stream, p);
  });
}

}  // namespace tutelage::cuda
