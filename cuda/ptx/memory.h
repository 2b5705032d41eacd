// Loads and stores of 1 to 16 bytes: where other threads see the memory, kernels read and write through these, so that the
// emulator checks alignment and bounds and counts bank conflicts and sectors.
//
// PTX      ld, st (.u8 … .v4.u32), chosen by the size of T. The compiler knows the address space after inlining.
// Test     tests/simt/test_emulator.cc, test_faults.cc.
#pragma once

#include <cstdint>

#include "cuda/ptx/bf16.h"

namespace tutelage::cuda {
namespace memory {

// The unsigned type that one instruction moves.
template <std::size_t Bytes>
struct Word;
#if defined(__CUDACC__)
template <>
struct Word<16> {
  using type = uint4;
};
template <>
struct Word<8> {
  using type = uint2;
};
#else
struct alignas(16) Word16 {
  std::uint64_t half[2];
};
template <>
struct Word<16> {
  using type = Word16;
};
template <>
struct Word<8> {
  using type = std::uint64_t;
};
#endif
template <>
struct Word<4> {
  using type = std::uint32_t;
};
template <>
struct Word<2> {
  using type = std::uint16_t;
};
template <>
struct Word<1> {
  using type = std::uint8_t;
};

template <class T>
__device__ __forceinline__ T load(const T* p) {
#if defined(__CUDA_ARCH__)
  typename Word<sizeof(T)>::type w = *reinterpret_cast<const typename Word<sizeof(T)>::type*>(p);
  T r;
  __builtin_memcpy(&r, &w, sizeof r);
  return r;
#else
  return *p;
#endif
}
template <class T>
__device__ __forceinline__ void store(T* p, const T& v) {
#if defined(__CUDA_ARCH__)
  typename Word<sizeof(T)>::type w;
  __builtin_memcpy(&w, &v, sizeof w);
  *reinterpret_cast<typename Word<sizeof(T)>::type*>(p) = w;
#else
  *p = v;
#endif
}

}  // namespace memory

#if defined(__CUDA_ARCH__) || defined(__CUDACC__)
#define SIMT_ACCESS(space, kind, p, bytes)
#else
#define SIMT_ACCESS(space, kind, p, bytes) ::simt::access(::simt::Space::space, ::simt::Access::kind, p, bytes, place)
#endif

template <class T>
__device__ __forceinline__ T ld_global(const T* p SIMT_AT) {
  SIMT_ACCESS(global, load, p, sizeof(T));
  return memory::load(p);
}
template <class T>
__device__ __forceinline__ void st_global(T* p, const T& v SIMT_AT) {
  SIMT_ACCESS(global, store, p, sizeof(T));
  memory::store(p, v);
}
template <class T>
__device__ __forceinline__ T ld_shared(const T* p SIMT_AT) {
  SIMT_ACCESS(shared, load, p, sizeof(T));
  return memory::load(p);
}
template <class T>
__device__ __forceinline__ void st_shared(T* p, const T& v SIMT_AT) {
  SIMT_ACCESS(shared, store, p, sizeof(T));
  memory::store(p, v);
}

}  // namespace tutelage::cuda
