// The dialect of cuda/kernels/: CUDA C++ in which everything that only nvcc understands has another name, so that g++ runs the
// same source on the emulator.
//
//   instead of                        write
//   kernel<<<g, b, bytes, s>>>(a…)    launch(kernel, g, b, bytes, s, a…)
//   extern __shared__ T x[]           T* x = dyn_smem<T>()
//   asm(...), intrinsics              a function of cuda/ptx/
//   x = *pointer (to memory others see)   x = ld_global(pointer), ld_shared(pointer), st_… (cuda/ptx/memory.h)
//
// threadIdx, blockIdx, blockDim, gridDim, __global__, __device__, __launch_bounds__ and __syncthreads() are CUDA's own. A block
// is a whole number of warps. No static __shared__. A kernel that is no template is declared `static __global__ void`.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#if defined(__CUDACC__)

#include <cuda_runtime.h>

#define SIMT_AT  // the caller's place, which only the emulator asks for
#define SIMT_AT_ONLY
#define SIMT_UNROLL _Pragma("unroll")

namespace tutelage::cuda {

struct LaunchError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw LaunchError(std::string(what) + ": " + cudaGetErrorString(error));
}

// Enqueues kernel(arguments...) on `stream`. Throws LaunchError where the launch is refused; what goes wrong later, on the
// device, is told by the next call that waits for it. The kernel's limit of shared memory is raised where it is needed.
template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, std::size_t shared_bytes, cudaStream_t stream, A... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  if (shared_bytes > 48 * 1024)
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shared_bytes)),
          "cudaFuncSetAttribute");
  kernel<<<grid, block, shared_bytes, stream>>>(static_cast<P>(arguments)...);
  check(cudaGetLastError(), "a kernel could not be launched");
}

// The block's dynamic shared memory, aligned to 128 bytes.
template <class T>
__device__ __forceinline__ T* dyn_smem() {
  extern __shared__ __align__(128) unsigned char simt_shared_bytes[];
  return reinterpret_cast<T*>(simt_shared_bytes);
}

}  // namespace tutelage::cuda

#else  // the emulator

#include <tuple>
#include <utility>

#include "cuda/simt/emulator.h"

#define __global__ __attribute__((unused))
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define SIMT_AT , ::simt::Place place = ::simt::Place::current()
#define SIMT_AT_ONLY ::simt::Place place = ::simt::Place::current()
#define SIMT_UNROLL
#define threadIdx (::simt::thread_index())
#define blockIdx (::simt::block_index())
#define blockDim (::simt::block_size())
#define gridDim (::simt::grid_size())

inline void __syncthreads(SIMT_AT_ONLY) { ::simt::sync_block(0, 0, place); }
inline void __syncwarp(SIMT_AT_ONLY) { ::simt::sync_warp(place); }

namespace tutelage::cuda {

struct LaunchPlace {  // made from the grid's dim3 at the call
  dim3 grid;
  ::simt::Place place;
  LaunchPlace(dim3 grid_, ::simt::Place place_ = ::simt::Place::current()) : grid(grid_), place(place_) {}
  LaunchPlace(unsigned x, ::simt::Place place_ = ::simt::Place::current()) : grid(x), place(place_) {}
};

// Runs the kernel to its end, now. A grid without blocks does nothing.
template <class... P, class... A>
void launch(void (*kernel)(P...), LaunchPlace grid, dim3 block, std::size_t shared_bytes, cudaStream_t, A... arguments) {
  auto call = [&] { kernel(static_cast<P>(arguments)...); };
  ::simt::run_launch(
      grid.grid, block, shared_bytes, [](void* c) { (*static_cast<decltype(call)*>(c))(); }, &call,
      reinterpret_cast<const void*>(kernel), grid.place);
}

template <class T>
T* dyn_smem() {
  return reinterpret_cast<T*>(::simt::shared_memory());
}

}  // namespace tutelage::cuda

#endif
