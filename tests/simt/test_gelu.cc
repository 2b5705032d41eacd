#include "cuda/kernels/gelu.cuh"
#include "device.h"
#include "kernels/select.h"

using namespace test;
namespace tc = tutelage::cuda;

namespace {

struct Result {
  Memory<bf16> y, dx;
  bool operator==(const Result&) const = default;
};
Result run(int64_t n, bool erf, int64_t offset = 0) {
  Memory<bf16> x = random_bf16(n + offset, 1, 6), dy = random_bf16(n + offset, 2);
  Result r{Memory<bf16>(n), Memory<bf16>(n)};
  tc::gelu({n, x.data() + offset, r.y.data(), erf}, nullptr);
  tc::gelu_backward({n, x.data() + offset, dy.data() + offset, r.dx.data(), erf}, nullptr);
  return r;
}

template <class T>
std::pair<std::vector<T>, std::vector<T>> formula(int64_t n, bool erf) {
  const Memory<bf16> x = random_bf16(n, 1, 6), dy = random_bf16(n, 2);
  std::vector<T> y, dx;
  using std::erfc;
  using std::exp;
  using std::tanh;
  for (int64_t i = 0; i < n; ++i) {
    const T v(value(x[i])), slope(value(dy[i])), one(1), half(0.5);
    if (erf) {
      const T cdf = half * erfc(T(-0.70710678118654752) * v);
      y.push_back(v * cdf);
      dx.push_back(slope * (cdf + v * (T(0.39894228040143268) * exp(T(-0.5) * v * v))));
    } else {
      const T t = tanh(T(0.79788456080286536) * (v + T(0.044715) * v * v * v));
      y.push_back(half * v * (one + t));
      dx.push_back(slope *
                   (half * (one + t) + half * v * (one - t * t) * (T(0.79788456080286536) * (one + T(0.134145) * v * v))));
    }
  }
  return {y, dx};
}

}  // namespace

TEST(close_to_double_and_the_cpus_bits) {
  for (bool erf : {false, true})
    for (int64_t n : {1, 7, 8, 2048, 2056, 5000}) {
      const Result mine = every_schedule([&] { return run(n, erf); });
      const auto [y, dx] = formula<double>(n, erf);
      const auto [rounded_y, rounded_dx] = formula<Rounded>(n, erf);
      check_error(text("y", n, erf), mine.y, y, rounded_y);
      check_error(text("dx", n, erf), mine.dx, dx, rounded_dx);
      const std::vector<float> x = floats(random_bf16(n, 1, 6)), dy = floats(random_bf16(n, 2));
      std::vector<float> cpu_y(x.size()), cpu_dx(x.size());
      tutelage::scalar_table()->gelu({n, x.data(), cpu_y.data(), erf}, 1);
      tutelage::scalar_table()->gelu_backward({n, x.data(), dy.data(), cpu_dx.data(), erf}, 1);
      for (int64_t i = 0; i < n; ++i) {
        const auto at = static_cast<std::size_t>(i);
        CHECK(mine.y[i].bits == to_bf16(cpu_y[at]).bits && mine.dx[i].bits == to_bf16(cpu_dx[at]).bits, erf, i, x[at]);
      }
    }
}

TEST(the_float_inside_is_the_cpus) {
  std::vector<float> x, y, slope, ones;
  for (int i = -400; i <= 400; ++i) x.push_back(static_cast<float>(i) * 0.0371f);
  y = slope = x, ones = std::vector<float>(x.size(), 1.0f);
  for (bool erf : {false, true}) {
    tutelage::scalar_table()->gelu({int64_t(x.size()), x.data(), y.data(), erf}, 1);
    tutelage::scalar_table()->gelu_backward({int64_t(x.size()), x.data(), ones.data(), slope.data(), erf}, 1);
    for (std::size_t i = 0; i < x.size(); ++i) {
      CHECK(tc::as_bits(erf ? tc::gelu_value<true>(x[i]) : tc::gelu_value<false>(x[i])) == tc::as_bits(y[i]), erf, x[i]);
      CHECK(tc::as_bits(erf ? tc::gelu_slope<true>(x[i]) : tc::gelu_slope<false>(x[i])) == tc::as_bits(slope[i]), erf, x[i]);
    }
  }
}

TEST(unaligned_vectors_give_the_same_bits) {
  for (bool erf : {false, true}) {
    Memory<bf16> x = random_bf16(65, 1, 6);  // elements 1 … 64, at an address that is no multiple of 16
    Memory<bf16> moved(64), a(64), b(64);
    std::copy(x.begin() + 1, x.end(), moved.begin());
    tc::gelu({64, x.data() + 1, a.data(), erf}, nullptr);
    tc::gelu({64, moved.data(), b.data(), erf}, nullptr);
    CHECK(a == b, erf);
  }
}

TEST(memory_is_read_and_written_in_whole_sectors) {
  check_memory_traffic("gelu", [] { run(4096, false); });
}
