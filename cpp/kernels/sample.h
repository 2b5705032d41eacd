// The next token of every row and its log-prob, straight from hidden states and the vocabulary matrix.
//
// Shapes   x [rows, hidden], weight [vocab, hidden] (or as pack_weight leaves it), z [rows, vocab] scratch; settings [rows];
//          tokens int32 [rows], -1 where no token could be drawn (a logit is not a number); logprob, support_logprob [rows].
// Formula  z_j = (x . weight_j) / temperature. Greedy (temperature 0): the largest z at temperature 1, ties to the smallest id.
//          Else a draw from softmax(z) over the support: the top_k largest z (0: all; ties with the last of them stay); of
//          those the fewest largest whose probability among them reaches top_p (ties stay); of those every one of at least
//          min_p times the probability of the best. logprob = z_token - lse over the whole vocabulary, as linear_logprob gives
//          it; support_logprob the same over the support. The draw: Gumbel-max in two steps (Gumbel 1954; Maddison et al. 2014,
//          arXiv 1411.0030): the vocabulary tile with the largest log-sum-exp + Gumbel noise, then within it the token with the
//          largest z + Gumbel noise. Exact, and needs vocab / tile + tile variates a row instead of vocab: the noise costs
//          nothing.
// Noise    Philox4x32-10 with the row's key; counter (position, element / 4, 0 or 1 + tile, 0): a pure function of what P3
// names.
//          E = -log(1 - u), with log1p's accuracy by Kahan's quotient; the Gumbel variate is -log E.
// Order    z, and the log-sum-exp from it, as linear_logprob: the same bits (P2).
// Work     2 rows x hidden x vocab flops; reads the vocabulary matrix once.
// Test     tests/cpp/test_sample.cc, tests/python/test_rollouts.py.   Benchmark  bench/rollout.py.
#pragma once

#include <cstdint>

namespace tutelage {

struct SampleSettings {
  double temperature = 1.0, top_p = 1.0, min_p = 0.0;  // temperature 0: greedy
  std::int64_t top_k = 0;                              // 0: all
  std::uint64_t key = 0;                               // of the noise
  std::uint32_t position = 0;                          // of the token to be drawn, in its sequence
};

struct Sample {
  std::int64_t rows = 0, hidden = 0, vocab = 0;
  const void *x = nullptr, *weight = nullptr;
  const void* packed = nullptr;  // the weight, packed
  bool packed_half = false;
  const SampleSettings* settings = nullptr;
  void* z = nullptr;
  std::int32_t* tokens = nullptr;
  void *logprob = nullptr, *support_logprob = nullptr;
};

}  // namespace tutelage
