// C = A B with what follows it fused, as cpp/kernels/matmul.h states it, on tensor cores.
//
// Types    A, B, bias, residual, pre, activated bf16; C bf16, or float (c_state). a_state: scalar_head.cuh's affair.
// Order    of every element one chain of m16n8k16 over ascending k in float, from 0 or from what C holds; never split. So a row
//          has the same bits in all tile shapes, wherever it lies, whatever the other rows are. A step's 16 products are added
//          by the tensor core at once, in an order of its own: where k are tokens, `k_steps` says which tokens are a step, and
//          no step spans two sequences. An element-wise function sees the sum as C keeps it, rounded to bf16.
// Tiles    128 x 128 of C in 4 warps of 64 x 64 (training, prefill), or 16 x 64 in 4 warps of 16 x 16 (decode: m <= 16), 32
// deep,
//          by cp.async in 4 and 8 stages. A warp's columns are two stretches, half a tile apart: so gate and up of SwiGLU meet
//          in one thread. Blocks walk over C in groups of 8 rows of tiles, so that what they read together stays in L2.
// Shared   64 bytes of k or 32 rows of k, in chunks of 8, each at chunk ^ (row's place among the rows of 128 bytes): the eight
//          addresses of an ldmatrix lie in different banks.
// Work     2 m n k flops; reads A n/128 times and B m/128 times (from L2, mostly), C once.
// Rows that are not aligned to 16 bytes are copied element by element: slower, the same bits.
// Test     tests/simt/test_matmul.cc.   Benchmark  bench/gpu.py (matmul).
#pragma once

#include <cstdint>
#include <optional>
#include <stdexcept>

#include "cuda/kernels/gelu.cuh"
#include "cuda/kernels/rows.cuh"
#include "cuda/kernels/swiglu.cuh"
#include "cuda/ptx/cp_async.h"
#include "cuda/ptx/ldmatrix.h"
#include "cuda/ptx/mma.h"
#include "kernels/matmul.h"

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
__device__ __forceinline__ float rounded(float x) { return to_float(to_bf16(x)); }

struct Product {
  Matmul g;
  int64_t tiles_m, tiles_n;  // of C
  bool chunks;               // eight neighbours of C and of what goes with it may be moved together
};

template <int M, int N, int WarpsM, int Stages, Lies a_lies, Lies b_lies, bool Aligned>
struct ProductShape {
  static constexpr int kWarpsN = 4 / WarpsM, kWarpM = M / WarpsM, kWarpN = N / kWarpsN;
  static constexpr int kSteps = kWarpM / 16, kColumns = kWarpN / 8, kHalf = N / 2;
  static constexpr int kPitch = N + 8;  // of a warp row's sums in shared memory: eight rows' neighbours lie in different banks
  static constexpr int kStageBytes = Stages * (M + N) * kProductDepth * 2, kSumBytes = kWarpM * kPitch * 4;
  static constexpr int kBlocks =
      M == 64 ? 4 : 1;  // of a multiprocessor, at least: 4 leave 128 registers a thread, which suffice
  static constexpr int kBytes = kStageBytes > kSumBytes ? kStageBytes : kSumBytes;
  static_assert(kWarpM % 16 == 0 && kWarpN % 16 == 0);
  // The tile's column at which the j-th 8 of warp column w begin.
  static __device__ __forceinline__ int column(int w, int j) {
    return j < kColumns / 2 ? w * (kWarpN / 2) + j * 8 : kHalf + w * (kWarpN / 2) + (j - kColumns / 2) * 8;
  }
};

