// log-prob, log-sum-exp and entropy of target tokens, straight from hidden states and the vocabulary matrix; and the backward.
//
// Shapes   x [rows, hidden], weight [vocab, hidden], targets int32 [rows], all contiguous; logprob, entropy, lse [rows];
//          z [rows, vocab]: the scaled logits, if the caller keeps them between forward and backward. index (optional) int32
//          [rows]: row r writes logprob and entropy, and reads their gradients and the entropy, at index[r] (lse stays at r).
// Formula  z_j = (x . weight_j) / temperature;  lse = log sum_j exp z_j;  logprob = z_target - lse;
//          entropy = lse - sum_j p_j z_j, p_j = exp(z_j - lse).
//          backward: dz_j = dlogprob (1[j = target] - p_j) - dentropy p_j (z_j - lse + entropy), d(x . weight_j) = dz_j / T;
//          dx_i = sum_j dz_j weight_j,  dweight_j += sum over rows of dz_j x.
// Order    each z is one chain over hidden. The sums over the vocabulary are taken in tiles of kVocabTile columns (maximum;
// then
//          sum of exp and of exp times distance, in 16 lanes and the fixed tree), merged in index order by one function. dx:
//          one chain over the vocabulary; dweight: ONE chain over rows, continued from what it holds. Kept logits and logits
//          computed again, in blocks of any number of rows, give the same bits.
// Work     forward 2, backward 4 (6 when logits are computed again) x rows x hidden x vocab flops. Memory beyond the outputs:
//          forward 12 bytes a row and vocabulary tile; backward nothing with kept logits (they are overwritten by dz), else
//          block_rows x vocab.
// Test     tests/cpp/test_linear_logprob.cc, tests/python/test_kernels.py.   Benchmark  bench/kernels.py (linear_logprob).
#pragma once

#include <cstdint>

namespace tutelage {

struct LinearLogprob {
  std::int64_t rows = 0, hidden = 0, vocab = 0;
  const void *x = nullptr, *weight = nullptr;
  const std::int32_t *targets = nullptr, *index = nullptr;
  double temperature = 1.0;
  void* z = nullptr;  // null: not kept
  void *logprob = nullptr, *entropy = nullptr, *lse = nullptr;
};

struct LinearLogprobBackward {
  std::int64_t rows = 0, hidden = 0, vocab = 0;
  const void *x = nullptr, *weight = nullptr;
  const std::int32_t *targets = nullptr, *index = nullptr;
  double temperature = 1.0;
  void* z = nullptr;            // kept logits, overwritten; null: computed again
  std::int64_t block_rows = 0;  // at most so many rows at a time when computed again
  const void *entropy = nullptr, *lse = nullptr, *d_logprob = nullptr, *d_entropy = nullptr;
  void *dx = nullptr, *dweight = nullptr;  // either may be null
  bool accumulate = true;                  // dweight continues from what it holds, else from 0
  // matmul.h's k_steps, of the rows; and where the host can read them.
  const std::int32_t *row_steps = nullptr, *row_steps_host = nullptr;
  std::int64_t row_step_count = 0;
};

}  // namespace tutelage
