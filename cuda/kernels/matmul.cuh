// C = A B with what follows it fused, as cpp/kernels/matmul.h states it, on tensor cores.
//
// Types    A, B, bias, residual, pre, activated bf16; C bf16, or float (c_state). a_state: scalar_head.cuh's affair.
// Order    product_tiles.cuh's: one chain over k from 0 or from what C holds. So a row has the same bits in all tile shapes,
//          wherever it lies, whatever the other rows are. An element-wise function sees the sum as C keeps it, rounded to bf16.
// Tiles    128 x 128 of C in 4 warps of 64 x 64 (training, prefill), 64 x 64 where those are too few to fill a GPU, or 16 x 64
// in
//          4 warps of 16 x 16 (decode: m <= 16).
// Work     2 m n k flops; reads A n/128 times and B m/128 times (from L2, mostly), C once.
// Test     tests/simt/test_matmul.cc.   Benchmark  bench/gpu.py (matmul).
#pragma once

#include <cstdint>
#include <optional>
#include <stdexcept>

#include "cuda/kernels/gelu.cuh"
#include "cuda/kernels/product_tiles.cuh"
#include "cuda/kernels/swiglu.cuh"
#include "kernels/matmul.h"

namespace tutelage::cuda {

__device__ __forceinline__ float rounded(float x) { return to_float(to_bf16(x)); }

struct Product {
  Matmul g;
  int64_t tiles_m, tiles_n;  // of C
  bool chunks;               // eight neighbours of C and of what goes with it may be moved together
};

template <int M, int N, int WarpsM, int Stages, Lies a_lies, Lies b_lies, bool Aligned>
static __global__ void __launch_bounds__(kProductThreads, ProductShape<M, N, WarpsM, Stages, a_lies, b_lies, Aligned>::kBlocks)
    matmul_kernel(const Product product) {
  using Shape = ProductShape<M, N, WarpsM, Stages, a_lies, b_lies, Aligned>;
  const Matmul& g = product.g;
  const TilePlace place(product.tiles_m, product.tiles_n);
  const bool swiglu = g.activation == Activation::swiglu;
  const int64_t f = swiglu ? g.n / 2 : g.n;  // columns of each half
  const int64_t first = place.n * (swiglu ? Shape::kHalf : N);
  const Operand a{static_cast<const bf16*>(g.a), a_lies == Lies::along ? g.a_row : g.a_col, M, place.m * M, g.m, 0, 0};
  const Operand b{static_cast<const bf16*>(g.b),
                  b_lies == Lies::along ? g.b_col : g.b_row,
                  swiglu ? Shape::kHalf : N,
                  first,
                  f,
                  f + first,
                  g.n};
  const ProductTile<Shape> tile(a, b);

  typename ProductTile<Shape>::Sums c;
  SIMT_UNROLL
  for (int i = 0; i < Shape::kSteps; ++i) SIMT_UNROLL
  for (int j = 0; j < Shape::kColumns; ++j) c[i][j][0] = c[i][j][1] = c[i][j][2] = c[i][j][3] = 0;
  if (g.accumulate) {
    for (int upper = 0; upper < WarpsM; ++upper) {
      tile.each_chunk(upper, N, [&](int64_t row, int64_t column, int n, float* sums) {
        const int64_t at = row * g.c_row + column;
        const bool whole = product.chunks && n == kChunk;
        tile.store_sums(sums, g.c_state ? load_eight(static_cast<const float*>(g.c) + at, n, whole)
                                        : load_eight(static_cast<const bf16*>(g.c) + at, n, whole));
      });
      __syncthreads();
      tile.take(c, upper);
      __syncthreads();
    }
  }
  tile.multiply(c, g.k_steps, static_cast<int>(g.k_steps == nullptr ? g.k : g.k_step_count * kStepK));

  const bool backward = g.activation >= Activation::gelu_backward;
  const float scale = static_cast<float>(g.scale);
  const auto *bias = static_cast<const bf16*>(g.bias), *residual = static_cast<const bf16*>(g.residual);
  const auto* pre = static_cast<const bf16*>(g.pre);
  auto* activated = static_cast<bf16*>(g.activated);
  for (int upper = 0; upper < WarpsM; ++upper) {
    tile.put(c, upper);
    __syncthreads();
    tile.each_chunk(upper, swiglu ? Shape::kHalf : N, [&](int64_t row, int64_t column, int n, float* sums) {
      const bool whole = product.chunks && n == kChunk;
      auto finished = [&](const float* from, int64_t at) {
        Eight x = tile.load_sums(from);
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
      Eight x = finished(sums, column);
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
        const Eight up = finished(sums + Shape::kHalf, f + column);
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
