// C = A B with what follows it fused, as cpp/kernels/matmul.h states it, on tensor cores.
//
// Types    A, B, bias, residual, pre, activated bf16; C bf16, or float (c_state). a_state: scalar_head.cuh's affair.
// Order    of every element one chain of m16n8k16 over ascending k in float, from 0 or from what C holds; never split. So a row
//          has the same bits in both tile shapes, wherever it lies, whatever the other rows are. A step's 16 products are added
//          by the tensor core at once, in an order of its own: where k are tokens, `k_steps` says which tokens are a step, and
//          no step spans two sequences. An element-wise function sees the sum as C keeps it, rounded to bf16.
// Tiles    128 x 128 of C in 4 warps of 64 x 64 (training, prefill), or 16 x 64 in 4 warps of 16 x 16 (decode: m <= 16), 32 deep,
//          by cp.async in 4 and 8 stages. A warp's columns are two stretches, half a tile apart: so gate and up of SwiGLU meet in
//          one thread. Blocks walk over C in groups of 8 rows of tiles, so that what they read together stays in L2.
// Shared   64 bytes of k or 32 rows of k, in chunks of 8, each at chunk ^ (row's place among the rows of 128 bytes): the eight
//          addresses of an ldmatrix lie in different banks.
// Work     2 m n k flops; reads A n/128 times and B m/128 times (from L2, mostly), C once.
// Rows that are not aligned to 16 bytes are copied element by element: slower, the same bits.
// Test     tests/simt/test_matmul.cc.   Benchmark  bench/gpu.py (matmul).
#pragma once

#include <cstdint>
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
  static __device__ __forceinline__ int at(int row, int chunk) {
    return row * kRowElements + (chunk ^ (row / (8 / kPlaces) & (kPlaces - 1))) * kChunk;
  }
};

// What a block knows of one operand: rows [0, half) of the tile are rows [first, first_end) of it, those behind are
// [second, second_end). Where there is none, zeros.
struct Operand {
  const bf16* p;
  int64_t pitch;  // between rows (along) or between k (across)
  int half;
  int64_t first, first_end, second, second_end;
  __device__ __forceinline__ int64_t row(int of_tile) const { return of_tile < half ? first + of_tile : second + of_tile - half; }
  __device__ __forceinline__ int64_t end(int of_tile) const { return of_tile < half ? first_end : second_end; }
};

// Which k a stage holds: k0 + i; or, with steps, the i % 16-th of step (k0 + i) / 16, as long as the step is.
struct Depth {
  int64_t k;
  const int32_t* steps;
  __device__ __forceinline__ int64_t stages() const { return (k + kProductDepth - 1) / kProductDepth; }
};

template <int Rows, Lies lies, bool Aligned>
__device__ __forceinline__ void fetch_stage(bf16* to, const Operand& x, const Depth& depth, int64_t k0) {
  using S = Stage<Rows, lies>;
  constexpr int kAll = S::kStageRows * S::kChunks, kRounds = (kAll + kProductThreads - 1) / kProductThreads;
  SIMT_UNROLL
  for (int round = 0; round < kRounds; ++round) {
    const int i = round * kProductThreads + static_cast<int>(threadIdx.x);
    if (kAll % kProductThreads != 0 && i >= kAll) break;
    const int row = i / S::kChunks, chunk = i % S::kChunks;
    const bf16* from;
    int64_t left;  // elements of the chunk that are there, or more
    if constexpr (lies == Lies::along) {
      const int64_t own = x.row(row), at = k0 + chunk * kChunk;
      left = own < x.end(row) ? depth.k - at : 0;
      from = x.p + own * x.pitch + at;
    } else {
      const int64_t own = x.row(chunk * kChunk);
      int64_t at = k0 + row;
      bool there = at < depth.k;
      if (depth.steps != nullptr && there) {
        const Pack<int32_t, 2> step = ld_global(reinterpret_cast<const Pack<int32_t, 2>*>(depth.steps) + at / kStepK);
        there = row % kStepK < step[1];
        at = int64_t(step[0]) + row % kStepK;
      }
      left = there ? x.end(chunk * kChunk) - own : 0;
      from = x.p + at * x.pitch + own;
    }
    const int count = left <= 0 ? 0 : left < kChunk ? static_cast<int>(left) : kChunk;
    bf16* place = to + S::at(row, chunk);
    if constexpr (Aligned) {
      cp_async_16(place, count > 0 ? from : x.p, static_cast<unsigned>(count) * 2);
    } else {
      st_shared(reinterpret_cast<Chunk*>(place), load_chunk<false>(from, count));
    }
  }
}

