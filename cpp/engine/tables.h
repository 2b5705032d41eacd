// What a model computes once: rotary tables and initial weights. The same bits on every machine and at every ISA level.
// Test: tests/python/test_model.py (against transformers; known bits).
#pragma once

#include <cstdint>
#include <vector>

#include "engine/config.h"
#include "engine/layout.h"

namespace tutelage {

struct RopeTables {  // [positions, head_dim / 2]
  std::vector<float> cos, sin;
};
// Frequencies and angles are rounded to float32 before the cosine is taken: the checkpoints were trained that way.
RopeTables rope_tables(const Config& config, std::int64_t positions, int threads);

// GPT-2's initialisation: matrices N(0, 0.02), those that write to the residual stream / sqrt(2 layers), norms 1, biases 0, the
// scalar head N(0, 1 / sqrt(hidden + 1)); an adapter's A uniform within 1 / sqrt(in), as PEFT's. Philox key: the seed; counter:
// (element / 4, parameter index, stream): 0 for a model, 1 for an adapter. Element type float32.
void initialise(const Config& config, const std::vector<Parameter>& parameters, std::uint64_t seed, std::uint32_t stream,
                float* params, int threads);

}  // namespace tutelage
