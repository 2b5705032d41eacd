// One tile of a product on tensor cores: what the kernels share that multiply (matmul.cuh, linear_logprob.cuh), so that an
// element has the same bits in all of them.
//
// Types    A, B bf16, sums float.
// Order    of every element one chain of m16n8k16 over ascending k, from 0 or from what the sums hold; never split. A step's 16
//          products are added by the tensor core at once, in an order of its own: where k are tokens, `steps` says which tokens
//          are a step, and no step spans two sequences.
// Tiles    M x N of C in 4 warps, 32 deep, by cp.async in several stages. A warp's columns are two stretches, half a tile
// apart:
//          so gate and up of SwiGLU meet in one thread. Blocks walk over C in groups of 8 rows of tiles, so that what they read
//          together stays in L2.
// Shared   64 bytes of k or 32 rows of k, in chunks of 8, each at chunk ^ (row's place among the rows of 128 bytes): the eight
//          addresses of an ldmatrix lie in different banks. Once nobody reads a stage any more, the sums lie in its place.
// Rows that are not aligned to 16 bytes are copied element by element: slower, the same bits.
// Test     tests/simt/test_matmul.cc, test_linear_logprob.cc.
#pragma once

#include <cstdint>

#include "cuda/kernels/rows.cuh"
#include "cuda/ptx/cp_async.h"
#include "cuda/ptx/ldmatrix.h"
#include "cuda/ptx/mma.h"

namespace tutelage::cuda {

constexpr int kProductThreads = 128, kProductDepth = 32;  // threads of a block; k of a stage
constexpr int kStepK = 16;                                // of one mma

// How an operand lies in memory: `along` k, one row of the tile a row; or across it, one k a row.
enum class Lies { along, across };

// A stage of an operand: Rows rows of the tile, kProductDepth of k.
template <int Rows, Lies lies>
struct Stage {
  static constexpr int kRowElements = lies == Lies::along ? kProductDepth : Rows;
  static constexpr int kStageRows = lies == Lies::along ? Rows : kProductDepth;
  static constexpr int kElements = Rows * kProductDepth;
  static constexpr int kChunks = kRowElements / kChunk, kPlaces = kChunks < 8 ? kChunks : 8;
  // Where a chunk lies; what is added to a row that is a multiple of 8 may be added outside.
  static __device__ __forceinline__ int at(int row, int chunk) {
    return row * kRowElements + (chunk ^ ((row & 7) / (8 / kPlaces) & (kPlaces - 1))) * kChunk;
  }
};

// What a block knows of one operand: rows [0, half) of the tile are rows [first, first_end) of it, those behind are
// [second, second_end). Where there is none, zeros.
struct Operand {
  const bf16* p;
  int64_t pitch;  // between rows (along) or between k (across)
  int half;
  int64_t first, first_end, second, second_end;
  __device__ __forceinline__ int64_t row(int of_tile) const {
    return of_tile < half ? first + of_tile : second + of_tile - half;
  }
  __device__ __forceinline__ int64_t end(int of_tile) const { return of_tile < half ? first_end : second_end; }
};

// A thread's chunks of every stage: of rows kApart apart (along: of the tile, across: of k), so that what is computed once
// serves all of them.
template <int Rows, Lies lies, bool Aligned>
class Fetch {
  using S = Stage<Rows, lies>;
  static constexpr int kAll = S::kStageRows * S::kChunks, kRounds = (kAll + kProductThreads - 1) / kProductThreads;
  static constexpr int kApart = kProductThreads / S::kChunks;
  static_assert(kApart % 8 == 0 && (kRounds == 1 || kAll % kProductThreads == 0));

