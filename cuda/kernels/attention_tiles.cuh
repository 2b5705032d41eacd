// What the attention kernels share: tiles of rows in shared memory, their products, the softmax of a row, and the one function
// that merges what a row has gathered over one split of the keys with what it has gathered before.
//
// Order    of a query row, in every kernel and however it is cut into blocks: keys go in tiles of kKeyTile and splits of
//          kSplit, both counted from position 0 of the sequence.
//            q.k      one chain of m16n8k16 over ascending features
//            sum p    lane q of four takes columns 8 j + 2 q and its neighbour; ((0, 1), (2, 3)) over the four groups of 16
//                     keys; a chain over the tiles of a split; the four lanes at the end of the split (distance 1, 2)
//            p v      one chain of m16n8k16 over ascending keys, p rounded to bf16
//          Before each tile both are multiplied by 2^(old maximum - new one); at the end of a split they are merged into the
//          total (merge, merged). A masked key has p = 0 exactly, a tile or a split that a row does not see changes no bit of
//          it: the factors are 2^0 = 1, and 0 is added.
// Shared   rows of D bf16 in chunks of 8, an odd number of chunks apart, so that eight rows' chunk c lie in different banks
//          (ldmatrix) and addresses are one register and a constant. D = 128, where that would cost a block of the RTX 4090's
//          two in the forward: no gap there, and chunk c of row r lies at c ^ (r % 8).
// Test     tests/simt/test_flash_attention.cc, test_cached_attention.cc.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "cuda/kernels/math.cuh"
#include "cuda/kernels/rows.cuh"
#include "cuda/ptx/cp_async.h"
#include "cuda/ptx/ldmatrix.h"
#include "cuda/ptx/mma.h"

