// 8 x 8 matrices of bf16 from shared memory into mma fragments.
//
// PTX      ldmatrix.sync.aligned.m8n8.x2 / .x4 (.trans) .shared.b16 (PTX ISA 6.5, sm_75). Lane 8 i + j gives the address of row
// j
//          of matrix i (16 bytes, aligned); r[i] of lane l receives elements (l / 4, 2 (l % 4)) and its right neighbour of
//          matrix i; with .trans of its transpose. For x2 the addresses of lanes 16 … 31 are not used.
// Test     tests/simt/test_ptx.cc.
#pragma once

#include <cstdint>

#include "cuda/ptx/memory.h"

namespace tutelage::cuda {

#if defined(__CUDACC__)
__device__ __forceinline__ std::uint32_t shared_address(const void* p) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(p));
}
#else
namespace emulated {
struct LdMatrix {
  std::uint32_t* r;
  std::uint16_t row[8];
};
template <unsigned Matrices, bool Transposed>
__attribute__((no_sanitize_thread)) inline void ldmatrix(void* const* operands) {
  for (unsigned lane = 0; lane < 32; ++lane)
    for (unsigned i = 0; i < Matrices; ++i) {
      std::uint32_t pair[2];
      for (unsigned h = 0; h < 2; ++h) {
        const unsigned x = lane / 4, y = 2 * (lane % 4) + h, row = Transposed ? y : x, column = Transposed ? x : y;
        pair[h] = static_cast<const LdMatrix*>(operands[8 * i + row])->row[column];
      }
      static_cast<const LdMatrix*>(operands[lane])->r[i] = pair[0] | pair[1] << 16;
    }
}
template <unsigned Matrices, bool Transposed>
void load_matrices(std::uint32_t* r, const void* row, ::simt::Place place) {
  LdMatrix m{r, {}};
  if (::simt::lane_index() < 8 * Matrices) {
    using Row = Pack<std::uint16_t, 8>;
    const Row own = ld_shared(static_cast<const Row*>(row), place);
    for (int i = 0; i < 8; ++i) m.row[i] = own[i];
  }
  ::simt::collective(ldmatrix<Matrices, Transposed>, &m, place);
}
}  // namespace emulated
#endif

__device__ __forceinline__ void ldmatrix_x4(std::uint32_t (&r)[4], const void* row SIMT_AT) {
#if defined(__CUDA_ARCH__)
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
#elif !defined(__CUDACC__)
  emulated::load_matrices<4, false>(r, row, place);
#endif
}
__device__ __forceinline__ void ldmatrix_x4_trans(std::uint32_t (&r)[4], const void* row SIMT_AT) {
#if defined(__CUDA_ARCH__)
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
#elif !defined(__CUDACC__)
  emulated::load_matrices<4, true>(r, row, place);
#endif
}
__device__ __forceinline__ void ldmatrix_x2(std::uint32_t (&r)[2], const void* row SIMT_AT) {
#if defined(__CUDA_ARCH__)
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
#elif !defined(__CUDACC__)
  emulated::load_matrices<2, false>(r, row, place);
#endif
}
__device__ __forceinline__ void ldmatrix_x2_trans(std::uint32_t (&r)[2], const void* row SIMT_AT) {
#if defined(__CUDA_ARCH__)
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
#elif !defined(__CUDACC__)
  emulated::load_matrices<2, true>(r, row, place);
#endif
}

}  // namespace tutelage::cuda
