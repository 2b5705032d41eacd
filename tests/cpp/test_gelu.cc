#include "support.h"

using namespace test;

namespace {

wide value(wide x, bool erf) {
  if (erf) return x * std::erfc(-x / std::sqrt(2.0L)) / 2;
  return x / (1 + std::exp(-2 * std::sqrt(2 / 3.14159265358979323846L) * (x + 0.044715L * x * x * x)));
}

template <class T>
Outputs<T> run(int64_t n, const KernelTable& t, int threads, const Source<T>& in) {
  std::vector<T> x = in(n, 1);
  for (T& v : x) v *= 8;
  Outputs<T> out;
  for (bool erf : {false, true}) {
    std::vector<T> y = blank<T>(n), dx = blank<T>(n);
    t.gelu({n, x.data(), y.data(), erf}, threads);
    t.gelu_backward({n, x.data(), in(n, 2).data(), dx.data(), erf}, threads);
    out.push_back(y), out.push_back(dx);
  }
  return out;
}

}  // namespace

TEST(values_near_zero_and_far_into_both_tails) {
  std::vector<double> x;
  for (double v = -12; v <= 40; v += 0.0137) x.push_back(v);
  x.insert(x.end(), {0.0, 1e-300, -1e-300, 1e-10, -1e-10, -37.0});
  const auto n = static_cast<int64_t>(x.size());
  for (bool erf : {false, true}) {
    std::vector<double> y = blank<double>(n);
    float64_table()->gelu({n, x.data(), y.data(), erf}, 1);
    for (std::size_t i = 0; i < x.size(); ++i) {
      const wide expected = value(x[i], erf);
      // rounding the exponent, up to 700, costs up to 700 units in the last place; below the smallest normal: 0
      CHECK(std::fabs(y[i] - expected) <= 1e-12L * std::fabs(expected) + 1e-290L, "erf", erf, x[i], y[i], double(expected));
    }
  }
}

TEST(float_values_are_within_a_few_units_of_the_last_place) {
  for (bool erf : {false, true}) {
    for (float x = -4; x <= 20; x += 0.00731f) {
      float y = kNan<float>;
      scalar_table()->gelu({1, &x, &y, erf}, 1);
      const wide expected = value(x, erf);
      CHECK(std::fabs(y - expected) <= 4e-6L * std::fabs(expected), "erf", erf, x, y, double(expected));
    }
  }
}

TEST(slopes_agree_with_central_differences) {
  for (bool erf : {false, true}) {
    std::vector<double> x = Source<double>{}(40, 1), dx = blank<double>(40), y = blank<double>(40);
    for (double& v : x) v *= 4;
    const std::vector<double> dy = Source<double>{}(40, 2);
    float64_table()->gelu_backward({40, x.data(), dy.data(), dx.data(), erf}, 1);
    check_gradient(erf ? "gelu_erf" : "gelu", x, dx, [&] {
      float64_table()->gelu({40, x.data(), y.data(), erf}, 1);
      return dot(y, dy);
    });
  }
}

TEST(every_length_and_level) {
  for (int64_t n : {0, 1, 7, 15, 16, 17, 33, 100, 1000})
    same_everywhere([&](const KernelTable& t, int threads, const Source<float>& in) { return run(n, t, threads, in); });
}

TEST(zero_stays_zero_and_nan_stays_nan) {
  for (const KernelTable* t : float_tables())
    for (bool erf : {false, true}) {
      const float x[] = {0, kNan<float>, INFINITY, 1}, dy[] = {1, 1, 1, 1};
      float y[4], dx[4];
      t->gelu({4, x, y, erf}, 1);
      t->gelu_backward({4, x, dy, dx, erf}, 1);
      CHECK(y[0] == 0 && std::isnan(y[1]) && y[2] == INFINITY, t->name, erf, y[0], y[1], y[2]);
      CHECK(dx[0] == 0.5f && std::isnan(dx[1]) && !std::isnan(dx[3]), t->name, erf, dx[0], dx[1]);
    }
}
