// Embedding look-up, with learned positions added, and the gradient of a table.
//
// Shapes   table [rows, d], ids int32 [tokens], y [tokens, d]; positions (optional) int32 [tokens] into position_table [., d].
//          All contiguous.
// Formula  y_t = table[ids_t] (+ position_table[positions_t]);  backward: dtable[ids_t] += dy_t
// Order    a row of dtable is ONE chain over its tokens in order, continued from what it holds; parallel over columns only.
// Work     memory: reads and writes tokens x d.
// Test     tests/cpp/test_embedding.cc, tests/python/test_kernels.py.   Benchmark  bench/kernels.py (embedding).
#pragma once

#include <cstdint>

namespace tutelage {

struct Embedding {
  std::int64_t tokens = 0, d = 0;
  const std::int32_t* ids = nullptr;
  const void* table = nullptr;
  const std::int32_t* positions = nullptr;
  const void* position_table = nullptr;
  void* y = nullptr;
};

struct EmbeddingBackward {
  std::int64_t tokens = 0, d = 0;
  const std::int32_t* ids = nullptr;
  const void* dy = nullptr;
  void* dtable = nullptr;  // accumulated
  bool dy_state = false;   // elements of dy are of state_size: a table's gradient that is added to another's
};

}  // namespace tutelage
