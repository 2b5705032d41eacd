// Philox4x32-10, the counter-based generator of Salmon et al. 2011 ("Parallel random numbers: as easy as 1, 2, 3").
//
// A draw is a pure function of (key, counter): no state, so any order and any number of threads give the same bits.
// Test: tests/cpp/test_philox.cc (the known answers of Random123).
#pragma once

#include <array>
#include <cstdint>

namespace tutelage {

using PhiloxCounter = std::array<std::uint32_t, 4>;

// `static`: see parallel_for; the ISA units use it too.
static inline PhiloxCounter philox4x32(std::uint64_t key, PhiloxCounter counter) {
  auto k0 = static_cast<std::uint32_t>(key), k1 = static_cast<std::uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t p0 = 0xD2511F53ull * counter[0], p1 = 0xCD9E8D57ull * counter[2];
    counter = {static_cast<std::uint32_t>(p1 >> 32) ^ counter[1] ^ k0, static_cast<std::uint32_t>(p1),
               static_cast<std::uint32_t>(p0 >> 32) ^ counter[3] ^ k1, static_cast<std::uint32_t>(p0)};
    k0 += 0x9E3779B9u;  // the golden ratio and sqrt(3) - 1: Weyl sequences, from the paper
    k1 += 0xBB67AE85u;
  }
  return counter;
}

}  // namespace tutelage