template <int M, int N, int WarpsM, int Stages, Lies a_lies, Lies b_lies, bool Aligned>
static __global__ void __launch_bounds__(kProductThreads, ProductShape<M, N, WarpsM, Stages, a_lies, b_lies, Aligned>::kBlocks)
    matmul_kernel(const Product product) {
  using Shape = ProductShape<M, N, WarpsM, Stages, a_lies, b_lies, Aligned>;
  using SA = Stage<M, a_lies>;
  using SB = Stage<N, b_lies>;
  constexpr int kSteps = Shape::kSteps, kColumns = Shape::kColumns;
  const Matmul& g = product.g;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(lane_id());
  const int warp_m = warp / Shape::kWarpsN, warp_n = warp % Shape::kWarpsN;

  // Which tile: groups of 8 rows of tiles, column by column.
  const int64_t group_tiles = 8 * product.tiles_n, group = int64_t(blockIdx.x) / group_tiles;
  const int64_t group_rows = product.tiles_m - 8 * group < 8 ? product.tiles_m - 8 * group : 8;
  const int64_t in_group = int64_t(blockIdx.x) - group * group_tiles;
  const int64_t tile_m = 8 * group + in_group % group_rows, tile_n = in_group / group_rows;

  const bool swiglu = g.activation == Activation::swiglu;
  const int64_t f = swiglu ? g.n / 2 : g.n;  // columns of each half
  const int64_t first = tile_n * (swiglu ? Shape::kHalf : N);
  const Operand a{static_cast<const bf16*>(g.a), a_lies == Lies::along ? g.a_row : g.a_col, M, tile_m * M, g.m, 0, 0};
  const Operand b{static_cast<const bf16*>(g.b),
                  b_lies == Lies::along ? g.b_col : g.b_row,
                  swiglu ? Shape::kHalf : N,
                  first,
                  f,
                  f + first,
                  g.n};

  bf16* const stage_a = dyn_smem<bf16>();
  bf16* const stage_b = stage_a + Stages * SA::kElements;
  const int k = static_cast<int>(g.k_steps == nullptr ? g.k : g.k_step_count * kStepK);
  const int stages = (k + kProductDepth - 1) / kProductDepth;
  Fetch<M, a_lies, Aligned> fetch_a(a, g.k_steps, k);
  Fetch<N, b_lies, Aligned> fetch_b(b, g.k_steps, k);
  auto fetch = [&](int s) {
    if (s < stages) {
      fetch_a(stage_a + s % Stages * SA::kElements, s * kProductDepth);
      fetch_b(stage_b + s % Stages * SB::kElements, s * kProductDepth);
    }
    cp_async_commit();
  };

  // The tile goes from registers to memory, and back, through shared memory: 16 bytes at a time, a row of warps after the
  // other.
  float* const sums = dyn_smem<float>();
  auto in_sums = [&](int i, int j, int h) {
    return sums + (i * 16 + h * 8 + lane / 4) * Shape::kPitch + Shape::column(warp_n, j) + lane % 4 * 2;
  };
  // use(row, column, how many, place in `sums`) for the chunks of eight columns, of the tile's first so many, that are this
  // thread's.
  auto each_chunk_of_sums = [&](int upper, int columns, auto use) {
    const int chunks = columns / kChunk;
    for (int i = static_cast<int>(threadIdx.x); i < Shape::kWarpM * chunks; i += kProductThreads) {
      const int in_tile = i / chunks, column = i % chunks * kChunk;
      const int64_t row = tile_m * M + upper * Shape::kWarpM + in_tile, own = b.row(column), left = b.end(column) - own;
      if (row < g.m && left > 0)
        use(row, own, left < kChunk ? static_cast<int>(left) : kChunk, sums + in_tile * Shape::kPitch + column);
    }
  };
  // Eight sums; every other four lanes take the halves in the other order, so that eight neighbours meet no bank twice.
  using Half = Pack<float, 4>;
  const int late = lane / 4 % 2;
  auto load_sums = [&](const float* p) {
    const Half one = ld_shared(reinterpret_cast<const Half*>(p) + late),
               two = ld_shared(reinterpret_cast<const Half*>(p) + 1 - late);
    Eight x;
    SIMT_UNROLL
    for (int e = 0; e < 4; ++e) x[e] = late == 0 ? one[e] : two[e], x[4 + e] = late == 0 ? two[e] : one[e];
    return x;
  };
  auto store_sums = [&](float* p, const Eight& x) {
    Half one, two;
    SIMT_UNROLL
    for (int e = 0; e < 4; ++e) one[e] = late == 0 ? x[e] : x[4 + e], two[e] = late == 0 ? x[4 + e] : x[e];
    st_shared(reinterpret_cast<Half*>(p) + late, one);
    st_shared(reinterpret_cast<Half*>(p) + 1 - late, two);
  };

  float c[kSteps][kColumns][4];
  SIMT_UNROLL
  for (int i = 0; i < kSteps; ++i) SIMT_UNROLL
  for (int j = 0; j < kColumns; ++j) c[i][j][0] = c[i][j][1] = c[i][j][2] = c[i][j][3] = 0;
  if (g.accumulate) {
    for (int upper = 0; upper < WarpsM; ++upper) {
      each_chunk_of_sums(upper, N, [&](int64_t row, int64_t column, int n, float* place) {
        const int64_t at = row * g.c_row + column;
        const bool whole = product.chunks && n == kChunk;
        store_sums(place, g.c_state ? load_eight(static_cast<const float*>(g.c) + at, n, whole)
                                    : load_eight(static_cast<const bf16*>(g.c) + at, n, whole));
      });
      __syncthreads();
      if (warp_m == upper) {
        SIMT_UNROLL
        for (int i = 0; i < kSteps; ++i) SIMT_UNROLL
        for (int j = 0; j < kColumns; ++j) SIMT_UNROLL
        for (int h = 0; h < 2; ++h) {
          const bool there = tile_m * M + upper * Shape::kWarpM + i * 16 + h * 8 + lane / 4 < g.m;
          const int column = Shape::column(warp_n, j) + lane % 4 * 2;
          const int64_t left = b.end(column) - b.row(column);
          if (!there || left <= 0) continue;
          const Pack<float, 2> pair = ld_shared(reinterpret_cast<const Pack<float, 2>*>(in_sums(i, j, h)));
          c[i][j][2 * h] = pair[0], c[i][j][2 * h + 1] = pair[1];
        }
      }
      __syncthreads();
    }
  }
  for (int s = 0; s < Stages - 1; ++s) fetch(s);

  for (int s = 0; s < stages; ++s) {
    cp_async_wait_group<Stages - 2>();
    __syncthreads();  // the stage is there for all, and all have read the one that is fetched into now
    fetch(s + Stages - 1);
    const bf16 *own_a = stage_a + s % Stages * SA::kElements, *own_b = stage_b + s % Stages * SB::kElements;
    SIMT_UNROLL
    for (int kk = 0; kk < kProductDepth; kk += kStepK) {
      std::uint32_t fa[kSteps][4];
      SIMT_UNROLL
      for (int i = 0; i < kSteps; ++i) load_a<M, a_lies>(fa[i], own_a, warp_m * Shape::kWarpM + i * 16, kk);
      SIMT_UNROLL
      for (int j = 0; j < kColumns; j += 2) {
        std::uint32_t fb[4];
        load_b<N, b_lies>(fb, own_b, Shape::column(warp_n, j), Shape::column(warp_n, j + 1), kk);
        const std::uint32_t left[2] = {fb[0], fb[1]}, right[2] = {fb[2], fb[3]};
        SIMT_UNROLL
        for (int i = 0; i < kSteps; ++i) mma_m16n8k16_bf16(c[i][j], fa[i], left), mma_m16n8k16_bf16(c[i][j + 1], fa[i], right);
      }
    }
  }
  cp_async_wait_group<0>();
  __syncthreads();  // nobody reads a stage any more

  const bool backward = g.activation >= Activation::gelu_backward;
  const float scale = static_cast<float>(g.scale);
  const auto *bias = static_cast<const bf16*>(g.bias), *residual = static_cast<const bf16*>(g.residual);
  const auto* pre = static_cast<const bf16*>(g.pre);
  auto* activated = static_cast<bf16*>(g.activated);
  for (int upper = 0; upper < WarpsM; ++upper) {
    if (warp_m == upper) {
      SIMT_UNROLL
      for (int i = 0; i < kSteps; ++i) SIMT_UNROLL
      for (int j = 0; j < kColumns; ++j) SIMT_UNROLL
      for (int h = 0; h < 2; ++h)
        st_shared(reinterpret_cast<Pack<float, 2>*>(in_sums(i, j, h)), Pack<float, 2>{{c[i][j][2 * h], c[i][j][2 * h + 1]}});
    }
    __syncthreads();
    each_chunk_of_sums(upper, swiglu ? Shape::kHalf : N, [&](int64_t row, int64_t column, int n, float* place) {
      const bool whole = product.chunks && n == kChunk;
      auto finished = [&](const float* from, int64_t at) {
        Eight x = load_sums(from);
        if (g.scale != 1) {
          SIMT_UNROLL
          for (int e = 0; e < kChunk; ++e) x[e] = x[e] * scale;
        }
        for (const bf16* more :
             {bias == nullptr ? nullptr : bias + at, residual == nullptr ? nullptr : residual + row * g.residual_row + at}) {
          if (more == nullptr) continue;
          const Eight y = load_eight(more, n, whole);
          SIMT_UNROLL
          for (int e = 0; e < kChunk; ++e) x[e] = x[e] + y[e];
        }
        return x;
      };
      Eight x = finished(place, column);
      if (g.c_state) return store_eight(static_cast<float*>(g.c) + row * g.c_row + column, x, n, whole);
      bf16* const to = static_cast<bf16*>(g.c) + row * g.c_row + column;
      if (!backward) store_eight(to, x, n, whole);
      if (g.activation == Activation::none) return;
      SIMT_UNROLL
      for (int e = 0; e < kChunk; ++e)
        x[e] = rounded(x[e]);  // as it is kept, and as the kernels that are not fused are given it
      bf16* const y = activated + row * g.activated_row + column;
      const bool erf = g.activation == Activation::gelu_erf || g.activation == Activation::gelu_erf_backward;
      Eight again;
      if (swiglu) {
        const Eight up = finished(place + Shape::kHalf, f + column);
        store_eight(to + f, up, n, whole);
        SIMT_UNROLL
        for (int e = 0; e < kChunk; ++e) again[e] = swiglu_value(x[e], rounded(up[e]));
      } else if (!backward) {
        SIMT_UNROLL
        for (int e = 0; e < kChunk; ++e) again[e] = erf ? gelu_value<true>(x[e]) : gelu_value<false>(x[e]);
      } else {
        const bf16* const kept = pre + row * g.pre_row + column;
        const Eight own = load_eight(kept, n, whole);
        if (g.activation == Activation::swiglu_backward) {
          const Eight up = load_eight(kept + g.n, n, whole);
          Eight d_up;
          SIMT_UNROLL
          for (int e = 0; e < kChunk; ++e) {
            const float s = sigmoid(own[e]), silu = own[e] * s;
            again[e] = swiglu_value(own[e], up[e]);
            d_up[e] = x[e] * silu;
            x[e] = x[e] * up[e] * fma(silu, 1.0f - s, s);
          }
          store_eight(to + g.n, d_up, n, whole);
        } else {
          SIMT_UNROLL
          for (int e = 0; e < kChunk; ++e) {
            again[e] = erf ? gelu_value<true>(own[e]) : gelu_value<false>(own[e]);
            x[e] = x[e] * (erf ? gelu_slope<true>(own[e]) : gelu_slope<false>(own[e]));
          }
        }
        store_eight(to, x, n, whole);
      }
      store_eight(y, again, n, whole);
    });
    if (upper + 1 < WarpsM) __syncthreads();
  }
}