// 16 rows of A, 16 of k from kk.
template <int Rows, Lies lies>
__device__ __forceinline__ void load_a(std::uint32_t (&f)[4], const bf16* stage, int row, int kk) {
  using S = Stage<Rows, lies>;
  const int lane = static_cast<int>(lane_id());
  if constexpr (lies == Lies::along)
    ldmatrix_x4(f, stage + S::at(row + lane % 16, kk / kChunk + lane / 16));
  else
    ldmatrix_x4_trans(f, stage + S::at(kk + lane / 16 * 8 + lane % 8, row / kChunk + lane / 8 % 2));
}
// Twice 8 columns of B, from `left` and from `right`; 16 of k.
template <int Columns, Lies lies>
__device__ __forceinline__ void load_b(std::uint32_t (&f)[4], const bf16* stage, int left, int right, int kk) {
  using S = Stage<Columns, lies>;
  const int lane = static_cast<int>(lane_id()), column = lane < 16 ? left : right;
  if constexpr (lies == Lies::along)
    ldmatrix_x4(f, stage + S::at(column + lane % 8, kk / kChunk + lane / 8 % 2));
  else
    ldmatrix_x4_trans(f, stage + S::at(kk + lane % 16, column / kChunk));
}

// Two neighbours of a row; `both`: the second is there, `pairs`: and one access may move both.
template <class T>
__device__ __forceinline__ Pack<float, 2> load_pair(const T* p, bool both, bool pairs) {
  Pack<T, 2> v;
  if (pairs) {
    v = ld_global(reinterpret_cast<const Pack<T, 2>*>(p));
  } else {
    v[0] = ld_global(p);
    v[1] = both ? ld_global(p + 1) : T{};
  }
  if constexpr (sizeof(T) == 2)
    return {{to_float(v[0]), to_float(v[1])}};
  else
    return {{v[0], v[1]}};
}
__device__ __forceinline__ void store_pair(bf16* p, const Pack<float, 2>& v, bool both, bool pairs) {
  if (pairs) {
    const std::uint32_t packed = pack_bf16x2(v[0], v[1]);
    st_global(reinterpret_cast<std::uint32_t*>(p), packed);
  } else {
    st_global(p, to_bf16(v[0]));
    if (both) st_global(p + 1, to_bf16(v[1]));
  }
}
__device__ __forceinline__ void store_pair(float* p, const Pack<float, 2>& v, bool both, bool pairs) {
  if (pairs) {
    st_global(reinterpret_cast<Pack<float, 2>*>(p), v);
  } else {
    st_global(p, v[0]);
    if (both) st_global(p + 1, v[1]);
  }
}
__device__ __forceinline__ float rounded(float x) { return to_float(to_bf16(x)); }

struct Product {
  Matmul g;
  Depth depth;
  int64_t tiles_m, tiles_n;  // of C
  bool pairs;                // neighbours may be moved together
};

template <int M, int N, int WarpsM, int Stages, Lies a_lies, Lies b_lies, bool Aligned>
struct ProductShape {
  static constexpr int kWarpsN = 4 / WarpsM, kWarpM = M / WarpsM, kWarpN = N / kWarpsN;
  static constexpr int kSteps = kWarpM / 16, kColumns = kWarpN / 8, kHalf = N / 2;
  static constexpr int kBytes = Stages * (M + N) * kProductDepth * 2;
  static_assert(kWarpM % 16 == 0 && kWarpN % 16 == 0);
  // The tile's column at which the j-th 8 of warp column w begin.
  static __device__ __forceinline__ int column(int w, int j) {
    return j < kColumns / 2 ? w * (kWarpN / 2) + j * 8 : kHalf + w * (kWarpN / 2) + (j - kColumns / 2) * 8;
  }
};

