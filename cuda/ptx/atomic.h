// Additions that no other thread can come between. Only for integers: in floats the order of additions would be part of the
// result, and it is not fixed.
//
// PTX      atom.global.add.u32, .u64; red where the result is not used.
// Test     tests/simt/test_ptx.cc.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/ptx/memory.h"

namespace tutelage::cuda {

// The value before the addition.
template <class T>
__device__ __forceinline__ T atomic_add(T* p, T x SIMT_AT) {
  static_assert(std::is_integral_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
#if defined(__CUDA_ARCH__)
  return atomicAdd(p, x);
#elif !defined(__CUDACC__)
  if (reinterpret_cast<std::uintptr_t>(p) % sizeof(T) != 0) ::simt::fail(place, "misaligned atomic addition");
  return __atomic_fetch_add(p, x, __ATOMIC_RELAXED);
#else
  return x;
#endif
}

}  // namespace tutelage::cuda
