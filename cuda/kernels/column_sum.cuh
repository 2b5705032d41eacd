// The gradient of a bias, as cpp/kernels/column_sum.h states it.
//
// Types    x bf16, out float.
// Order    columns.cuh: ONE chain a column.
// Test     tests/simt/test_column_sum.cc.
#pragma once

#include "cuda/kernels/columns.cuh"
#include "kernels/column_sum.h"

namespace tutelage::cuda {

struct PlainColumns {
  static constexpr int kMatrices = 1, kSums = 1, kStatistics = 0;
  ColumnSum g;
  __device__ __forceinline__ const bf16* matrix(int, int64_t row) const {
    return static_cast<const bf16*>(g.x) + row * g.x_row;
  }
  __device__ __forceinline__ float statistic(int, int64_t) const { return 0; }
  __device__ __forceinline__ float* sum(int) const { return static_cast<float*>(g.out); }
  __device__ __forceinline__ void add(const float* value, const float*, float* sum) const { sum[0] = sum[0] + value[0]; }
};

inline void column_sum(const ColumnSum& g, cudaStream_t stream) {
  column_chains(PlainColumns{g}, aligned_rows(g.x, g.x_row, g.d), g.rows, g.d, stream);
}

}  // namespace tutelage::cuda
