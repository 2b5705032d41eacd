// LayerNorm over the last axis, the residual addition fused, and its backward.
//
// Shapes   x, y [tokens, d] with token pitches, weight, bias [d], mean, rstd [tokens]; gather as in rms_norm.h.
// Formula  with a residual: sum = x + residual is stored and takes x's place.  y = h weight + bias, h = (x - mean) rstd,
//          rstd = 1 / sqrt(mean((x - mean)^2) + eps).   Ba, Kiros & Hinton 2016, arXiv 1607.06450.
//          backward: w = dy weight:  dx += rstd (w - mean(w) - h mean(w h))   (dx = instead, when not accumulate);
//          dweight_j += sum over tokens of dy_j h_j,  dbias_j += sum over tokens of dy_j
// Order    row sums: 16 lanes and the fixed tree.  dweight, dbias: ONE chain a column over tokens, continued from what they
//          hold; parallel over columns only.
// Work     memory: 4 passes over x forward, 5 backward.
// Test     tests/cpp/test_norm.cc, tests/python/test_kernels.py.   Benchmark  bench/kernels.py (layer_norm).
#pragma once

#include <cstdint>

namespace tutelage {

struct LayerNorm {
  std::int64_t tokens = 0, d = 0;
  const void* x = nullptr;
  std::int64_t x_row = 0;
  const std::int32_t* gather = nullptr;
  const void* residual = nullptr;  // pitch x_row
  void* sum = nullptr;             // pitch x_row; with a residual
  const void *weight = nullptr, *bias = nullptr;
  double eps = 0;
  void* y = nullptr;
  std::int64_t y_row = 0;
  void *mean = nullptr, *rstd = nullptr;
};

struct LayerNormBackward {
  std::int64_t tokens = 0, d = 0;
  const void* x = nullptr;
  std::int64_t x_row = 0;
  const std::int32_t* gather = nullptr;
  const void *weight = nullptr, *mean = nullptr, *rstd = nullptr, *dy = nullptr;
  std::int64_t dy_row = 0;
  void* dx = nullptr;  // at token gather[t]
  std::int64_t dx_row = 0;
  bool accumulate = false;                    // into dx
  void *dweight = nullptr, *dbias = nullptr;  // always accumulated; null: not wanted
};

}  // namespace tutelage
