// Arithmetic whose rounding is written down: nothing is fused or reordered behind a kernel's back (nvcc's -fmad=false, g++'s
// -ffp-contract=off).
//
// PTX      fma.rn.f32; ex2.approx.ftz.f32 (relative error 2^-22; 2^0 = 1, 2^-inf = 0 exactly; results below the smallest normal
//          number are 0); sqrt.rn.f32, div.rn.f32 by the compiler.
// Test     tests/simt/test_ptx.cc.
#pragma once

#include <cmath>

#include "cuda/ptx/bf16.h"

namespace tutelage::cuda {

__device__ __forceinline__ float fma(float x, float y, float z) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(x, y, z);
#else
  return __builtin_fmaf(x, y, z);
#endif
}

__device__ __forceinline__ float square_root(float x) {
#if defined(__CUDA_ARCH__)
  return __fsqrt_rn(x);
#else
  return __builtin_sqrtf(x);
#endif
}

__device__ __forceinline__ float exp2_approx(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return x < -126.0f ? 0.0f : std::exp2(x);
#endif
}

// The larger of two; a NaN loses against a number, as fmax has it.
__device__ __forceinline__ float maximum(float x, float y) {
#if defined(__CUDA_ARCH__)
  return fmaxf(x, y);
#else
  return __builtin_fmaxf(x, y);
#endif
}

}  // namespace tutelage::cuda