// --- On the host

template <int M, int N, int WarpsM, int Stages, Lies a_lies, Lies b_lies, bool Aligned>
void launch_product(Product product, cudaStream_t stream) {
  using Shape = ProductShape<M, N, WarpsM, Stages, a_lies, b_lies, Aligned>;
  const Matmul& g = product.g;
  const bool swiglu = g.activation == Activation::swiglu;
  product.tiles_m = (g.m + M - 1) / M;
  product.tiles_n = swiglu ? (g.n / 2 + Shape::kHalf - 1) / Shape::kHalf : (g.n + N - 1) / N;
  launch(matmul_kernel<M, N, WarpsM, Stages, a_lies, b_lies, Aligned>, static_cast<unsigned>(product.tiles_m * product.tiles_n),
         dim3(kProductThreads), Shape::kBytes, stream, product);
}

// What is launched: by the operands' alignment and by how many tiles there are. None of it shows in a bit.
enum class Tiles { large, medium, small };
// So many large tiles keep a GPU of 132 multiprocessors busy, two of them each; with fewer, four times as many medium ones do.
constexpr int64_t kTilesThatFill = 264;

template <Lies a_lies, Lies b_lies>
void launch_product(const Product& product, bool aligned, Tiles tiles, cudaStream_t stream) {
  if (!aligned) return launch_product<16, 64, 1, 8, a_lies, b_lies, false>(product, stream);
  constexpr bool kUsual = a_lies == Lies::along || b_lies == Lies::across;  // lies as the engine has them
  if constexpr (kUsual) {
    if (tiles == Tiles::large) return launch_product<128, 128, 2, 4, a_lies, b_lies, true>(product, stream);
    if (tiles == Tiles::medium) return launch_product<64, 64, 2, 4, a_lies, b_lies, true>(product, stream);
  }
  if constexpr (a_lies == Lies::along || !kUsual) launch_product<16, 64, 1, 8, a_lies, b_lies, true>(product, stream);
}

