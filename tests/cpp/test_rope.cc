#include "support.h"

using namespace test;

namespace {

struct Case {
  int64_t tokens, heads, d;
  bool backward = false, in_place = false;
};
constexpr int64_t kPositions = 50;

template <class T>
Outputs<T> run(const Case& g, const KernelTable& t, int threads, const Source<T>& in) {
  const int64_t width = g.heads * g.d, x_row = width + 3, y_row = g.in_place ? x_row : width + 1;
  std::vector<T> x = in(g.tokens * x_row, 1), y(static_cast<std::size_t>(g.tokens * y_row), T(kPad));
  const std::vector<T> cosines = in(kPositions * g.d / 2, 2), sines = in(kPositions * g.d / 2, 3);
  std::vector<int32_t> positions;
  for (int64_t i = 0; i < g.tokens; ++i) positions.push_back(int32_t(i * 7 % kPositions));
  t.rope({g.tokens, g.heads, g.d, x.data(), x_row, g.in_place ? x.data() : y.data(), y_row, positions.data(), cosines.data(),
          sines.data(), g.backward},
         threads);
  return {g.in_place ? x : y};
}

std::vector<wide> reference(const Case& g) {
  const Source<double> in;
  const int64_t width = g.heads * g.d, x_row = width + 3, y_row = width + 1, half = g.d / 2;
  const std::vector<double> x = in(g.tokens * x_row, 1), cosines = in(kPositions * half, 2), sines = in(kPositions * half, 3);
  std::vector<wide> y(static_cast<std::size_t>(g.tokens * y_row), kPad);
  for (int64_t t = 0; t < g.tokens; ++t)
    for (int64_t h = 0; h < g.heads; ++h)
      for (int64_t j = 0; j < half; ++j) {
        const int64_t at = t * x_row + h * g.d + j, to = t * y_row + h * g.d + j, angle = t * 7 % kPositions * half + j;
        const wide c = cosines[angle], s = g.backward ? -sines[angle] : sines[angle], x1 = x[at], x2 = x[at + half];
        y[to] = x1 * c - x2 * s;
        y[to + half] = x2 * c + x1 * s;
      }
  return y;
}

}  // namespace

TEST(shapes) {
  for (int64_t tokens : {1, 17})
    for (int64_t heads : {1, 3})
      for (int64_t d : {8, 24, 64, 128})
        for (bool backward : {false, true}) {
          const Case g{tokens, heads, d, backward};
          const Outputs<double> mine = run(g, *float64_table(), 2, Source<double>{});
          CHECK(difference(mine[0], reference(g)) < 1e-14, tokens, heads, d, backward, difference(mine[0], reference(g)));
          same_everywhere([&](const KernelTable& t, int threads, const Source<float>& in) { return run(g, t, threads, in); });
        }
}

TEST(in_place_has_the_same_bits) {
  for (const KernelTable* t : float_tables())
    for (bool backward : {false, true}) {
      const Case apart{17, 3, 24, backward}, in_place{17, 3, 24, backward, true};
      const std::vector<float> y = run(apart, *t, 1, Source<float>{})[0], x = run(in_place, *t, 2, Source<float>{})[0];
      for (int64_t i = 0; i < 17; ++i) CHECK(same_bits(&y[i * 73], &x[i * 75], 72), t->name, backward, i);
    }
}

TEST(the_backward_is_the_transpose_of_the_forward) {
  const Source<double> in;
  const int64_t n = 5 * 24;
  std::vector<double> x = in(n, 1), y = blank<double>(n), dx = blank<double>(n);
  const std::vector<double> dy = in(n, 2), cosines = in(5 * 4, 3), sines = in(5 * 4, 4);
  const int32_t positions[] = {4, 2, 0, 1, 3};
  float64_table()->rope({5, 3, 8, dy.data(), 24, dx.data(), 24, positions, cosines.data(), sines.data(), true}, 1);
  check_gradient("x", x, dx, [&] {
    float64_table()->rope({5, 3, 8, x.data(), 24, y.data(), 24, positions, cosines.data(), sines.data(), false}, 1);
    return dot(y, dy);
  });
}

TEST(nan_stays_in_its_pair) {
  for (const KernelTable* t : float_tables()) {
    std::vector<float> x(48, 1.0f), y(48);
    x[24 + 5] = kNan<float>;
    const std::vector<float> angle = Source<float>{}(12, 1);
    const int32_t positions[] = {0};
    t->rope({1, 2, 24, x.data(), 48, y.data(), 48, positions, angle.data(), angle.data(), false}, 1);
    for (int i = 0; i < 48; ++i) CHECK(std::isnan(y[i]) == (i == 29 || i == 41), t->name, i, y[i]);
  }
}