 public:
  // steps: which k a stage holds, see matmul.h; null: one after the other. k: of all of them, each step counted as whole.
  __device__ __forceinline__ Fetch(const Operand& x, const int32_t* steps, int k) : base_(x.p), steps_(steps), k_(k) {
    const int thread = static_cast<int>(threadIdx.x);
    row_ = thread / S::kChunks, chunk_ = thread % S::kChunks;
    works_ = kAll >= kProductThreads || thread < kAll;
    if constexpr (lies == Lies::along) {
      there_ = 0;
      SIMT_UNROLL
      for (int r = 0; r < kRounds; ++r)
        if (x.row(row_ + r * kApart) < x.end(row_ + r * kApart)) there_ |= 1 << r;
      from_ = x.p + x.row(row_) * x.pitch + chunk_ * kChunk;
      apart_ = kApart * x.pitch;
      half_ = x.half - row_, jump_ = (x.second - x.half - x.first) * x.pitch;
    } else {
      const int64_t own = x.row(chunk_ * kChunk), left = x.end(chunk_ * kChunk) - own;
      there_ = left <= 0 ? 0 : left < kChunk ? static_cast<int>(left) : kChunk;
      from_ = x.p + own + (steps == nullptr ? row_ * x.pitch : 0);
      apart_ = x.pitch, half_ = 0, jump_ = 0;
    }
  }

  // The stage that begins at k0, which is kProductDepth further than the one before.
  __device__ __forceinline__ void operator()(bf16* stage, int k0) {
    if (!works_) return;
    bf16* place = stage + S::at(row_, chunk_);
    if constexpr (lies == Lies::along) {
      const int left = k_ - k0 - chunk_ * kChunk, count = left < 0 ? 0 : left < kChunk ? left : kChunk;
      const bf16* from = from_;
      SIMT_UNROLL
      for (int r = 0; r < kRounds; ++r) {
        copy(place + r * kApart * S::kRowElements, from + (r * kApart >= half_ ? jump_ : 0),
             (there_ >> r & 1) != 0 ? count : 0);
        from += apart_;
      }
      from_ += kProductDepth;
    } else {
      SIMT_UNROLL
      for (int r = 0; r < kRounds; ++r) {
        const int k = k0 + row_ + r * kApart;
        const bf16* from = from_ + r * kApart * apart_;
        bool there = k < k_;
        if (steps_ != nullptr && there) {
          const Pack<int32_t, 2> step = ld_global(reinterpret_cast<const Pack<int32_t, 2>*>(steps_) + k / kStepK);
          there = k % kStepK < step[1];
          from = from_ + (int64_t(step[0]) + k % kStepK) * apart_;
        }
        copy(place + r * kApart * S::kRowElements, from, there ? there_ : 0);
      }
      if (steps_ == nullptr) from_ += kProductDepth * apart_;
    }
  }

 private:
  __device__ __forceinline__ void copy(bf16* to, const bf16* from, int count) const {
    if constexpr (Aligned)
      cp_async_16(to, count > 0 ? from : base_, static_cast<unsigned>(count) * 2);
    else
      st_shared(reinterpret_cast<Chunk*>(to), load_chunk<false>(from, count));
  }

