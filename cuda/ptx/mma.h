// D (16 x 8, float) = A (16 x 16, bf16, rows) B (16 x 8, bf16, columns) + D, by one warp.
//
// PTX      mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 (PTX ISA 7.0, sm_80), its fragments as in the ISA's figures:
//          with g = lane / 4, q = lane % 4, registers hold pairs of neighbouring columns k (low half: the even one)
//            a[0]: (g, 2q)   a[1]: (g + 8, 2q)   a[2]: (g, 2q + 8)   a[3]: (g + 8, 2q + 8)
//            b[0]: k = 2q, n = g                 b[1]: k = 2q + 8, n = g
//            d[0], d[1]: (g, 2q), (g, 2q + 1)    d[2], d[3]: (g + 8, …)
// Order    here d + (a_0 b_0 + a_1 b_1 + …) in double, rounded to float once. A GPU adds the 16 products and d in an order and
//          with a precision of its own, the same for every element and whatever the other rows and columns hold: which 16 are
//          added together shows in the bits, as it does here.
// Test     tests/simt/test_ptx.cc.
#pragma once

#include <cstdint>

#include "cuda/ptx/bf16.h"

namespace tutelage::cuda {

#if !defined(__CUDACC__)
namespace emulated {
struct Mma {
  float* d;
  const std::uint32_t *a, *b;
};
// Carried out for the whole warp by the last lane to arrive, on the registers of all: no access of that lane's own.
__attribute__((no_sanitize_thread)) inline void mma_m16n8k16(void* const* operands) {
  using Four = double __attribute__((vector_size(32)));
  struct Row {  // of eight columns
    Four half[2];
  };
  double a[16][16];
  Row b[16], d[16];
  auto wide = [](std::uint32_t pair, unsigned i) {
    return static_cast<double>(as_float(i == 0 ? pair << 16 : pair & 0xFFFF0000u));
  };
  for (unsigned lane = 0; lane < 32; ++lane) {
    const Mma& m = *static_cast<const Mma*>(operands[lane]);
    const unsigned g = lane / 4, q = lane % 4;
    for (unsigned i = 0; i < 4; ++i) {
      for (unsigned e = 0; e < 2; ++e) a[g + i % 2 * 8][2 * q + i / 2 * 8 + e] = wide(m.a[i], e);
      d[g + i / 2 * 8].half[q / 2][2 * q % 4 + i % 2] = static_cast<double>(m.d[i]);
    }
    for (unsigned i = 0; i < 2; ++i)
      for (unsigned e = 0; e < 2; ++e) b[2 * q + 8 * i + e].half[g / 4][g % 4] = wide(m.b[i], e);
  }
  for (unsigned row = 0; row < 16; ++row) {
    Four left{}, right{};
    for (unsigned k = 0; k < 16; ++k) left += a[row][k] * b[k].half[0], right += a[row][k] * b[k].half[1];
    d[row].half[0] += left, d[row].half[1] += right;
  }
  for (unsigned lane = 0; lane < 32; ++lane) {
    const Mma& m = *static_cast<const Mma*>(operands[lane]);
    for (unsigned i = 0; i < 4; ++i)
      m.d[i] = static_cast<float>(d[lane / 4 + i / 2 * 8].half[lane % 4 / 2][2 * (lane % 4) % 4 + i % 2]);
  }
}
}  // namespace emulated
#endif

__device__ __forceinline__ void mma_m16n8k16_bf16(float (&d)[4], const std::uint32_t (&a)[4],
                                                  const std::uint32_t (&b)[2] SIMT_AT) {
#if defined(__CUDA_ARCH__)
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#elif !defined(__CUDACC__)
  emulated::Mma m{d, a, b};
  ::simt::collective(emulated::mma_m16n8k16, &m, place);
#endif
}

}  // namespace tutelage::cuda
