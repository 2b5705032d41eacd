// exp, log, sigmoid, the normal distribution function: the CPU's own polynomials (cpp/kernels/math.inc, gelu.inc), operation by
// operation, so that both devices give the same bits for the same float, and a draw (sample.cuh) is the same.
//
// Work     exp 15, log 20, sigmoid 18 instructions. Kernels that use them move 4 to 10 bytes an element: memory is what they
// wait for. Test     tests/simt/test_math.cc (memcmp with the CPU's scalar kernels).
#pragma once

#include <cstdint>

#include "cuda/ptx/math.h"

namespace tutelage::cuda {

// The CPU's max(x, y) and min: x > y ? x : y.
__device__ __forceinline__ float larger(float x, float y) { return x > y ? x : y; }
__device__ __forceinline__ float smaller(float x, float y) { return x < y ? x : y; }

__device__ __forceinline__ float exponential(float x_in) {
  const float lowest = -87.33654f, highest = 88.9f;
  const float x = smaller(highest, larger(lowest, x_in));
  const float big = 12582912.0f;  // 1.5 x 2^23: adding it rounds to a whole number, ties to even
  const float n = (x * 1.4426950408889634f + big) - big;
  float r = fma(n, -0.693359375f, x);
  r = fma(n, 2.12194440054690583e-4f, r);
  float p = static_cast<float>(1.0 / 5040);
  p = fma(p, r, static_cast<float>(1.0 / 720));
  p = fma(p, r, static_cast<float>(1.0 / 120));
  p = fma(p, r, static_cast<float>(1.0 / 24));
  p = fma(p, r, static_cast<float>(1.0 / 6));
  p = fma(p, r, 0.5f);
  p = fma(p, r, 1.0f);
  p = fma(p, r, 1.0f);
  const float whole = n == n ? n : 0.0f;
  const float scale = as_float(static_cast<std::uint32_t>(static_cast<std::int32_t>(whole) + 127) << 23);
  return x_in < lowest ? 0.0f : p * scale;
}

__device__ __forceinline__ float logarithm(float x) {  // of a normal x > 0
  const std::int32_t bits = static_cast<std::int32_t>(as_bits(x)) - 0x3f3504f3;
  const float e = static_cast<float>(bits >> 23);
  const float m = as_float(static_cast<std::uint32_t>((bits & 0x007fffff) + 0x3f3504f3));
  const float s = (m - 1.0f) / (m + 1.0f), s2 = s * s;
  float p = static_cast<float>(1.0 / 11);
  p = fma(p, s2, 1.0f / 9.0f);
  p = fma(p, s2, 1.0f / 7.0f);
  p = fma(p, s2, 1.0f / 5.0f);
  p = fma(p, s2, 1.0f / 3.0f);
  p = fma(p, s2, 1.0f);
  const float low = e * -2.12194440054690583e-4f, high = e * 0.693359375f;
  return x < as_float(0x7F800000u) ? high + fma(s + s, p, low) : x;
}

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + exponential(0.0f - x)); }

// cpp/kernels/gelu.inc has the derivation.
__device__ __forceinline__ float normal_cdf(float x) {
  const float g[14] = {-0.6513268598908547171f,     0.6419697923564902603f,       0.019476473204185836312f,
                       -0.0095615147868086316419f,  -0.0009465953444820368663f,   0.00036683949785276145187f,
                       0.000042523324806907771645f, -0.000020278578112534243154f, -1.6242900046470255135e-6f,
                       1.3036558355805232018e-6f,   1.5626441722066143178e-8f,    -8.5238095914926542525e-8f,
                       6.5290544390988514964e-9f,   5.0593434955514689418e-9f};
  const float z = larger(x, 0.0f - x) * 0.70710678118654752f;
  const float t = 2.0f / (2.0f + z), y = fma(2.0f, t, -1.0f), y2 = y + y;
  float b1 = 0, b2 = 0;
  SIMT_UNROLL
  for (int i = 13; i >= 1; --i) {
    const float b0 = fma(y2, b1, g[i] - b2);
    b2 = b1;
    b1 = b0;
  }
  const float series = fma(y, b1, g[0] - b2);
  const float tail = 0.5f * t * exponential(fma(0.0f - z, z, series));
  return x < 0.0f ? tail : 1.0f - tail;
}

}  // namespace tutelage::cuda
