// bf16, a plain two bytes: the upper half of a float. Arithmetic is done in float.
//
// PTX      cvt.rn.bf16.f32, cvt.rn.bf16x2.f32 (PTX ISA 7.0, sm_80): round to nearest, ties to even; NaN becomes 0x7FFF.
// Test     tests/simt/test_ptx.cc (every float exponent against rounding by long division).
#pragma once

#include <cstdint>

#include "cuda/simt/simt.h"

namespace tutelage::cuda {

struct bf16 {
  std::uint16_t bits;
};

// N elements that one instruction loads or stores.
template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  T v[N];
  __device__ __forceinline__ T& operator[](int i) { return v[i]; }
  __device__ __forceinline__ const T& operator[](int i) const { return v[i]; }
};
using bf16x2 = Pack<bf16, 2>;

__device__ __forceinline__ float as_float(std::uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
#endif
}
__device__ __forceinline__ std::uint32_t as_bits(float x) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(x);
#else
  std::uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
#endif
}

__device__ __forceinline__ float to_float(bf16 x) { return as_float(std::uint32_t(x.bits) << 16); }

__device__ __forceinline__ bf16 to_bf16(float x) {
#if defined(__CUDA_ARCH__)
  bf16 r;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r.bits) : "f"(x));
  return r;
#else
  const std::uint32_t bits = as_bits(x);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return {0x7FFF};
  return {static_cast<std::uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1)) >> 16)};
#endif
}

// Two floats in one register, `low` in its lower half, as an mma operand and memory have them.
__device__ __forceinline__ std::uint32_t pack_bf16x2(float low, float high) {
#if defined(__CUDA_ARCH__)
  std::uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
#else
  return to_bf16(low).bits | std::uint32_t(to_bf16(high).bits) << 16;
#endif
}

__device__ __forceinline__ float low_of(std::uint32_t pair) { return as_float(pair << 16); }
__device__ __forceinline__ float high_of(std::uint32_t pair) { return as_float(pair & 0xFFFF0000u); }

}  // namespace tutelage::cuda
