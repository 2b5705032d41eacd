// What sample.cuh is given and vocab_tiles.cuh computes: plain data, for host code that contains no kernels.
#pragma once

#include <cstdint>

#include "kernels/sample.h"

namespace tutelage::cuda {

// Of one row over one tile of kVocabTile logits, distances measured from the tile's own maximum.
struct TileStatistics {
  float top, sum, weighted;  // max z, sum exp(z - top), sum exp(z - top) (z - top)
};

struct Draw {
  std::int64_t rows = 0, vocab = 0;
  const float* z = nullptr;                    // [rows, vocab], scaled by each row's temperature
  const TileStatistics* statistics = nullptr;  // [rows, tiles] of it
  const SampleSettings* settings = nullptr;    // [rows]
  std::int32_t* tokens = nullptr;
  float *logprob = nullptr, *support_logprob = nullptr;
};

}  // namespace tutelage::cuda