namespace tutelage::cuda {

constexpr int kKeyTile = 64, kSplit = 512;  // both part of every bit
constexpr int kAttentionThreads = 128;      // 4 warps

// --- Rows in shared memory

template <int D, bool Swizzled = D == 128>
struct SharedRows {
  static_assert(D % 16 == 0);
  static constexpr int kFeatures = D, kChunks = D / kChunk;
  static constexpr bool kSwizzled = Swizzled, kAlong = D % 64 == 0;  // kAlong: copied along the row
  static constexpr int kPitch = (kSwizzled ? kChunks : kChunks + 1) * kChunk;
  static __host__ __device__ constexpr int elements(int rows) { return rows * kPitch; }
  // Where chunk `chunk` of row `row` lies. What is added to a row that is a multiple of 8 may be added outside.
  static __device__ __forceinline__ int at(int row, int chunk) {
    return row * kPitch + (kSwizzled ? chunk ^ (row & 7) : chunk) * kChunk;
  }
};

struct ChunkPlace {
  int row, chunk;
};
// The i-th chunk in the order in which neighbouring threads copy: along the row where that meets no bank twice, else 16 rows by
// two chunks (a sector of 32 bytes each), every other row in turn.
template <int D>
__device__ __forceinline__ ChunkPlace chunk_place(int i) {
  constexpr int kChunks = D / kChunk;
  if constexpr (SharedRows<D>::kAlong) return {i / kChunks, i % kChunks};
  const int group = i / 32, lane = i % 32;
  return {group / (kChunks / 2) * 16 + lane / 16 * 8 + lane / 2 % 4 * 2 + lane / 8 % 2, group % (kChunks / 2) * 2 + lane % 2};
}

// Rows [0, Rows) by cp.async: row r from `from` + r * pitch where r < count, of `chunks` chunks; zeros elsewhere.
template <class R, int Rows>
__device__ __forceinline__ void fetch_rows(bf16* to, const bf16* from, int64_t pitch, int count, int chunks) {
  constexpr int kChunks = R::kChunks, kAll = Rows * kChunks, kRounds = (kAll + kAttentionThreads - 1) / kAttentionThreads;
  const int thread = static_cast<int>(threadIdx.x);
  if constexpr (R::kAlong) {  // a thread's chunks lie below each other, kApart rows apart
    constexpr int kApart = kAttentionThreads / kChunks;
    static_assert(kApart % 8 == 0 && kAll % kAttentionThreads == 0);
    const int row = thread / kChunks, chunk = thread % kChunks;
    const bf16* p = from + row * pitch + chunk * kChunk;
    bf16* place = to + R::at(row, chunk);
    SIMT_UNROLL
    for (int k = 0; k < kRounds; ++k) {
      const bool there = row + k * kApart < count && chunk < chunks;
      cp_async_16(place + k * kApart * R::kPitch, there ? p : from, there ? 16 : 0);
      p += kApart * pitch;
    }
  } else {
    SIMT_UNROLL
    for (int k = 0; k < kRounds; ++k) {
      const int i = k * kAttentionThreads + thread;
      if (kAll % kAttentionThreads != 0 && i >= kAll) break;
      const auto [row, chunk] = chunk_place<R::kFeatures>(i);
      const bool there = row < count && chunk < chunks;
      cp_async_16(to + R::at(row, chunk), there ? from + row * pitch + chunk * kChunk : from, there ? 16 : 0);
    }
  }
}

// --- Products of one warp

// s = a b^T: 16 M rows of a, 8 N rows of b, over D features.
template <class R, int M, int N>
__device__ __forceinline__ void row_products(float (&s)[M][N][4], const bf16* a, const bf16* b) {
  const int lane = static_cast<int>(lane_id());
  SIMT_UNROLL
  for (int m = 0; m < M; ++m) SIMT_UNROLL
  for (int n = 0; n < N; ++n) s[m][n][0] = s[m][n][1] = s[m][n][2] = s[m][n][3] = 0;
  SIMT_UNROLL
  for (int k = 0; k < R::kFeatures / 16; ++k) {
    std::uint32_t fa[M][4];
    SIMT_UNROLL
    for (int m = 0; m < M; ++m) ldmatrix_x4(fa[m], a + R::at(16 * m + lane % 16, 2 * k + lane / 16));
    SIMT_UNROLL
    for (int n = 0; n < N; n += 2) {
      std::uint32_t fb[4];
      ldmatrix_x4(fb, b + R::at(8 * n + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2));
      const std::uint32_t left[2] = {fb[0], fb[1]}, right[2] = {fb[2], fb[3]};
      SIMT_UNROLL
      for (int m = 0; m < M; ++m) mma_m16n8k16_bf16(s[m][n], fa[m], left), mma_m16n8k16_bf16(s[m][n + 1], fa[m], right);
    }
  }
}

// o += p v: p [16 M, 8 N] as mma leaves it, rounded to bf16; v has 8 N rows of D features.
template <class R, int M, int N>
__device__ __forceinline__ void add_weighted_rows(float (&o)[M][R::kChunks][4], const float (&p)[M][N][4], const bf16* v) {
  const int lane = static_cast<int>(lane_id());
  SIMT_UNROLL
  for (int k = 0; k < N / 2; ++k) {
    std::uint32_t fa[M][4];
    SIMT_UNROLL
    for (int m = 0; m < M; ++m) SIMT_UNROLL
    for (int i = 0; i < 4; ++i) fa[m][i] = pack_bf16x2(p[m][2 * k + i / 2][i % 2 * 2], p[m][2 * k + i / 2][i % 2 * 2 + 1]);
    SIMT_UNROLL
    for (int c = 0; c < R::kChunks; c += 2) {
      std::uint32_t fb[4];
      ldmatrix_x4_trans(fb, v + R::at(16 * k + lane % 16, c + lane / 16));
      const std::uint32_t left[2] = {fb[0], fb[1]}, right[2] = {fb[2], fb[3]};
      SIMT_UNROLL
      for (int m = 0; m < M; ++m) mma_m16n8k16_bf16(o[m][c], fa[m], left), mma_m16n8k16_bf16(o[m][c + 1], fa[m], right);
    }
  }
}

// --- The softmax of a row

__device__ __forceinline__ float minus_infinity() { return as_float(0xFF800000u); }
// The maximum as something to subtract: 0 where no key has been seen yet.
__device__ __forceinline__ float finite_top(float top) { return top == minus_infinity() ? 0.0f : top; }
// 2^((from - to) c): what a sum in units of one maximum is multiplied by for another.
__device__ __forceinline__ float rescaling(float from, float to, float c) { return exp2_approx((from - to) * c); }
// p of a score (or the pair's, the tile's sum, in the one order): c = scale log2 e, shift = - maximum c.
__device__ __forceinline__ float weight_of(float score, float c, float shift) { return exp2_approx(fma(score, c, shift)); }
__device__ __forceinline__ float group_sum(float p0, float p1, float p8, float p9) { return (p0 + p1) + (p8 + p9); }
__device__ __forceinline__ float tile_sum(float g0, float g1, float g2, float g3) { return (g0 + g1) + (g2 + g3); }
__device__ __forceinline__ float quad_sum(float x) {
  x = x + shfl_xor(x, 1);
  return x + shfl_xor(x, 2);
}
__device__ __forceinline__ float quad_maximum(float x) {
  x = maximum(x, shfl_xor(x, 1));
  return maximum(x, shfl_xor(x, 2));
}

struct MergeFactors {
  float total, part;
};
// The one function by which splits become a row: maximum and sum of `total` take in those of the next split. Its features:
// merged().
__device__ __forceinline__ MergeFactors merge(float& total_top, float& total_sum, float part_top, float part_sum, float c) {
  const float top = maximum(total_top, part_top), base = finite_top(top);
  const MergeFactors f{rescaling(total_top, base, c), rescaling(part_top, base, c)};
  total_sum = total_sum * f.total + part_sum * f.part;
  total_top = top;
  return f;
}
__device__ __forceinline__ float merged(float total, float part, const MergeFactors& f) {
  return total * f.total + part * f.part;
}
// + 0: a sum that is -0 would otherwise show whether masked zeros came after it.
__device__ __forceinline__ float normalized(float o, float inverse) { return fma(o, inverse, 0.0f); }

// What a query at `position` sees: keys [first, last).
struct Visible {
  int first, last;
};
__device__ __forceinline__ Visible visible_keys(bool causal, int window, int position, int keys) {
  const int last = causal && position + 1 < keys ? position + 1 : keys;
  return {window > 0 && position + 1 > window ? position + 1 - window : 0, last};
}

// --- On the host

// f(std::integral_constant<int, D>()) for the kernels' D >= head_dim; features beyond head_dim are zeros.
template <class F>
void with_head_dim(int64_t head_dim, F f) {
  if (head_dim <= 0 || head_dim > 128 || head_dim % 8 != 0)
    throw std::invalid_argument("head_dim " + std::to_string(head_dim) +
                                ": attention on a CUDA device takes multiples of 8 up to 128");
  if (head_dim <= 16) return f(std::integral_constant<int, 16>());
  if (head_dim <= 32) return f(std::integral_constant<int, 32>());
  if (head_dim <= 64) return f(std::integral_constant<int, 64>());
  if (head_dim <= 80) return f(std::integral_constant<int, 80>());
  return f(std::integral_constant<int, 128>());
}

// scale log2 e, in which exponents are powers of two.
inline float exponent_scale(double scale) { return static_cast<float>(scale * 1.4426950408889634); }
// A window of 2^30 or more is none.
inline int short_window(int64_t window) { return window >= int64_t(1) << 30 ? 0 : static_cast<int>(window); }

}  // namespace tutelage::cuda