  const bf16 *base_, *from_;
  const int32_t* steps_;
  int64_t apart_, jump_;
  int k_, row_, chunk_, there_, half_;
  bool works_;
};

// 16 rows of A (from a multiple of 16), 16 of k from kk.
template <int Rows, Lies lies>
__device__ __forceinline__ void load_a(std::uint32_t (&f)[4], const bf16* stage, int row, int kk) {
  using S = Stage<Rows, lies>;
  const int lane = static_cast<int>(lane_id());
  if constexpr (lies == Lies::along)
    ldmatrix_x4(f, stage + row * S::kRowElements + S::at(lane % 16, kk / kChunk + lane / 16));
  else
    ldmatrix_x4_trans(f, stage + kk * S::kRowElements + S::at(lane / 16 * 8 + lane % 8, row / kChunk + lane / 8 % 2));
}
// Twice 8 columns of B, from `left` and from `right`; 16 of k.
template <int Columns, Lies lies>
__device__ __forceinline__ void load_b(std::uint32_t (&f)[4], const bf16* stage, int left, int right, int kk) {
  using S = Stage<Columns, lies>;
  const int lane = static_cast<int>(lane_id()), column = lane < 16 ? left : right;
  if constexpr (lies == Lies::along)
    ldmatrix_x4(f, stage + column * S::kRowElements + S::at(lane % 8, kk / kChunk + lane / 8 % 2));
  else
    ldmatrix_x4_trans(f, stage + kk * S::kRowElements + S::at(lane % 16, column / kChunk));
}

// Eight neighbours of a row, of which n are there; `whole`: all are, and 16 bytes are read or written at a time.
using Eight = Pack<float, kChunk>;
__device__ __forceinline__ Eight load_eight(const bf16* p, int n, bool whole) {
  const Chunk v = whole ? load_chunk<true>(p, kChunk) : load_chunk<false>(p, n);
  Eight x;
  SIMT_UNROLL
  for (int i = 0; i < kChunk; ++i) x[i] = to_float(v[i]);
  return x;
}
__device__ __forceinline__ Eight load_eight(const float* p, int n, bool whole) {
  Eight x;
  SIMT_UNROLL
  for (int i = 0; i < kChunk; i += 4) {
    if (whole) {
      const Pack<float, 4> v = ld_global(reinterpret_cast<const Pack<float, 4>*>(p + i));
      x[i] = v[0], x[i + 1] = v[1], x[i + 2] = v[2], x[i + 3] = v[3];
    } else {
      SIMT_UNROLL
      for (int k = i; k < i + 4; ++k) x[k] = k < n ? ld_global(p + k) : 0.0f;
    }
  }
  return x;
}
__device__ __forceinline__ void store_eight(bf16* p, const Eight& x, int n, bool whole) {
  Chunk v;
  SIMT_UNROLL
  for (int i = 0; i < kChunk; ++i) v[i] = to_bf16(x[i]);
  if (whole)
    store_chunk<true>(p, kChunk, v);
  else
    store_chunk<false>(p, n, v);
}
__device__ __forceinline__ void store_eight(float* p, const Eight& x, int n, bool whole) {
  SIMT_UNROLL
  for (int i = 0; i < kChunk; i += 4) {
    if (whole) {
      st_global(reinterpret_cast<Pack<float, 4>*>(p + i), Pack<float, 4>{{x[i], x[i + 1], x[i + 2], x[i + 3]}});
    } else {
      SIMT_UNROLL
      for (int k = i; k < i + 4; ++k)
        if (k < n) st_global(p + k, x[k]);
    }
  }
}

template <int M, int N, int WarpsM, int Stages, Lies a_lies, Lies b_lies, bool Aligned>
struct ProductShape {
  static constexpr int kM = M, kN = N, kWarpsM = WarpsM, kStages = Stages;
  static constexpr Lies kLiesA = a_lies, kLiesB = b_lies;
  using StageA = Stage<M, a_lies>;
  using StageB = Stage<N, b_lies>;
  using FetchA = Fetch<M, a_lies, Aligned>;
  using FetchB = Fetch<N, b_lies, Aligned>;
  static constexpr int kWarpsN = 4 / WarpsM, kWarpM = M / WarpsM, kWarpN = N / kWarpsN;
  static constexpr int kSteps = kWarpM / 16, kColumns = kWarpN / 8, kHalf = N / 2;
  static constexpr int kPitch = N + 8;  // of a warp row's sums in shared memory: eight rows' neighbours lie in different banks
  static constexpr int kStageBytes = Stages * (M + N) * kProductDepth * 2, kSumBytes = kWarpM * kPitch * 4;
  // Blocks of a multiprocessor, at least: 4 leave 128 registers a thread, which suffice.
  static constexpr int kBlocks = M == 64 && N == 64 ? 4 : 1;
  static constexpr int kBytes = kStageBytes > kSumBytes ? kStageBytes : kSumBytes;
  static_assert(kWarpM % 16 == 0 && kWarpN % 16 == 0);
  // The tile's column at which the j-th 8 of warp column w begin.
  static __device__ __forceinline__ int column(int w, int j) {
    return j < kColumns / 2 ? w * (kWarpN / 2) + j * 8 : kHalf + w * (kWarpN / 2) + (j - kColumns / 2) * 8;
  }
};

// Which tile of C a block computes: groups of 8 rows of tiles, column by column.
struct TilePlace {
  int64_t m, n;
  __device__ __forceinline__ TilePlace(int64_t tiles_m, int64_t tiles_n) {
    const int64_t group_tiles = 8 * tiles_n, group = int64_t(blockIdx.x) / group_tiles;
    const int64_t group_rows = tiles_m - 8 * group < 8 ? tiles_m - 8 * group : 8;
    const int64_t in_group = int64_t(blockIdx.x) - group * group_tiles;
    m = 8 * group + in_group % group_rows, n = in_group / group_rows;
  }
};

// A block's tile: its rows are A's, its columns B's.
template <class Shape>
class ProductTile {
 public:
  using Sums = float[Shape::kSteps][Shape::kColumns][4];  // a thread's, as mma has them

