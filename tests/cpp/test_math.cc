// math.inc on the scalar lanes, in float and in double, against the C library in long double.
#include <limits>

#include "support.h"

#pragma GCC diagnostic ignored "-Wunused-function"

namespace {
using std::int32_t;
using std::int64_t;
using std::uint32_t;
using std::uint64_t;
namespace single_precision {
using real = float;
#include "kernels/lanes_scalar.inc"
#include "kernels/math.inc"
}  // namespace single_precision
namespace double_precision {
using real = double;
#include "kernels/lanes_scalar.inc"
#include "kernels/math.inc"
}  // namespace double_precision

float our_exp(float x) { return single_precision::exp(x); }
double our_exp(double x) { return double_precision::exp(x); }
float our_log(float x) { return single_precision::log(x); }
double our_log(double x) { return double_precision::log(x); }

template <class T>
void check_exp(T from, T to, T step, test::wide units) {
  for (T x = from; x <= to; x += step) {
    const test::wide exact = std::exp(test::wide(x)), error = std::fabs(our_exp(x) - exact);
    CHECK(error <= units * std::numeric_limits<T>::epsilon() * exact, x, our_exp(x), "units", double(error / exact));
  }
}
template <class T>
void check_log(T from, T to, T factor, test::wide units) {
  for (T x = from; x <= to; x *= factor) {
    const test::wide exact = std::log(test::wide(x)), error = std::fabs(our_log(x) - exact);
    CHECK(error <= units * std::numeric_limits<T>::epsilon() * (std::fabs(exact)), x, our_log(x), double(exact));
  }
}
template <class T>
void check_exact_points(T below_underflow, T above_overflow) {
  const T infinity = std::numeric_limits<T>::infinity();
  CHECK(our_exp(T(0)) == 1 && our_exp(-T(0)) == 1 && our_log(T(1)) == 0);
  CHECK(our_exp(-infinity) == 0 && our_exp(below_underflow) == 0 && !std::signbit(our_exp(-infinity)));
  CHECK(our_exp(infinity) == infinity && our_exp(above_overflow) == infinity);
  CHECK(std::isnan(our_exp(test::kNan<T>)) && std::isnan(our_exp(-test::kNan<T>)));
  CHECK(std::isnan(our_log(test::kNan<T>)) && std::isnan(our_log(-test::kNan<T>)), our_log(test::kNan<T>));
  CHECK(our_log(infinity) == infinity, our_log(infinity));
}

}  // namespace

TEST(exp_is_within_two_units_of_the_last_place) {
  check_exp(-87.3f, 88.37f, 0.000917f * (test::kSmall ? 30 : 1), 2);
  check_exp(-1.0f, 1.0f, 0.0000117f * (test::kSmall ? 30 : 1), 2);
  check_exp(-708.3, 709.4, 0.00517 * (test::kSmall ? 30 : 1), 2);
  check_exp(-1.0, 1.0, 0.0000117 * (test::kSmall ? 30 : 1), 2);
}

TEST(log_is_within_two_units_of_the_last_place) {
  check_log(1.2e-38f, 3e38f, test::kSmall ? 1.01f : 1.0003f, 2);
  check_log(2.3e-308, 1.7e308, test::kSmall ? 1.1 : 1.003, 2);
  check_log(1.0001f, 1.7f, 1.00007f, 2);
  check_log(0.5f, 0.9999f, 1.00007f, 2);
  check_log(1.0001, 1.7, 1.00007, 2);
}

TEST(exact_points) {
  check_exact_points<float>(-87.4f, 89.0f);
  check_exact_points<double>(-708.5, 710.0);
}

TEST(sums_and_maxima_follow_the_fixed_tree) {
  using namespace single_precision;
  int sequential_differs = 0;
  for (std::uint64_t seed = 0; seed < 20; ++seed) {
    const std::vector<float> x = test::Source<float>{}(16, seed);
    float tree[16], sequential = 0, largest = x[0];
    for (int i = 0; i < 16; ++i) tree[i] = x[i], sequential += x[i], largest = x[i] > largest ? x[i] : largest;
    for (int width : {8, 4, 2, 1})
      for (int i = 0; i < width; ++i) tree[i] += tree[i + width];
    const float sum = reduce_sum(load(x.data())), most = reduce_max(load(x.data()));
    CHECK(test::same_bits(&sum, tree, 1) && most == largest, seed, sum, tree[0], most, largest);
    sequential_differs += sum != sequential;
  }
  CHECK(sequential_differs > 0, "control: the order shows");
}

TEST(every_level_has_the_same_exp) {  // through the sigmoid in swiglu, over its whole range
  test::same_everywhere([](const tutelage::KernelTable& t, int threads, const test::Source<float>& in) {
    const int64_t n = 20000;
    std::vector<float> x = in(n, 1), y(x.size()), one(x.size(), 1.0f);
    for (float& v : x) v *= 100;
    t.swiglu({1, n, x.data(), one.data(), n, y.data(), n}, threads);
    return test::Outputs<float>{y};
  });
}
