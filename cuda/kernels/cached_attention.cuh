// Attention of new tokens over the keys and values of a cache: cpp/kernels/cached_attention.h on bf16.
//
// Types    as flash_attention.cuh. Blocks of the cache: of each kv head, rows [kCacheBlock][d] of keys, then of values.
// Order    attention_tiles.cuh: the same bits as flash_attention, whichever of the two kernels below computes a row.
// How      append_kernel writes the new keys and values into the blocks. Segments of several rows (chunks of a prefill) go
//          through flash_attention's kernel, which reads the blocks. Segments of one row (decoding) go through split_kernel:
//          the query heads of a kv head are the rows of one tile of 16, and its four warps share each tile of 64 keys: scores
//          by keys, p v by features, two tiles of keys and values in flight. With few sequences each split of 512 keys is a
//          block of its own, that leaves maximum, sum and features in `scratch`, and merge_kernel merges them in index order;
//          with many a block goes through all of its row's splits. Both do the same arithmetic.
// Work     4 d heads flops a key and row; decoding reads every key and value once for a group of up to 16 query heads.
// Test     tests/simt/test_cached_attention.cc.
#pragma once

#include <cstdint>

#include "cuda/kernels/flash_attention.cuh"
#include "kernels/cached_attention.h"

namespace tutelage::cuda {

struct Cache {  // of one layer
  int kv_heads, head_dim;
  int64_t offset, head_elements;  // of the layer in a block, of one kv head
  void* const* const* blocks;
  const int32_t *cu_rows, *first_position;

  __device__ __forceinline__ QueryRows rows(int64_t segment) const {
    const int begin = ld_global(cu_rows + segment), count = ld_global(cu_rows + segment + 1) - begin;
    const int position = ld_global(first_position + segment);
    return {begin, count, position, position + count};
  }
  // Where position p of a kv head has its key; its value lies kCacheBlock * head_dim further on.
  __device__ __forceinline__ bf16* key(int64_t segment, int kv_head, int p) const {
    void* const* list = ld_global(blocks + segment);
    return static_cast<bf16*>(ld_global(list + p / kCacheBlock)) + offset + kv_head * head_elements +
           p % kCacheBlock * head_dim;
  }
};

struct CachedSegments : AttentionProblem {
  Cache cache;

