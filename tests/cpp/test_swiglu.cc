#include <algorithm>

#include "support.h"

using namespace test;

namespace {

struct Case {
  int64_t rows, columns;
};

template <class T>
Outputs<T> run(const Case& g, const KernelTable& t, int threads, const Source<T>& in) {
  // gate and up are the halves of one matrix, as the transformer has them
  const int64_t in_row = 2 * g.columns + 1, y_row = g.columns + 2;
  std::vector<T> x = in(g.rows * in_row, 1), dy = in(g.rows * y_row, 2);
  for (T& v : x) v *= 6;
  std::vector<T> y(static_cast<std::size_t>(g.rows * y_row), T(kPad)), dx(x.size(), T(kPad));
  t.swiglu({g.rows, g.columns, x.data(), x.data() + g.columns, in_row, y.data(), y_row}, threads);
  t.swiglu_backward(
      {g.rows, g.columns, x.data(), x.data() + g.columns, in_row, dy.data(), y_row, dx.data(), dx.data() + g.columns, in_row},
      threads);
  return {y, dx};
}

void check(const Case& g) {
  const Source<double> in;
  const int64_t in_row = 2 * g.columns + 1, y_row = g.columns + 2;
  const std::vector<double> x = in(g.rows * in_row, 1), dy = in(g.rows * y_row, 2);
  std::vector<wide> y(dy.size(), kPad), dx(x.size(), kPad);
  for (int64_t i = 0; i < g.rows; ++i)
    for (int64_t j = 0; j < g.columns; ++j) {
      const int64_t gate_at = i * in_row + j, up_at = gate_at + g.columns;
      const wide gate = 6 * wide(x[gate_at]), up = 6 * wide(x[up_at]), s = 1 / (1 + std::exp(-gate)), slope = dy[i * y_row + j];
      y[i * y_row + j] = gate * s * up;
      dx[gate_at] = slope * up * s * (1 + gate * (1 - s));
      dx[up_at] = slope * gate * s;
    }
  const Outputs<double> mine = run(g, *float64_table(), 2, in);
  CHECK(difference(mine[0], y) < 1e-13, g.rows, g.columns, difference(mine[0], y));
  CHECK(difference(mine[1], dx) < 1e-13, g.rows, g.columns, difference(mine[1], dx));
  same_everywhere(
      [&](const KernelTable& t, int threads, const Source<float>& in_float) { return run(g, t, threads, in_float); });
}

}  // namespace

TEST(shapes) {
  for (int64_t rows : {1, 2, 13})
    for (int64_t columns : {1, 15, 16, 17, 100}) check({rows, columns});
  check({0, 5});
}

TEST(gradients_agree_with_central_differences) {
  std::vector<double> gate = Source<double>{}(30, 1), up = Source<double>{}(30, 2), y = blank<double>(30);
  const std::vector<double> dy = Source<double>{}(30, 3);
  std::vector<double> d_gate = y, d_up = y;
  float64_table()->swiglu_backward({3, 10, gate.data(), up.data(), 10, dy.data(), 10, d_gate.data(), d_up.data(), 10}, 1);
  auto loss = [&] {
    float64_table()->swiglu({3, 10, gate.data(), up.data(), 10, y.data(), 10}, 1);
    return dot(y, dy);
  };
  check_gradient("gate", gate, d_gate, loss);
  check_gradient("up", up, d_up, loss);
}

TEST(nan_stays_nan_and_large_gates_saturate) {
  for (const KernelTable* t : float_tables()) {
    const float gate[] = {kNan<float>, 1, 200, -200}, up[] = {1, kNan<float>, 3, 3};
    float y[4];
    t->swiglu({1, 4, gate, up, 4, y, 4}, 1);
    CHECK(std::isnan(y[0]) && std::isnan(y[1]) && y[2] == 600 && y[3] == 0, t->name, y[0], y[1], y[2], y[3]);
  }
}
