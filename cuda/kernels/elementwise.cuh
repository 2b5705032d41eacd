// How the element-wise kernels walk: one thread takes eight neighbours (16 bytes of bf16), or one where rows are not aligned.
//
// Order    none: every element is a function of its own operands, and neither form changes a bit.
// Test     tests/simt/test_gelu.cc, test_swiglu.cc, test_rope.cc.
#pragma once

#include <cstdint>

#include "cuda/kernels/rows.cuh"

namespace tutelage::cuda {

constexpr int kElementThreads = 256;

inline dim3 element_grid(int64_t threads) {
  return dim3(static_cast<unsigned>((threads + kElementThreads - 1) / kElementThreads));
}
__device__ __forceinline__ int64_t element_thread() { return int64_t(blockIdx.x) * kElementThreads + threadIdx.x; }

template <int N>
using Floats = Pack<float, N>;

template <int N>
__device__ __forceinline__ Floats<N> load_floats(const bf16* p) {
  const Pack<bf16, N> v = ld_global(reinterpret_cast<const Pack<bf16, N>*>(p));
  Floats<N> f;
  SIMT_UNROLL
  for (int i = 0; i < N; ++i) f[i] = to_float(v[i]);
  return f;
}
template <int N>
__device__ __forceinline__ void store_floats(bf16* p, const Floats<N>& f) {
  Pack<bf16, N> v;
  SIMT_UNROLL
  for (int i = 0; i < N; ++i) v[i] = to_bf16(f[i]);
  st_global(reinterpret_cast<Pack<bf16, N>*>(p), v);
}

}  // namespace tutelage::cuda
