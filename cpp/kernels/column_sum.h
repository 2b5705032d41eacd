// The gradient of a bias: out_j += sum over rows of x_ij.
//
// Shapes   x [rows, d] with a row pitch, out [d].
// Order    ONE chain a column over ascending rows, continued from out; parallel over columns only.
// Work     reads x once.
// Test     tests/cpp/test_norm.cc.   Benchmark  inside bench/train.py.
#pragma once

#include <cstdint>

namespace tutelage {

struct ColumnSum {
  std::int64_t rows = 0, d = 0;
  const void* x = nullptr;
  std::int64_t x_row = 0;
  void* out = nullptr;
};

}  // namespace tutelage
