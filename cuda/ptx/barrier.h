// Named barriers: some warps of a block wait for each other. Barrier 0 is __syncthreads().
//
// PTX      barrier.sync.aligned id, threads;  barrier.arrive.aligned id, threads (PTX ISA 6.0). `threads` counts those that
//          wait and those that only arrive; a multiple of 32.
// Test     tests/simt/test_ptx.cc, test_faults.cc.
#pragma once

#include "cuda/simt/simt.h"

namespace tutelage::cuda {

__device__ __forceinline__ void barrier_sync(unsigned id, unsigned threads SIMT_AT) {
#if defined(__CUDA_ARCH__)
  asm volatile("barrier.sync.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory");
#elif !defined(__CUDACC__)
  ::simt::sync_block(id, threads, place);
#endif
}
__device__ __forceinline__ void barrier_arrive(unsigned id, unsigned threads SIMT_AT) {
#if defined(__CUDA_ARCH__)
  asm volatile("barrier.arrive.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory");
#elif !defined(__CUDACC__)
  ::simt::arrive_block(id, threads, place);
#endif
}

}  // namespace tutelage::cuda
