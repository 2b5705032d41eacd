// A copy of a model's matrices in the order in which generation streams them (kernels/pack_weight.h), in float32 or bfloat16.
// Whoever makes it must make it anew when the parameters change. Test: tests/python/test_rollouts.py.
#pragma once

#include <cstdint>
#include <unordered_map>
#include <vector>

#include "engine/buffer.h"

namespace tutelage {

class PackedWeights {
 public:
  struct Matrix {
    std::int64_t offset, n, k;  // offset into the parameters: [n, k], or [k, n] where transposed
    bool transposed, gate_up;
  };

  PackedWeights(const KernelTable& table, const std::vector<Matrix>& matrices, const void* params, bool half, int threads,
                void (*poll)());

  // Null where the table packs nothing.
  const void* at(std::int64_t offset) const {
    return places_.empty() ? nullptr : static_cast<const char*>(memory_.data()) + places_.at(offset);
  }
  bool half() const { return half_; }
  std::size_t bytes() const { return memory_.bytes(); }

 private:
  Buffer memory_;
  bool half_;
  std::unordered_map<std::int64_t, std::size_t> places_;
};

}  // namespace tutelage
