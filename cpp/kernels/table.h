// The kernel table: the one door between the engine and a device.
//
// The engine is written once against it. It knows neither the element type behind a void* nor where the memory lies: the table
// says how large an activation is and how large what is accumulated, gives and takes memory, and brings a few rows to the host.
// One table an ISA level on the CPU, one for float64 (gradient checks), one a CUDA device. Test: tests/cpp/test_levels.cc
// (every level against scalar, memcmp).
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/adamw.h"
#include "kernels/cached_attention.h"
#include "kernels/ceilings.h"
#include "kernels/column_sum.h"
#include "kernels/embedding.h"
#include "kernels/flash_attention.h"
#include "kernels/gelu.h"
#include "kernels/layer_norm.h"
#include "kernels/linear_logprob.h"
#include "kernels/matmul.h"
#include "kernels/pack_weight.h"
#include "kernels/rms_norm.h"
#include "kernels/rope.h"
#include "kernels/sample.h"
#include "kernels/swiglu.h"
#include "kernels/total.h"

namespace tutelage {

struct KernelTable {
  const char* name;  // "scalar", "avx2", "avx512", "neon", "float64"
  std::int64_t
      activation_size;      // bytes of an element of activations, weights and the cache: 4; 8 for float64; 2 (bfloat16) on CUDA
  std::int64_t state_size;  // of what is accumulated or handed out (gradients, statistics, logits, log-probs): 4, or 8

  void (*matmul)(const Matmul&, int threads);
  void (*flash_attention)(const Attention&, int threads);
  void (*flash_attention_backward)(const AttentionBackward&, int threads);
  void (*rms_norm)(const RmsNorm&, int threads);
  void (*rms_norm_backward)(const RmsNormBackward&, int threads);
  void (*layer_norm)(const LayerNorm&, int threads);
  void (*layer_norm_backward)(const LayerNormBackward&, int threads);
  void (*column_sum)(const ColumnSum&, int threads);
  void (*rope)(const Rope&, int threads);
  void (*swiglu)(const Swiglu&, int threads);
  void (*swiglu_backward)(const SwigluBackward&, int threads);
  void (*gelu)(const Gelu&, int threads);
  void (*gelu_backward)(const GeluBackward&, int threads);
  void (*embedding)(const Embedding&, int threads);
  void (*embedding_backward)(const EmbeddingBackward&, int threads);
  void (*linear_logprob)(const LinearLogprob&, int threads);
  void (*linear_logprob_backward)(const LinearLogprobBackward&, int threads);
  void (*pack_weight)(const PackWeight&, int threads);
  void (*cached_attention)(const CachedAttention&, int threads);
  void (*sample)(const Sample&, int threads);
  void (*adamw)(const AdamW&, int threads);
  void (*total)(const Total&, int threads);
  void (*sum_of_squares)(const SumOfSquares&, int threads);
  void (*fma_peak)(const FmaPeak&, int threads);
  void (*read_sweep)(const ReadSweep&, int threads);

  void* (*allocate)(std::size_t bytes);
  void (*release)(void* block) noexcept;
  void (*copy)(void* to, const void* from, std::size_t bytes);
  void (*zero)(void* to, std::size_t bytes);
  void (*from_float)(void* to, const float* from, std::int64_t n);  // from the host, to elements of state_size
  void (*to_double)(double* to, const void* from, std::int64_t n);  // brings n of them to the host
  // Where the kernels do not read the host's memory: a copy from it, and one to it that waits. Null: they do.
  void (*upload)(void* to, const void* from, std::size_t bytes);
  void (*download)(void* to, const void* from, std::size_t bytes);
};

// The levels. Declared for all machines, defined where the machine has them: levels() in select.h names those.
const KernelTable* scalar_table();
const KernelTable* float64_table();
const KernelTable* avx2_table();
const KernelTable* avx512_table();
const KernelTable* neon_table();

}  // namespace tutelage
