// Sums down the columns of matrices of activations: the gradients of norm weights and biases.
//
// Order    ONE chain a column over ascending rows, continued from what the output holds (P4: the cut of a batch into
//          micro-batches must not show), so a column cannot be shared out between threads.
// How      a warp owns 32 columns and all rows. Rows come 32 at a time through shared memory, three stages ahead by cp.async:
// one
//          chain of dependent additions is slow, waiting for memory in it would be far slower.
// Work     reads its operands once. With d / 32 warps, a GPU is not filled below d = 4,096 or so: the price of P4.
// Test     tests/simt/test_column_sum.cc, test_rms_norm.cc, test_layer_norm.cc.
#pragma once

#include <cstdint>

#include "cuda/kernels/rows.cuh"
#include "cuda/ptx/cp_async.h"
#include "cuda/ptx/math.h"

namespace tutelage::cuda {

constexpr int kColumns = 32, kStageRows = 32, kStages = 4;

// A Term says what is added. It is passed to the kernel by value and has
//   kMatrices (1 or 2), kSums (1 or 2), kStatistics (0 to 2): how many it uses of each
//   const bf16* matrix(int m, int64_t row)      where a row of the m-th operand begins
//   float statistic(int s, int64_t row)         a number of the row
//   float* sum(int s)                           where the sums of the columns lie
//   void add(const float* value, const float* statistic, float* sum)    the next link of the chains
template <class Term, bool Aligned>
static __global__ void __launch_bounds__(32) column_chains_kernel(const Term term, int64_t rows, int64_t d) {
  constexpr int kRowChunks = kColumns / kChunk;
  bf16* staged = dyn_smem<bf16>();  // [kStages][kMatrices][kStageRows][kColumns]
  float* statistics = reinterpret_cast<float*>(staged + kStages * Term::kMatrices * kStageRows * kColumns);
  const int lane = static_cast<int>(threadIdx.x);
  const int64_t first = int64_t(blockIdx.x) * kColumns, column = first + lane;
  const int64_t stages = (rows + kStageRows - 1) / kStageRows;

  auto fetch = [&](int64_t stage) {  // rows beyond the last and columns beyond d arrive as zeros and are not used
    const int64_t row0 = stage * kStageRows;
    bf16* to = staged + (stage % kStages) * Term::kMatrices * kStageRows * kColumns;
    if (stage < stages) {
      SIMT_UNROLL
      for (int m = 0; m < Term::kMatrices; ++m) SIMT_UNROLL
      for (int i = 0; i < kStageRows * kRowChunks / 32; ++i) {
        const int at = i * 32 + lane, r = at / kRowChunks, c = at % kRowChunks * kChunk;
        const bool there = row0 + r < rows && first + c < d;
        bf16* place = to + (m * kStageRows + r) * kColumns + c;
        if constexpr (Aligned) {
          cp_async_16(place, term.matrix(m, row0 + r < rows ? row0 + r : rows - 1) + (there ? first + c : 0), there ? 16 : 0);
        } else {
          Chunk chunk = {};
          if (there) chunk = load_chunk<false>(term.matrix(m, row0 + r) + first + c, d - first - c);
          st_shared(reinterpret_cast<Chunk*>(place), chunk);
        }
      }
      SIMT_UNROLL
      for (int s = 0; s < Term::kStatistics; ++s)
        st_shared(statistics + ((stage % kStages) * Term::kStatistics + s) * kStageRows + lane,
                  row0 + lane < rows ? term.statistic(s, row0 + lane) : 0.0f);
    }
    cp_async_commit();
  };

  float sums[Term::kSums];
  SIMT_UNROLL
  for (int s = 0; s < Term::kSums; ++s) sums[s] = column < d && term.sum(s) ? ld_global(term.sum(s) + column) : 0.0f;
  for (int64_t stage = 0; stage < kStages - 1; ++stage) fetch(stage);
  for (int64_t stage = 0; stage < stages; ++stage) {
    cp_async_wait_group<kStages - 2>();
    __syncwarp();  // this stage is there for all lanes, and all have read the one that is filled next
    fetch(stage + kStages - 1);
    const bf16* from = staged + (stage % kStages) * Term::kMatrices * kStageRows * kColumns;
    const float* numbers = statistics + (stage % kStages) * Term::kStatistics * kStageRows;
    const int64_t left = rows - stage * kStageRows;
    auto link = [&](int r) {
      float values[Term::kMatrices], statistic[Term::kStatistics + 1];
      SIMT_UNROLL
      for (int m = 0; m < Term::kMatrices; ++m) values[m] = to_float(ld_shared(from + (m * kStageRows + r) * kColumns + lane));
      SIMT_UNROLL
      for (int s = 0; s < Term::kStatistics; ++s) statistic[s] = ld_shared(numbers + s * kStageRows + r);
      term.add(values, statistic, sums);
    };
    if (left >= kStageRows) {
      SIMT_UNROLL
      for (int r = 0; r < kStageRows; ++r) link(r);
    } else {
      for (int r = 0; r < left; ++r) link(r);
    }
  }
  cp_async_wait_group<0>();
  SIMT_UNROLL
  for (int s = 0; s < Term::kSums; ++s)
    if (column < d && term.sum(s)) st_global(term.sum(s) + column, sums[s]);
}

template <class Term>
void column_chains(const Term& term, bool aligned, int64_t rows, int64_t d, cudaStream_t stream) {
  if (rows == 0 || d == 0) return;
  const std::size_t bytes =
      std::size_t(kStages) * kStageRows * (Term::kMatrices * kColumns * sizeof(bf16) + Term::kStatistics * sizeof(float));
  const dim3 grid(static_cast<unsigned>((d + kColumns - 1) / kColumns));
  launch(aligned ? column_chains_kernel<Term, true> : column_chains_kernel<Term, false>, grid, dim3(32), bytes, stream, term,
         rows, d);
}

}  // namespace tutelage::cuda