// `tiles`: instead of those that suit the shape; the bits are the same.
inline void matmul(const Matmul& g, cudaStream_t stream, std::optional<Tiles> tiles = {}) {
  if (g.m == 0 || g.n == 0) return;
  if (g.a_state || g.packed != nullptr) throw std::invalid_argument("matmul on a CUDA device: A is bf16, B is not packed");
  const bool a_along = g.a_col == 1, b_along = g.b_row == 1;
  if ((!a_along && g.a_row != 1) || (!b_along && g.b_col != 1))
    throw std::invalid_argument("matmul: of each pair of strides one must be 1");
  if (g.k_steps != nullptr && (a_along || b_along))
    throw std::invalid_argument("matmul: steps of k are for operands whose rows are k");
  Product product{g, 0, 0, false};
  const bool swiglu = g.activation == Activation::swiglu;
  auto rows_aligned = [](const void* p, int64_t pitch) {
    return reinterpret_cast<std::uintptr_t>(p) % 16 == 0 && pitch % kChunk == 0;
  };
  product.chunks = rows_aligned(g.c, g.c_row) && rows_aligned(g.bias, 0) && rows_aligned(g.residual, g.residual_row) &&
                   rows_aligned(g.activated, g.activated_row) && rows_aligned(g.pre, g.pre_row) &&
                   (g.activation == Activation::none || (swiglu ? g.n / 2 : g.n) % kChunk == 0);
  const bool aligned = rows_aligned(g.a, a_along ? g.a_row : g.a_col) && rows_aligned(g.b, b_along ? g.b_col : g.b_row) &&
                       (b_along || !swiglu || g.n / 2 % kChunk == 0);
  const int64_t large = (g.m + 127) / 128 * ((g.n + 127) / 128);
  const Tiles suited = a_along && g.m <= 16 ? Tiles::small : large < kTilesThatFill ? Tiles::medium : Tiles::large;
  const Tiles chosen = tiles.value_or(suited);
  if (a_along && b_along)
    launch_product<Lies::along, Lies::along>(product, aligned, chosen, stream);
  else if (a_along)
    launch_product<Lies::along, Lies::across>(product, aligned, chosen, stream);
  else if (b_along)
    launch_product<Lies::across, Lies::along>(product, aligned, chosen, stream);
  else
    launch_product<Lies::across, Lies::across>(product, aligned, chosen, stream);
}

}  // namespace tutelage::cuda
