// Arguments of kernels that no header of cpp/kernels/ states: plain data, for host code that contains no kernels.
#pragma once

#include <cstdint>

#include "cuda/ptx/bf16.h"
#include "kernels/sample.h"

namespace tutelage::cuda {

// vocab_tiles.cuh. Of one row over one tile of kVocabTile logits, distances measured from the tile's own maximum.
struct TileStatistics {
  float top, sum, weighted;  // max z, sum exp(z - top), sum exp(z - top) (z - top)
};

struct Draw {  // sample.cuh
  std::int64_t rows = 0, vocab = 0;
  const float* z = nullptr;                    // [rows, vocab], scaled by each row's temperature
  const TileStatistics* statistics = nullptr;  // [rows, tiles] of it
  const SampleSettings* settings = nullptr;    // [rows]
  std::int32_t* tokens = nullptr;
  float *logprob = nullptr, *support_logprob = nullptr;
};

struct ScalarHead {  // scalar_head.cuh
  std::int64_t tokens = 0, d = 0;
  const bf16* hidden = nullptr;
  std::int64_t row = 0;  // pitch
  const bf16* weight = nullptr;
  float* values = nullptr;
};
struct ScalarHeadBackward {
  std::int64_t tokens = 0, d = 0;
  const bf16* hidden = nullptr;
  std::int64_t row = 0;  // pitch of hidden and d_hidden
  const bf16* weight = nullptr;
  const float* d_values = nullptr;
  float* d_weight = nullptr;  // accumulated; null: not wanted
  bf16* d_hidden = nullptr;   // null: not wanted
};

}  // namespace tutelage::cuda