  __device__ __forceinline__ ProductTile(const Operand& a, const Operand& b)
      : a_(a), b_(b), lane_(static_cast<int>(lane_id())), warp_(static_cast<int>(threadIdx.x) / 32) {}

  __device__ __forceinline__ int warp_m() const { return warp_ / Shape::kWarpsN; }
  __device__ __forceinline__ int warp_n() const { return warp_ % Shape::kWarpsN; }

  // c += A B over k: of all steps, each counted as whole. Afterwards shared memory is free, for all.
  __device__ __forceinline__ void multiply(Sums& c, const int32_t* steps, int k) const {
    using SA = typename Shape::StageA;
    using SB = typename Shape::StageB;
    bf16* const stage_a = dyn_smem<bf16>();
    bf16* const stage_b = stage_a + Shape::kStages * SA::kElements;
    const int stages = (k + kProductDepth - 1) / kProductDepth;
    typename Shape::FetchA fetch_a(a_, steps, k);
    typename Shape::FetchB fetch_b(b_, steps, k);
    auto fetch = [&](int s) {
      if (s < stages) {
        fetch_a(stage_a + s % Shape::kStages * SA::kElements, s * kProductDepth);
        fetch_b(stage_b + s % Shape::kStages * SB::kElements, s * kProductDepth);
      }
      cp_async_commit();
    };
    for (int s = 0; s < Shape::kStages - 1; ++s) fetch(s);

    for (int s = 0; s < stages; ++s) {
      cp_async_wait_group<Shape::kStages - 2>();
      __syncthreads();  // the stage is there for all, and all have read the one that is fetched into now
      fetch(s + Shape::kStages - 1);
      const bf16 *own_a = stage_a + s % Shape::kStages * SA::kElements, *own_b = stage_b + s % Shape::kStages * SB::kElements;
      SIMT_UNROLL
      for (int kk = 0; kk < kProductDepth; kk += kStepK) {
        std::uint32_t fa[Shape::kSteps][4];
        SIMT_UNROLL
        for (int i = 0; i < Shape::kSteps; ++i)
          load_a<Shape::kM, Shape::kLiesA>(fa[i], own_a, warp_m() * Shape::kWarpM + i * 16, kk);
        SIMT_UNROLL
        for (int j = 0; j < Shape::kColumns; j += 2) {
          std::uint32_t fb[4];
          load_b<Shape::kN, Shape::kLiesB>(fb, own_b, Shape::column(warp_n(), j), Shape::column(warp_n(), j + 1), kk);
          const std::uint32_t left[2] = {fb[0], fb[1]}, right[2] = {fb[2], fb[3]};
          SIMT_UNROLL
          for (int i = 0; i < Shape::kSteps; ++i)
            mma_m16n8k16_bf16(c[i][j], fa[i], left), mma_m16n8k16_bf16(c[i][j + 1], fa[i], right);
        }
      }
    }
    cp_async_wait_group<0>();
    __syncthreads();  // nobody reads a stage any more
  }