template <int M, int N, int WarpsM, int Stages, Lies a_lies, Lies b_lies, bool Aligned>
static __global__ void __launch_bounds__(kProductThreads) matmul_kernel(const Product product) {
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
  const Operand b{static_cast<const bf16*>(g.b), b_lies == Lies::along ? g.b_col : g.b_row, swiglu ? Shape::kHalf : N, first, f,
                  f + first, g.n};

  bf16* const stage_a = dyn_smem<bf16>();
  bf16* const stage_b = stage_a + Stages * SA::kElements;
  const int64_t stages = product.depth.stages();
  auto fetch = [&](int64_t s) {
    if (s < stages) {
      const int place = static_cast<int>(s % Stages);
      fetch_stage<M, a_lies, Aligned>(stage_a + place * SA::kElements, a, product.depth, s * kProductDepth);
      fetch_stage<N, b_lies, Aligned>(stage_b + place * SB::kElements, b, product.depth, s * kProductDepth);
    }
    cp_async_commit();
  };
  for (int s = 0; s < Stages - 1; ++s) fetch(s);

  // This thread's rows and columns: row(i, h) and the one beside column(j).
  auto row_of = [&](int i, int h) { return tile_m * M + warp_m * Shape::kWarpM + i * 16 + lane / 4 + h * 8; };
  auto column_of = [&](int j) { return b.row(Shape::column(warp_n, j) + lane % 4 * 2); };
  auto end_of = [&](int j) { return b.end(Shape::column(warp_n, j)); };

  float c[kSteps][kColumns][4];
  SIMT_UNROLL
  for (int i = 0; i < kSteps; ++i) SIMT_UNROLL
  for (int j = 0; j < kColumns; ++j) c[i][j][0] = c[i][j][1] = c[i][j][2] = c[i][j][3] = 0;
  if (g.accumulate) {
    SIMT_UNROLL
    for (int i = 0; i < kSteps; ++i) SIMT_UNROLL
    for (int h = 0; h < 2; ++h) SIMT_UNROLL
    for (int j = 0; j < kColumns; ++j) {
      const int64_t row = row_of(i, h), column = column_of(j), end = end_of(j);
      if (row >= g.m || column >= end) continue;
      const int64_t at = row * g.c_row + column;
      const Pack<float, 2> start = g.c_state ? load_pair(static_cast<const float*>(g.c) + at, column + 1 < end, product.pairs)
                                             : load_pair(static_cast<const bf16*>(g.c) + at, column + 1 < end, product.pairs);
      c[i][j][2 * h] = start[0], c[i][j][2 * h + 1] = start[1];
    }
  }

  for (int64_t s = 0; s < stages; ++s) {
    cp_async_wait_group<Stages - 2>();
    __syncthreads();  // the stage is there for all, and all have read the one that is fetched into now
    fetch(s + Stages - 1);
    const int place = static_cast<int>(s % Stages);
    const bf16 *own_a = stage_a + place * SA::kElements, *own_b = stage_b + place * SB::kElements;
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

  const bool backward = g.activation >= Activation::gelu_backward;
  const float scale = static_cast<float>(g.scale);
  const auto *bias = static_cast<const bf16*>(g.bias), *residual = static_cast<const bf16*>(g.residual);
  const auto* pre = static_cast<const bf16*>(g.pre);
  auto* activated = static_cast<bf16*>(g.activated);
  SIMT_UNROLL
  for (int i = 0; i < kSteps; ++i) SIMT_UNROLL
  for (int h = 0; h < 2; ++h) {
    const int64_t row = row_of(i, h);
    if (row >= g.m) continue;
    SIMT_UNROLL
    for (int j = 0; j < kColumns; ++j) {
      const int64_t column = column_of(j), end = end_of(j);
      if (column >= end) continue;
      const bool both = column + 1 < end, pairs = product.pairs;
      Pack<float, 2> x{{c[i][j][2 * h], c[i][j][2 * h + 1]}};
      if (g.scale != 1) x[0] = x[0] * scale, x[1] = x[1] * scale;
      if (bias != nullptr) {
        const Pack<float, 2> v = load_pair(bias + column, both, pairs);
        x[0] = x[0] + v[0], x[1] = x[1] + v[1];
      }
      if (residual != nullptr) {
        const Pack<float, 2> v = load_pair(residual + row * g.residual_row + column, both, pairs);
        x[0] = x[0] + v[0], x[1] = x[1] + v[1];
      }
      if (g.c_state) {
        store_pair(static_cast<float*>(g.c) + row * g.c_row + column, x, both, pairs);
        continue;
      }
      bf16* const to = static_cast<bf16*>(g.c) + row * g.c_row + column;
      if (!backward) {
        store_pair(to, x, both, pairs);
        x[0] = rounded(x[0]), x[1] = rounded(x[1]);
        c[i][j][2 * h] = x[0], c[i][j][2 * h + 1] = x[1];
        bf16* const y = activated + row * g.activated_row + column;
        if (g.activation == Activation::gelu)
          store_pair(y, {{gelu_value<false>(x[0]), gelu_value<false>(x[1])}}, both, pairs);
        else if (g.activation == Activation::gelu_erf)
          store_pair(y, {{gelu_value<true>(x[0]), gelu_value<true>(x[1])}}, both, pairs);
        else if (swiglu && j >= kColumns / 2) {  // this thread has seen the gate before
          const float* gate = &c[i][j - kColumns / 2][2 * h];
          store_pair(y - f, {{swiglu_value(gate[0], x[0]), swiglu_value(gate[1], x[1])}}, both, pairs);
        }
        continue;
      }
      x[0] = rounded(x[0]), x[1] = rounded(x[1]);  // as the kernels that are not fused are given it
      const bf16* const kept = pre + row * g.pre_row + column;
      bf16* const y = activated + row * g.activated_row + column;
      const Pack<float, 2> own = load_pair(kept, both, pairs);
      if (g.activation == Activation::swiglu_backward) {
        const Pack<float, 2> up = load_pair(kept + g.n, both, pairs);
        Pack<float, 2> d_gate, d_up, again;
        SIMT_UNROLL
        for (int e = 0; e < 2; ++e) {
          const float s = sigmoid(own[e]), silu = own[e] * s;
          d_gate[e] = x[e] * up[e] * fma(silu, 1.0f - s, s);
          d_up[e] = x[e] * silu;
          again[e] = swiglu_value(own[e], up[e]);
        }
        store_pair(to, d_gate, both, pairs);
        store_pair(to + g.n, d_up, both, pairs);
        store_pair(y, again, both, pairs);
      } else if (g.activation == Activation::gelu_backward) {
        store_pair(y, {{gelu_value<false>(own[0]), gelu_value<false>(own[1])}}, both, pairs);
        store_pair(to, {{x[0] * gelu_slope<false>(own[0]), x[1] * gelu_slope<false>(own[1])}}, both, pairs);
      } else {
        store_pair(y, {{gelu_value<true>(own[0]), gelu_value<true>(own[1])}}, both, pairs);
        store_pair(to, {{x[0] * gelu_slope<true>(own[0]), x[1] * gelu_slope<true>(own[1])}}, both, pairs);
      }
    }
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

template <Lies a_lies, Lies b_lies>
void launch_product(const Product& product, bool aligned, bool few, cudaStream_t stream) {
  if (!aligned) return launch_product<128, 128, 2, 4, a_lies, b_lies, false>(product, stream);
  if constexpr (a_lies == Lies::along)
    if (few) return launch_product<16, 64, 1, 8, a_lies, b_lies, true>(product, stream);
  launch_product<128, 128, 2, 4, a_lies, b_lies, true>(product, stream);
}

// `tall`: the large tiles even where the small ones are meant for it; the bits are the same.
inline void matmul(const Matmul& g, cudaStream_t stream, bool tall = false) {
  if (g.m == 0 || g.n == 0) return;
  if (g.a_state || g.packed != nullptr) throw std::invalid_argument("matmul on a CUDA device: A is bf16, B is not packed");
  const bool a_along = g.a_col == 1, b_along = g.b_row == 1;
  if ((!a_along && g.a_row != 1) || (!b_along && g.b_col != 1))
    throw std::invalid_argument("matmul: of each pair of strides one must be 1");
  if (g.k_steps != nullptr && (a_along || b_along))
    throw std::invalid_argument("matmul: steps of k are for operands whose rows are k");
  Product product{g, {g.k_steps != nullptr ? g.k_step_count * kStepK : g.k, g.k_steps}, 0, 0, false};
  const bool swiglu = g.activation == Activation::swiglu;
  auto even = [](const void* p, int64_t pitch, std::uintptr_t bytes) {
    return p == nullptr || (reinterpret_cast<std::uintptr_t>(p) % bytes == 0 && pitch % 2 == 0);
  };
  product.pairs = (swiglu ? g.n / 2 : g.n) % 2 == 0 && even(g.c, g.c_row, g.c_state ? 8 : 4) && even(g.bias, 0, 4) &&
                  even(g.residual, g.residual_row, 4) && even(g.activated, g.activated_row, 4) && even(g.pre, g.pre_row, 4);
  auto rows_aligned = [](const void* p, int64_t pitch) {
    return reinterpret_cast<std::uintptr_t>(p) % 16 == 0 && pitch % kChunk == 0;
  };
  const bool aligned = rows_aligned(g.a, a_along ? g.a_row : g.a_col) && rows_aligned(g.b, b_along ? g.b_col : g.b_row) &&
                       (b_along || !swiglu || g.n / 2 % kChunk == 0);
  const bool few = g.m <= 16 && !tall;
  if (a_along && b_along)
    launch_product<Lies::along, Lies::along>(product, aligned, few, stream);
  else if (a_along)
    launch_product<Lies::along, Lies::across>(product, aligned, few, stream);
  else if (b_along)
    launch_product<Lies::across, Lies::along>(product, aligned, few, stream);
  else
    launch_product<Lies::across, Lies::across>(product, aligned, few, stream);
}

}  // namespace tutelage::cuda
