// Where every parameter lies in the one flat buffer, under the names and in the shapes of Hugging Face's checkpoints.
//
// q, k, v lie one after the other, and gate after up's neighbour, so that each group is one matrix to the engine and several
// named tensors to the world. Test: tests/python/test_model.py (names and shapes against transformers).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "engine/config.h"

namespace tutelage {

struct Parameter {
  enum class Init : std::uint8_t { normal, residual, ones, zeros, scalar_head, uniform };
  std::string name;
  std::vector<std::int64_t> shape;
  std::int64_t offset = 0, size = 0;
  bool decay = false;  // matrices are decayed, norms and biases are not
  Init init = Init::normal;
};

constexpr std::int64_t kAbsent = -1;

// Offsets into the flat buffer; kAbsent where the model has no such parameter.
struct LayerOffsets {
  std::int64_t norm1 = kAbsent, norm1_bias = kAbsent, qkv = kAbsent, qkv_bias = kAbsent, q_norm = kAbsent, k_norm = kAbsent;
  std::int64_t out = kAbsent, out_bias = kAbsent, norm2 = kAbsent, norm2_bias = kAbsent;
  std::int64_t up = kAbsent, up_bias = kAbsent, down = kAbsent, down_bias = kAbsent;  // up: [gate; up] for SwiGLU
};

struct Layout {
  explicit Layout(const Config& config);

  std::vector<Parameter> parameters;
  std::int64_t size = 0;
  std::int64_t embedding = kAbsent, positions = kAbsent, norm = kAbsent, norm_bias = kAbsent, head = kAbsent;
  std::vector<LayerOffsets> layers;
  bool tied = false;        // head == embedding
  bool transposed = false;  // the blocks' matrices are [in, out], as GPT-2's Conv1D has them
};

}  // namespace tutelage