  // Between registers and memory the tile goes through shared memory, 16 bytes at a time, a row of warps (`upper`) after the
  // other.
  // The thread's sums into shared memory, if it belongs to that row of warps.
  __device__ __forceinline__ void put(const Sums& c, int upper) const {
    if (warp_m() != upper) return;
    SIMT_UNROLL
    for (int i = 0; i < Shape::kSteps; ++i) SIMT_UNROLL
    for (int j = 0; j < Shape::kColumns; ++j) SIMT_UNROLL
    for (int h = 0; h < 2; ++h)
      st_shared(reinterpret_cast<Pack<float, 2>*>(in_sums(i, j, h)), Pack<float, 2>{{c[i][j][2 * h], c[i][j][2 * h + 1]}});
  }
  // And from there, where C has an element.
  __device__ __forceinline__ void take(Sums& c, int upper) const {
    if (warp_m() != upper) return;
    SIMT_UNROLL
    for (int i = 0; i < Shape::kSteps; ++i) SIMT_UNROLL
    for (int j = 0; j < Shape::kColumns; ++j) SIMT_UNROLL
    for (int h = 0; h < 2; ++h) {
      const bool there = a_.first + upper * Shape::kWarpM + i * 16 + h * 8 + lane_ / 4 < a_.first_end;
      const int column = Shape::column(warp_n(), j) + lane_ % 4 * 2;
      const int64_t left = b_.end(column) - b_.row(column);
      if (!there || left <= 0) continue;
      const Pack<float, 2> pair = ld_shared(reinterpret_cast<const Pack<float, 2>*>(in_sums(i, j, h)));
      c[i][j][2 * h] = pair[0], c[i][j][2 * h + 1] = pair[1];
    }
  }
  // use(row, column, how many, place in shared memory) for the chunks of eight columns, of the tile's first so many, that are
  // this thread's.
  template <class Use>
  __device__ __forceinline__ void each_chunk(int upper, int columns, Use use) const {
    const int chunks = columns / kChunk;
    for (int i = static_cast<int>(threadIdx.x); i < Shape::kWarpM * chunks; i += kProductThreads) {
      const int in_tile = i / chunks, column = i % chunks * kChunk;
      const int64_t row = a_.first + upper * Shape::kWarpM + in_tile, own = b_.row(column), left = b_.end(column) - own;
      if (row < a_.first_end && left > 0)
        use(row, own, left < kChunk ? static_cast<int>(left) : kChunk, dyn_smem<float>() + in_tile * Shape::kPitch + column);
    }
  }
  // Eight sums; every other four lanes take the halves in the other order, so that eight neighbours meet no bank twice.
  __device__ __forceinline__ Eight load_sums(const float* p) const {
    const int late = lane_ / 4 % 2;
    const Half one = ld_shared(reinterpret_cast<const Half*>(p) + late),
               two = ld_shared(reinterpret_cast<const Half*>(p) + 1 - late);
    Eight x;
    SIMT_UNROLL
    for (int e = 0; e < 4; ++e) x[e] = late == 0 ? one[e] : two[e], x[4 + e] = late == 0 ? two[e] : one[e];
    return x;
  }
  __device__ __forceinline__ void store_sums(float* p, const Eight& x) const {
    const int late = lane_ / 4 % 2;
    Half one, two;
    SIMT_UNROLL
    for (int e = 0; e < 4; ++e) one[e] = late == 0 ? x[e] : x[4 + e], two[e] = late == 0 ? x[4 + e] : x[e];
    st_shared(reinterpret_cast<Half*>(p) + late, one);
    st_shared(reinterpret_cast<Half*>(p) + 1 - late, two);
  }

 private:
  using Half = Pack<float, 4>;
  __device__ __forceinline__ float* in_sums(int i, int j, int h) const {
    return dyn_smem<float>() + (i * 16 + h * 8 + lane_ / 4) * Shape::kPitch + Shape::column(warp_n(), j) + lane_ % 4 * 2;
  }

  const Operand &a_, &b_;
  int lane_, warp_;
};

}  // namespace tutelage::cuda
