// exp, log, sigmoid and Philox on the device are the CPU's, bit for bit. (normal_cdf: test_gelu.cc.)
#include "cuda/kernels/math.cuh"
#include "cuda/kernels/philox.cuh"
#include "device.h"

#pragma GCC diagnostic ignored "-Wunused-function"

namespace {
namespace cpu {
using std::int32_t;
using std::int64_t;
using std::uint16_t;
using std::uint32_t;
using std::uint64_t;
using real = float;
#include "kernels/lanes_scalar.inc"
#include "kernels/math.inc"
}  // namespace cpu
}  // namespace

using namespace test;
namespace tc = tutelage::cuda;

TEST(exp_log_sigmoid_are_the_cpus) {
  const std::uint32_t step = kSmall ? 100003 : 9973;
  std::uint32_t bits = 0;
  for (std::int64_t i = 0; i < (std::int64_t(1) << 32) / step; ++i, bits += step) {
    const float x = tc::as_float(bits);
    CHECK(tc::as_bits(tc::exponential(x)) == tc::as_bits(cpu::exp(x)), x);
    CHECK(tc::as_bits(tc::sigmoid(x)) == tc::as_bits(cpu::first_lane(cpu::sigmoid(cpu::broadcast(x)))), x);
    if (x > 1e-37f) CHECK(tc::as_bits(tc::logarithm(x)) == tc::as_bits(cpu::log(x)), x);
  }
  const float infinity = std::numeric_limits<float>::infinity();
  for (float x : {0.0f, -0.0f, infinity, -infinity, std::nanf("")})
    CHECK(tc::as_bits(tc::exponential(x)) == tc::as_bits(cpu::exp(x)), x);
  CHECK(tc::exponential(0) == 1 && tc::exponential(-infinity) == 0 && tc::logarithm(1) == 0);
}

TEST(philox_gives_the_cpus_words) {
  for (std::uint32_t i = 0; i < 100; ++i) {
    const std::uint64_t key = i * 0x9E3779B97F4A7C15ull;
    const tc::PhiloxWords mine = tc::philox(key, {{i, ~i, i * i, 7}});
    const tutelage::PhiloxCounter expected = tutelage::philox4x32(key, {i, ~i, i * i, 7});
    for (int j = 0; j < 4; ++j) CHECK(mine[j] == expected[static_cast<std::size_t>(j)], i, j);
  }
  // a known answer of Random123
  CHECK(tc::philox(0, {{0, 0, 0, 0}})[0] == 0x6627e8d5u, tc::philox(0, {{0, 0, 0, 0}})[0]);
}
