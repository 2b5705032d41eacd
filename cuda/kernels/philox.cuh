// Philox4x32-10, as cpp/core/philox.h: the same words from the same key and counter.
//
// Test     tests/simt/test_math.cc.
#pragma once

#include <cstdint>

#include "cuda/ptx/bf16.h"

namespace tutelage::cuda {

using PhiloxWords = Pack<std::uint32_t, 4>;

__device__ __forceinline__ PhiloxWords philox(std::uint64_t key, PhiloxWords counter) {
  auto k0 = static_cast<std::uint32_t>(key), k1 = static_cast<std::uint32_t>(key >> 32);
  SIMT_UNROLL
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t p0 = 0xD2511F53ull * counter[0], p1 = 0xCD9E8D57ull * counter[2];
    counter = {{static_cast<std::uint32_t>(p1 >> 32) ^ counter[1] ^ k0, static_cast<std::uint32_t>(p1),
                static_cast<std::uint32_t>(p0 >> 32) ^ counter[3] ^ k1, static_cast<std::uint32_t>(p0)}};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return counter;
}

}  // namespace tutelage::cuda
