#include "support.h"

using namespace test;

namespace {

template <class T>
Outputs<T> run(int64_t n, int64_t cut, const KernelTable& t, int threads, const Source<T>& in) {
  std::vector<T> p = in(n, 1), m = in(n, 3), v = in(n, 4);
  const std::vector<T> g = in(n, 2);
  for (T& x : v) x *= x;
  for (auto [begin, end] : {std::pair<int64_t, int64_t>{0, cut}, {cut, n}})
    t.adamw({end - begin, p.data() + begin, g.data() + begin, m.data() + begin, v.data() + begin, 1e-2, 0.9, 0.95, 1e-8, 0.1,
             1 - 0.9 * 0.9 * 0.9, 1 - 0.95 * 0.95 * 0.95, 0.5},
            threads);
  return {p, m, v};
}

}  // namespace

TEST(the_formula) {
  for (int64_t n : {1, 16, 37, 1000}) {
    const Outputs<double> mine = run(n, n, *float64_table(), 2, Source<double>{});
    const Source<double> in;
    const std::vector<double> p = in(n, 1), g = in(n, 2), m = in(n, 3), v = in(n, 4);
    std::vector<std::vector<wide>> expected(3);
    for (int64_t i = 0; i < n; ++i) {
      const wide slope = g[i] * 0.5L, mean = 0.9L * m[i] + 0.1L * slope;
      const wide square = 0.95L * v[i] * v[i] + 0.05L * slope * slope;
      const wide m_hat = mean / (1 - 0.9L * 0.9L * 0.9L), v_hat = square / (1 - 0.95L * 0.95L * 0.95L);
      expected[0].push_back(p[i] - 1e-2L * 0.1L * p[i] - 1e-2L * m_hat / (std::sqrt(v_hat) + 1e-8L));
      expected[1].push_back(mean), expected[2].push_back(square);
    }
    for (std::size_t i = 0; i < 3; ++i) CHECK(difference(mine[i], expected[i]) < 1e-12, n, i, difference(mine[i], expected[i]));
  }
}

TEST(levels_threads_and_any_cut_of_the_buffer) {
  for (int64_t n : {0, 1, 15, 16, 17, 100, 1001})
    for (int64_t cut : {int64_t(0), n / 2, n}) {
      const Outputs<float> mine = same_everywhere(
          [&](const KernelTable& t, int threads, const Source<float>& in) { return run(n, cut, t, threads, in); });
      CHECK(same_bits(mine, run(n, 0, *scalar_table(), 1, Source<float>{})), n, cut);
    }
}

TEST(a_zero_gradient_decays_only_and_nan_is_not_hidden) {
  for (const KernelTable* t : float_tables()) {
    float p[] = {1, 1}, m[] = {0, 0}, v[] = {0, 0};
    const float g[] = {0, kNan<float>};
    t->adamw({2, p, g, m, v, 0.5, 0.9, 0.95, 1e-8, 0.5, 0.1, 0.05, 1.0}, 1);
    CHECK(p[0] == 0.75f && m[0] == 0 && v[0] == 0, t->name, p[0]);
    CHECK(std::isnan(p[1]) && std::isnan(m[1]) && std::isnan(v[1]), t->name, p[1]);
  }
}
