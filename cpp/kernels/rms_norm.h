// RMSNorm over the last axis, the residual addition fused, and its backward.
//
// Shapes   x [tokens, groups, d] with a token pitch (groups > 1: the heads of q and k), weight [d], y as x with its own pitch,
//          rstd [tokens, groups]. gather (optional) int32 [tokens]: row t reads x at token gather[t]; y and rstd are compact.
// Formula  with a residual: sum = x + residual is stored and takes x's place.  y = (x rstd) weight,
//          rstd = 1 / sqrt(mean(x^2) + eps).   Zhang & Sennrich 2019, arXiv 1910.07467.
//          backward: w = dy weight, h = x rstd:  dx += rstd (w - h mean(w h))   (dx = instead, when not accumulate);
//          dweight_j += sum over (token, group) of dy_j h_j
// Order    row sums: 16 lanes and the fixed tree.  dweight: ONE chain a column over token, then group, continued from what
//          dweight holds; parallel over columns only.
// Work     memory: 3 passes over x forward, 5 backward.
// Test     tests/cpp/test_norm.cc, tests/python/test_kernels.py.   Benchmark  bench/kernels.py (rms_norm).
#pragma once

#include <cstdint>

namespace tutelage {

struct RmsNorm {
  std::int64_t tokens = 0, groups = 1, d = 0;
  const void* x = nullptr;
  std::int64_t x_row = 0;
  const std::int32_t* gather = nullptr;
  const void* residual = nullptr;  // pitch x_row
  void* sum = nullptr;             // pitch x_row; with a residual
  const void* weight = nullptr;
  double eps = 0;
  void* y = nullptr;
  std::int64_t y_row = 0;
  void* rstd = nullptr;
};

struct RmsNormBackward {
  std::int64_t tokens = 0, groups = 1, d = 0;
  const void* x = nullptr;
  std::int64_t x_row = 0;
  const std::int32_t* gather = nullptr;
  const void *weight = nullptr, *rstd = nullptr, *dy = nullptr;
  std::int64_t dy_row = 0;
  void* dx = nullptr;  // at token gather[t]
  std::int64_t dx_row = 0;
  bool accumulate = false;  // into dx
  void* dweight = nullptr;  // always accumulated; null: not wanted
};

}  // namespace tutelage