  __device__ __forceinline__ QueryRows rows(int64_t segment) const {
    QueryRows r = cache.rows(segment);
    if (r.count == 1) r.count = 0;  // split_kernel's
    return r;
  }
  __device__ __forceinline__ KeysAndValues tile(int64_t segment, const QueryRows&, int kv_head, int k0) const {
    const bf16* k = cache.key(segment, kv_head, k0);
    return {k, k + kCacheBlock * head_dim};
  }
  __device__ __forceinline__ int64_t k_pitch() const { return head_dim; }
  __device__ __forceinline__ int64_t v_pitch() const { return head_dim; }
};
static_assert(kCacheBlock % kKeyTile == 0);

constexpr int kAppendThreads = 256;

// One chunk of a new key and of a new value a thread. `parts` blocks a segment.
static __global__ void __launch_bounds__(kAppendThreads)
    append_kernel(const Cache g, const bf16* k, int64_t k_row, const bf16* v, int64_t v_row, int parts) {
  const int64_t segment = blockIdx.x / static_cast<unsigned>(parts);
  const QueryRows all = g.rows(segment);
  const int chunks = g.head_dim / kChunk, width = g.kv_heads * chunks;
  const int64_t i = int64_t(blockIdx.x % static_cast<unsigned>(parts)) * kAppendThreads + threadIdx.x;
  const int row = static_cast<int>(i / width), at = static_cast<int>(i % width);
  if (row >= all.count) return;
  bf16* to = g.key(segment, at / chunks, all.position + row) + at % chunks * kChunk;
  const Chunk key = load_chunk<true>(k + (all.token + row) * k_row + at * kChunk, kChunk);
  const Chunk value = load_chunk<true>(v + (all.token + row) * v_row + at * kChunk, kChunk);
  store_chunk<true>(to, kChunk, key);
  store_chunk<true>(to + kCacheBlock * g.head_dim, kChunk, value);
}

constexpr int kGroupRows = 16;  // query heads of a kv head that one block takes

// What one split contributes to a row: features [D], and these.
struct SplitStatistics {
  float top, sum;
};
struct Partials {
  float* features;              // [segments, heads, splits, width]
  SplitStatistics* statistics;  // [segments, heads, splits]
  int width, splits;            // D; of the longest sequence, 0: blocks merge for themselves
  __device__ __forceinline__ int64_t at(int64_t segment, int heads, int head, int split) const {
    return (segment * heads + head) * splits + split;
  }
};

template <int D, int Split>
static __global__ void __launch_bounds__(kAttentionThreads)
    split_kernel(const CachedSegments g, const Partials partials, int row_blocks) {
  using R = SharedRows<D>;
  using P = SharedRows<kKeyTile>;
  constexpr int kOwn = (D / 8 + 3) / 4;  // columns of 8 features a warp
  bf16* q = dyn_smem<bf16>();
  bf16* keys = q + R::elements(kGroupRows);                             // [2 stages][k, v]
  bf16* p = keys + 4 * R::elements(kKeyTile);                           // [16][64]
  float* tops = reinterpret_cast<float*>(p + P::elements(kGroupRows));  // [4 warps][16]
  float* sums = tops + 4 * kGroupRows;                                  // [4 groups of keys][16][4 lanes of a row]
  const int lane = static_cast<int>(lane_id()), warp = static_cast<int>(threadIdx.x) / 32;
  const unsigned cuts = partials.splits > 0 ? static_cast<unsigned>(partials.splits) : 1u;
  const int64_t segment = blockIdx.x / cuts;
  const int group = g.heads / g.kv_heads, kv_head = static_cast<int>(blockIdx.y) / row_blocks;
  const int first_row = static_cast<int>(blockIdx.y) % row_blocks * kGroupRows;
  const int rows = group - first_row < kGroupRows ? group - first_row : kGroupRows, head = kv_head * group + first_row;
  const QueryRows all = g.cache.rows(segment);
  if (all.count != 1) return;
  const Visible seen = visible_keys(true, g.window, all.position, all.keys);
  int first = seen.first / kKeyTile * kKeyTile, last = seen.last;
  const int split = static_cast<int>(blockIdx.x % cuts);
  if (partials.splits > 0) {
    first = split * Split > first ? split * Split : first;
    last = (split + 1) * Split < last ? (split + 1) * Split : last;
  }
  if (first >= last) return;
  const int chunks = g.head_dim / kChunk;

  auto fetch = [&](int k0) {
    if (k0 < last) {
      const bf16* from = g.cache.key(segment, kv_head, k0);
      bf16* to = keys + k0 / kKeyTile % 2 * 2 * R::elements(kKeyTile);
      fetch_rows<R, kKeyTile>(to, from, g.head_dim, all.keys - k0, chunks);
      fetch_rows<R, kKeyTile>(to + R::elements(kKeyTile), from + kCacheBlock * g.head_dim, g.head_dim, all.keys - k0, chunks);
    }
    cp_async_commit();
  };
  fetch_rows<R, kGroupRows>(q, g.q + all.token * g.q_row + head * g.head_dim, g.head_dim, rows, chunks);
  fetch(first);

  float o[kOwn][4], total[kOwn][4], top[2], sum[2];
  float total_top[2] = {minus_infinity(), minus_infinity()}, total_sum[2] = {0, 0};
  auto open = [&] {
    SIMT_UNROLL
    for (int i = 0; i < 4 * kOwn; ++i) o[i / 4][i % 4] = 0;
    top[0] = top[1] = minus_infinity(), sum[0] = sum[1] = 0;
  };
  open();
  SIMT_UNROLL
  for (int i = 0; i < 4 * kOwn; ++i) total[i / 4][i % 4] = 0;

  for (int k0 = first; k0 < last; k0 += kKeyTile) {
    cp_async_wait_group<0>();
    __syncthreads();  // this tile is there, and nobody needs the one before it any more
    fetch(k0 + kKeyTile);
    const bf16* k = keys + k0 / kKeyTile % 2 * 2 * R::elements(kKeyTile);
    const bf16* v = k + R::elements(kKeyTile);

    float s[1][2][4];  // this warp's 16 keys
    row_products<R, 1, 2>(s, q, k + R::elements(16 * warp));
    float now[2];
    SIMT_UNROLL
    for (int h = 0; h < 2; ++h) {
      now[h] = minus_infinity();
      SIMT_UNROLL
      for (int n = 0; n < 2; ++n) SIMT_UNROLL
      for (int i = 0; i < 2; ++i) {
        const int j = k0 + 16 * warp + 8 * n + 2 * (lane % 4) + i;
        if (j < seen.first || j >= seen.last) s[0][n][2 * h + i] = minus_infinity();
        now[h] = maximum(now[h], s[0][n][2 * h + i]);
      }
      now[h] = quad_maximum(now[h]);
      if (lane % 4 == 0) st_shared(tops + kGroupRows * warp + 8 * h + lane / 4, now[h]);
    }
    __syncthreads();  // the four maxima of each row are there
    float factor[2];
    SIMT_UNROLL
    for (int h = 0; h < 2; ++h) {
      const int row = 8 * h + lane / 4;
      now[h] = top[h];
      SIMT_UNROLL
      for (int w = 0; w < 4; ++w) now[h] = maximum(now[h], ld_shared(tops + kGroupRows * w + row));
      const float base = finite_top(now[h]), shift = 0.0f - base * g.c;
      factor[h] = rescaling(top[h], base, g.c);
      top[h] = now[h];
      SIMT_UNROLL
      for (int n = 0; n < 2; ++n) {
        float* pair = &s[0][n][2 * h];
        pair[0] = weight_of(pair[0], g.c, shift), pair[1] = weight_of(pair[1], g.c, shift);
        st_shared(reinterpret_cast<std::uint32_t*>(p + P::at(row, 2 * warp + n)) + lane % 4, pack_bf16x2(pair[0], pair[1]));
      }
      st_shared(sums + 4 * (kGroupRows * warp + row) + lane % 4,
                group_sum(s[0][0][2 * h], s[0][0][2 * h + 1], s[0][1][2 * h], s[0][1][2 * h + 1]));
    }
    __syncthreads();  // p and its sums are there
    SIMT_UNROLL
    for (int h = 0; h < 2; ++h) {
      float part[4];
      SIMT_UNROLL
      for (int w = 0; w < 4; ++w) part[w] = ld_shared(sums + 4 * (kGroupRows * w + 8 * h + lane / 4) + lane % 4);
      sum[h] = sum[h] * factor[h] + tile_sum(part[0], part[1], part[2], part[3]);
    }
    std::uint32_t weights[4][4];
    SIMT_UNROLL
    for (int i = 0; i < 4; ++i) ldmatrix_x4(weights[i], p + P::at(lane % 16, 2 * i + lane / 16));
    SIMT_UNROLL
    for (int c = 0; c < kOwn; ++c) {
      if (warp + 4 * c >= D / 8) break;  // all lanes alike
      SIMT_UNROLL
      for (int i = 0; i < 4; ++i) o[c][i] = o[c][i] * factor[i / 2];
      SIMT_UNROLL
      for (int half = 0; half < 2; ++half) {
        std::uint32_t values[4];
        ldmatrix_x4_trans(values, v + R::at(32 * half + lane, warp + 4 * c));
        const std::uint32_t left[2] = {values[0], values[1]}, right[2] = {values[2], values[3]};
        mma_m16n8k16_bf16(o[c], weights[2 * half], left);
        mma_m16n8k16_bf16(o[c], weights[2 * half + 1], right);
      }
    }

    if (partials.splits == 0 && ((k0 + kKeyTile) % Split == 0 || k0 + kKeyTile >= last)) {
      MergeFactors f[2];
      SIMT_UNROLL
      for (int h = 0; h < 2; ++h) f[h] = merge(total_top[h], total_sum[h], top[h], quad_sum(sum[h]), g.c);
      SIMT_UNROLL
      for (int i = 0; i < 4 * kOwn; ++i) total[i / 4][i % 4] = merged(total[i / 4][i % 4], o[i / 4][i % 4], f[i % 4 / 2]);
      open();
    }
  }
  cp_async_wait_group<0>();

  if (partials.splits > 0) {
    SIMT_UNROLL
    for (int h = 0; h < 2; ++h) {
      const int row = 8 * h + lane / 4;
      const float whole = quad_sum(sum[h]);
      if (row >= rows) continue;
      const int64_t at = partials.at(segment, g.heads, head + row, split);
      SIMT_UNROLL
      for (int c = 0; c < kOwn; ++c)
        if (warp + 4 * c < D / 8)
          st_global(reinterpret_cast<Pack<float, 2>*>(partials.features + at * D + (warp + 4 * c) * 8) + lane % 4,
                    Pack<float, 2>{{o[c][2 * h], o[c][2 * h + 1]}});
      if (warp == 0 && lane % 4 == 0) st_global(partials.statistics + at, SplitStatistics{top[h], whole});
    }
    return;
  }
  // through q, which no warp reads after the last scores, so that whole rows are written
  SIMT_UNROLL
  for (int h = 0; h < 2; ++h) {
    const float inverse = 1.0f / total_sum[h];
    SIMT_UNROLL
    for (int c = 0; c < kOwn; ++c)
      if (warp + 4 * c < D / 8)
        st_shared(reinterpret_cast<std::uint32_t*>(q + R::at(8 * h + lane / 4, warp + 4 * c)) + lane % 4,
                  pack_bf16x2(normalized(total[c][2 * h], inverse), normalized(total[c][2 * h + 1], inverse)));
  }
  __syncthreads();
  bf16* to = g.o + all.token * g.o_row + head * g.head_dim;
  for (int i = static_cast<int>(threadIdx.x); i < kGroupRows * R::kChunks; i += kAttentionThreads) {
    const auto [row, chunk] = chunk_place<D>(i);
    if (row < rows && chunk < chunks)
      st_global(reinterpret_cast<Chunk*>(to + row * g.head_dim + chunk * kChunk),
                ld_shared(reinterpret_cast<const Chunk*>(q + R::at(row, chunk))));
  }
}

// One row and query head a warp, 4 features a lane.
template <int Split>
static __global__ void __launch_bounds__(kAttentionThreads)
    merge_kernel(const CachedSegments g, const Partials partials, int64_t segments) {
  const int64_t item = int64_t(blockIdx.x) * (kAttentionThreads / 32) + threadIdx.x / 32;
  if (item >= segments * g.heads) return;
  const int64_t segment = item / g.heads;
  const int head = static_cast<int>(item % g.heads), feature = 4 * static_cast<int>(lane_id());
  const QueryRows all = g.cache.rows(segment);
  if (all.count != 1 || feature >= g.head_dim) return;
  const Visible seen = visible_keys(true, g.window, all.position, all.keys);
  float top = minus_infinity(), sum = 0, total[4] = {0, 0, 0, 0};
  for (int split = seen.first / Split; split * Split < seen.last; ++split) {
    const int64_t at = partials.at(segment, g.heads, head, split);
    const SplitStatistics s = ld_global(partials.statistics + at);
    const auto part = ld_global(reinterpret_cast<const Pack<float, 4>*>(partials.features + at * partials.width + feature));
    const MergeFactors f = merge(top, sum, s.top, s.sum, g.c);
    SIMT_UNROLL
    for (int i = 0; i < 4; ++i) total[i] = merged(total[i], part[i], f);
  }
  const float inverse = 1.0f / sum;
  const Pack<std::uint32_t, 2> o{{pack_bf16x2(normalized(total[0], inverse), normalized(total[1], inverse)),
                                  pack_bf16x2(normalized(total[2], inverse), normalized(total[3], inverse))}};
  st_global(reinterpret_cast<Pack<std::uint32_t, 2>*>(g.o + all.token * g.o_row + head * g.head_dim + feature), o);
}

// From so many blocks on, splits are no blocks of their own: the largest GPUs have 132 to 170 multiprocessors.
constexpr int64_t kBlocksThatFill = 256;

// How many splits of a row are blocks of their own; 0: none.
template <int Split = kSplit>
int64_t apart_splits(const CachedAttention& g) {
  const int64_t splits = (g.most_positions + Split - 1) / Split;
  const int64_t row_blocks = (g.heads / g.kv_heads + kGroupRows - 1) / kGroupRows;
  return splits > 1 && g.segments * g.kv_heads * row_blocks < kBlocksThatFill ? splits : 0;
}
inline int64_t padded_head_dim(int64_t head_dim) {
  int64_t padded = 0;
  with_head_dim(head_dim, [&](auto d) { padded = d.value; });
  return padded;
}
template <int Split = kSplit>
int64_t cached_attention_scratch_bytes(const CachedAttention& g) {
  const int64_t rows = g.segments * g.heads * apart_splits<Split>(g);
  return rows * (padded_head_dim(g.head_dim) * int64_t(sizeof(float)) + int64_t(sizeof(SplitStatistics)));
}

// scratch: cached_attention_scratch_bytes(g), aligned to 16 bytes.
template <int Split = kSplit>
void cached_attention(const CachedAttention& g, cudaStream_t stream, void* scratch) {
  if (g.segments == 0 || g.most_rows == 0) return;
  CachedSegments p;
  p.heads = static_cast<int>(g.heads), p.kv_heads = static_cast<int>(g.kv_heads), p.head_dim = static_cast<int>(g.head_dim);
  p.window = short_window(g.window), p.causal = true;
  p.scale = static_cast<float>(g.scale), p.c = exponent_scale(g.scale);
  p.q = static_cast<const bf16*>(g.q), p.q_row = g.q_row, p.o = static_cast<bf16*>(g.o), p.o_row = g.o_row;
  p.lse = nullptr, p.tiles = 0;
  p.cache = {p.kv_heads, p.head_dim, g.offset, cached_attention_elements(1, g.head_dim), g.blocks, g.cu_rows, g.first_position};

  const int64_t chunks = g.most_rows * g.kv_heads * g.head_dim / kChunk, parts = (chunks + kAppendThreads - 1) / kAppendThreads;
  launch(append_kernel, dim3(static_cast<unsigned>(g.segments * parts)), dim3(kAppendThreads), 0, stream, p.cache,
         static_cast<const bf16*>(g.k), g.k_row, static_cast<const bf16*>(g.v), g.v_row, static_cast<int>(parts));
  with_head_dim(g.head_dim, [&](auto d) {
    constexpr int D = d.value;
    if (g.most_rows > 1) launch_attention<D, 1, Split>(p, g.segments, g.most_rows, stream);
    const int64_t splits = apart_splits<Split>(g), rows = g.segments * g.heads * splits;
    const Partials partials{static_cast<float*>(scratch),
                            reinterpret_cast<SplitStatistics*>(static_cast<float*>(scratch) + rows * D), D,
                            static_cast<int>(splits)};
    const int row_blocks = static_cast<int>((g.heads / g.kv_heads + kGroupRows - 1) / kGroupRows);
    const std::size_t bytes =
        sizeof(bf16) * (SharedRows<D>::elements(kGroupRows + 4 * kKeyTile) + SharedRows<kKeyTile>::elements(kGroupRows)) +
        sizeof(float) * (4 + 16) * kGroupRows;
    launch(split_kernel<D, Split>,
           dim3(static_cast<unsigned>(g.segments * (splits > 0 ? splits : 1)), static_cast<unsigned>(g.kv_heads * row_blocks)),
           dim3(kAttentionThreads), bytes, stream, p, partials, row_blocks);
    if (splits > 0)
      launch(merge_kernel<Split>, dim3(static_cast<unsigned>((g.segments * g.heads + 3) / 4)), dim3(kAttentionThreads), 0,
             stream, p, partials, g.segments);
  });
}

}  // namespace tutelage::cuda
