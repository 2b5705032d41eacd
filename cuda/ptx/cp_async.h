// Copies from global to shared memory that go on while the thread does something else.
//
// PTX      cp.async.cg.shared.global 16 bytes (past L1), .commit_group, .wait_group N (PTX ISA 7.0, sm_80). `bytes` < 16: only
// so
//          many are read, the rest becomes zeros; with 0 nothing is read, whatever the address.
// Rules    the bytes are there for this thread after a wait that covers their group, for others after a barrier besides.
// Here     they land at the wait; until then the place holds NaN, so that neither a missing wait nor a stage that is
//          overwritten while somebody still reads it goes unseen.
// Test     tests/simt/test_ptx.cc, test_faults.cc.
#pragma once

#include <cstdint>

#include "cuda/ptx/ldmatrix.h"

namespace tutelage::cuda {

__device__ __forceinline__ void cp_async_16(void* shared, const void* global, unsigned bytes = 16 SIMT_AT) {
#if defined(__CUDA_ARCH__)
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
               : "memory");
#elif !defined(__CUDACC__)
  using Word = Pack<std::uint32_t, 4>;
  if (bytes > 16) ::simt::fail(place, "cp.async of %u bytes: at most 16", bytes);
  st_shared(static_cast<Word*>(shared), Word{{~0u, ~0u, ~0u, ~0u}}, place);
  if (bytes > 0) {
    SIMT_ACCESS(global, load, global, 16);
    // AddressSanitizer's report is of this line, not of the wait's
    for (unsigned i = 0; i < bytes; i += bytes - 1 > 0 ? bytes - 1 : 1)
      (void)*(static_cast<const volatile unsigned char*>(global) + i);
  }
  ::simt::async_copy({shared, global, bytes, 16 - bytes}, place);
#endif
}

__device__ __forceinline__ void cp_async_commit() {
#if defined(__CUDA_ARCH__)
  asm volatile("cp.async.commit_group;" ::: "memory");
#elif !defined(__CUDACC__)
  ::simt::async_commit();
#endif
}

// Waits until all but the last N committed groups have landed.
template <int N>
__device__ __forceinline__ void cp_async_wait_group() {
#if defined(__CUDA_ARCH__)
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#elif !defined(__CUDACC__)
  for (const ::simt::PendingCopy& copy : ::simt::async_landed(N)) {
    auto* to = static_cast<unsigned char*>(copy.to);
    const auto* from = static_cast<const unsigned char*>(copy.from);
    if (copy.bytes == 16)
      *static_cast<Pack<std::uint32_t, 4>*>(copy.to) = *static_cast<const Pack<std::uint32_t, 4>*>(copy.from);
    else
      for (unsigned i = 0; i < copy.bytes + copy.zeros; ++i) to[i] = i < copy.bytes ? from[i] : static_cast<unsigned char>(0);
  }
#endif
}

}  // namespace tutelage::cuda
