// A weight matrix in the order in which a product of few rows reads it: for generation, which multiplies by every weight for
// every token.
//
// Shapes   b as in matmul: element (p, j) of [k, n] at b[p * b_row + j * b_col]. out: panel v [k][16] at out + v * k * 16, for
//          columns 16 v ... 16 v + 15, zeros past n; with gate_up (SwiGLU: n = 2f) panels of the two halves in turn.
//          packed_weight_elements() in all, of the level's element type or, with half, of bfloat16: the upper half of each
//          float. Exact where b was rounded to bfloat16 before, which is the caller's part.
// Work     reads b and writes out once.
// Test     tests/cpp/test_matmul.cc (a product from packed panels has the bits of one from the plain matrix).
#pragma once

#include <cstdint>

namespace tutelage {

struct PackWeight {
  std::int64_t n = 0, k = 0;
  const void* b = nullptr;
  std::int64_t b_row = 1, b_col = 0;
  bool gate_up = false, half = false;
  void* out = nullptr;
};

constexpr std::int64_t packed_weight_elements(std::int64_t n, std::int64_t k, bool gate_up) {
  return (gate_up ? 2 * ((n / 2 + 15) / 16) : (n + 15) / 16) * 16 * k;
}

}  // namespace tutelage
