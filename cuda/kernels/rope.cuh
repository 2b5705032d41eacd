// Rotary position embedding and its backward, as cpp/kernels/rope.h states them.
//
// Types    x, y bf16 (y may be x); cos, sin float; positions int32.
// Order    element-wise.
// Work     4 bytes an element; the tables stay in cache.
// Test     tests/simt/test_rope.cc.
#pragma once

#include "cuda/kernels/elementwise.cuh"
#include "cuda/ptx/math.h"
#include "kernels/rope.h"

namespace tutelage::cuda {

// A thread turns N pairs: it reads both halves before it writes either, so that y may be x.
template <int N>
static __global__ void __launch_bounds__(kElementThreads) rope_kernel(const Rope g) {
  const int64_t half = g.d / 2, pairs = half / N, item = element_thread();
  const int64_t j = item % pairs * N, head = item / pairs % g.heads, t = item / (pairs * g.heads);
  if (t >= g.tokens) return;
  const int64_t position = ld_global(g.positions + t);
  const bf16* in = static_cast<const bf16*>(g.x) + t * g.x_row + head * g.d + j;
  bf16* out = static_cast<bf16*>(g.y) + t * g.y_row + head * g.d + j;
  Floats<N> x1 = load_floats<N>(in), x2 = load_floats<N>(in + half);
  const Floats<N> cosine =
      ld_global(reinterpret_cast<const Floats<N>*>(static_cast<const float*>(g.cos) + position * half + j));
  const Floats<N> sine = ld_global(reinterpret_cast<const Floats<N>*>(static_cast<const float*>(g.sin) + position * half + j));
  SIMT_UNROLL
  for (int i = 0; i < N; ++i) {
    const float s = g.backward ? 0.0f - sine[i] : sine[i];
    const float y1 = fma(x1[i], cosine[i], 0.0f - x2[i] * s), y2 = fma(x2[i], cosine[i], x1[i] * s);
    x1[i] = y1, x2[i] = y2;
  }
  store_floats<N>(out, x1);
  store_floats<N>(out + half, x2);
}

inline void rope(const Rope& g, cudaStream_t stream) {
  const int64_t half = g.d / 2, pairs = g.tokens * g.heads * half;
  // Four pairs a thread: 8 bytes of x, 16 of each table. head_dim is a multiple of 8, so half of it of 4.
  auto starts = [](const void* p, std::uintptr_t bytes) { return reinterpret_cast<std::uintptr_t>(p) % bytes == 0; };
  const bool aligned = half % 4 == 0 && g.x_row % 4 == 0 && g.y_row % 4 == 0 && starts(g.x, 8) && starts(g.y, 8) &&
                       starts(g.cos, 16) && starts(g.sin, 16);
  launch(aligned ? rope_kernel<4> : rope_kernel<1>, element_grid(aligned ? pairs / 4 : pairs), dim3(kElementThreads), 0, stream,
         g);
}

}  // namespace tutelage::cuda
