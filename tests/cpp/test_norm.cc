// rms_norm, layer_norm and column_sum.
#include <algorithm>

#include "support.h"

using namespace test;

namespace {

struct Case {
  bool layer;  // LayerNorm; else RMSNorm
  int64_t tokens, groups, d;
  bool gather = false, residual = false, accumulate = false;
  std::string name() const {
    return text(layer ? "layer_norm" : "rms_norm", tokens, groups, d, "gather", gather, "residual", residual, "accumulate",
                accumulate);
  }
};
constexpr double kEps = 1e-5;

template <class T>
struct Operands {
  int64_t width, x_row, y_row, sources;
  std::vector<int32_t> gather;
  std::vector<T> x, residual, weight, bias, dy, sum, y, mean, rstd, dx, dweight, dbias;

  Operands(const Case& g, const Source<T>& in) : width(g.groups * g.d), x_row(width + 3), y_row(width + 1) {
    sources = g.gather ? 2 * g.tokens + 1 : g.tokens;
    for (int64_t t = 0; g.gather && t < g.tokens; ++t)
      gather.push_back(int32_t(sources - 1 - 2 * t));  // every other row, backwards
    x = in(sources * x_row, 1), residual = in(sources * x_row, 2), weight = in(g.d, 3), bias = in(g.d, 4);
    dy = in(g.tokens * y_row, 5), dweight = in(g.d, 6), dbias = in(g.d, 7);
    dx = in(sources * x_row, 8);
    sum = std::vector<T>(x.size(), T(kPad)), y = std::vector<T>(dy.size(), T(kPad));
    mean = rstd = blank<T>(g.tokens * g.groups);
    for (int64_t s = 0; s < sources; ++s) std::fill_n(&dx[s * x_row + width], 3, T(kPad));
  }
  int64_t source(int64_t t) const { return gather.empty() ? t : gather[t]; }

  // Tokens [begin, end) of the batch.
  void run(const Case& g, const KernelTable& t, int threads, int64_t begin, int64_t end) {
    forward(g, t, threads, begin, end);
    backward(g, t, threads, begin, end);
  }
  void forward(const Case& g, const KernelTable& t, int threads, int64_t begin, int64_t end) {
    const int32_t* from = g.gather ? gather.data() + begin : nullptr;
    const int64_t first = g.gather ? 0 : begin * x_row;
    const T* added = g.residual ? residual.data() + first : nullptr;
    T* statistics = rstd.data() + begin * g.groups;
    if (g.layer)
      t.layer_norm({end - begin, g.d, x.data() + first, x_row, from, added, sum.data() + first, weight.data(), bias.data(),
                    kEps, y.data() + begin * y_row, y_row, mean.data() + begin, statistics},
                   threads);
    else
      t.rms_norm({end - begin, g.groups, g.d, x.data() + first, x_row, from, added, sum.data() + first, weight.data(), kEps,
                  y.data() + begin * y_row, y_row, statistics},
                 threads);
  }
  void backward(const Case& g, const KernelTable& t, int threads, int64_t begin, int64_t end) {
    const int32_t* from = g.gather ? gather.data() + begin : nullptr;
    const int64_t first = g.gather ? 0 : begin * x_row;
    const T* input = (g.residual ? sum : x).data() + first;
    if (g.layer)
      t.layer_norm_backward(
          {end - begin, g.d, input, x_row, from, weight.data(), mean.data() + begin, rstd.data() + begin,
           dy.data() + begin * y_row, y_row, dx.data() + first, x_row, g.accumulate, dweight.data(), dbias.data()},
          threads);
    else
      t.rms_norm_backward({end - begin, g.groups, g.d, input, x_row, from, weight.data(), rstd.data() + begin * g.groups,
                           dy.data() + begin * y_row, y_row, dx.data() + first, x_row, g.accumulate, dweight.data()},
                          threads);
  }
  Outputs<T> outputs() const { return {sum, y, mean, rstd, dx, dweight, dbias}; }
};

template <class T>
Outputs<T> run(const Case& g, const KernelTable& t, int threads, const Source<T>& in) {
  Operands<T> x(g, in);
  x.run(g, t, threads, 0, g.tokens);
  return x.outputs();
}

std::vector<std::vector<wide>> reference(const Case& g) {
  const Operands<double> x(g, Source<double>{});
  std::vector<std::vector<wide>> out;
  for (const std::vector<double>& start : x.outputs()) out.emplace_back(start.begin(), start.end());
  auto &sum = out[0], &y = out[1], &mean = out[2], &rstd = out[3], &dx = out[4], &dweight = out[5], &dbias = out[6];
  for (int64_t row = 0; row < g.tokens * g.groups; ++row) {
    const int64_t t = row / g.groups, inner = row % g.groups * g.d, at = x.source(t) * x.x_row + inner,
                  to = t * x.y_row + inner;
    std::vector<wide> v(static_cast<std::size_t>(g.d));
    wide m = 0, squares = 0, mean_w = 0, mean_wh = 0;
    for (int64_t j = 0; j < g.d; ++j) {
      v[j] = wide(x.x[at + j]) + (g.residual ? wide(x.residual[at + j]) : 0);
      if (g.residual) sum[at + j] = v[j];
      m += v[j] / g.d;
    }
    if (!g.layer) m = 0;
    for (wide e : v) squares += (e - m) * (e - m) / g.d;
    const wide r = 1 / std::sqrt(squares + wide(kEps));
    rstd[row] = r;
    if (g.layer) mean[row] = m;
    for (int64_t j = 0; j < g.d; ++j) {
      const wide h = (v[j] - m) * r, w = wide(x.dy[to + j]) * x.weight[j];
      y[to + j] = h * x.weight[j] + (g.layer ? wide(x.bias[j]) : 0);
      if (g.layer) mean_w += w / g.d;
      mean_wh += w * h / g.d;
      dweight[j] += x.dy[to + j] * h;
      if (g.layer) dbias[j] += x.dy[to + j];
    }
    for (int64_t j = 0; j < g.d; ++j) {
      const wide slope = r * (wide(x.dy[to + j]) * x.weight[j] - mean_w - (v[j] - m) * r * mean_wh);
      dx[at + j] = (g.accumulate ? dx[at + j] : 0) + slope;
    }
  }
  return out;
}

void check(const Case& g) {
  const char* names[] = {"sum", "y", "mean", "rstd", "dx", "dweight", "dbias"};
  const Outputs<double> mine = run(g, *float64_table(), 2, Source<double>{});
  const auto expected = reference(g);
  for (std::size_t i = 0; i < mine.size(); ++i) {
    if (i == 2 && !g.layer) continue;
    CHECK(difference(mine[i], expected[i]) < 1e-12, names[i], g.name(), difference(mine[i], expected[i]));
  }
  same_everywhere([&](const KernelTable& t, int threads, const Source<float>& in) { return run(g, t, threads, in); });
}

// One token (and one group) of width 1 has an exact answer that a mean over 1 must not lose.
const Case kCases[] = {{true, 13, 1, 37}, {false, 13, 1, 37}, {false, 9, 3, 24}};

}  // namespace

TEST(shapes) {
  for (bool layer : {false, true})
    for (int64_t tokens : {1, 2, 13})
      for (int64_t d : {3, 8, 16, 17, 64, 100}) {
        for (int options = 0; options < 8; ++options)
          check({layer, tokens, 1, d, bool(options & 1), bool(options & 2), bool(options & 4)});
        if (!layer) check({false, tokens, 3, d, false, false, true});
      }
  if (!kSmall) check({false, 100, 1, 768}), check({true, 100, 1, 768});
  check({false, 0, 1, 8}), check({true, 0, 1, 8});
}

TEST(gradients_agree_with_central_differences) {
  for (const Case& base : kCases)
    for (bool gather : {false, true}) {
      Case g = base;
      g.gather = gather;
      Operands<double> x(g, {});
      for (std::vector<double>* start : {&x.dx, &x.dweight, &x.dbias}) std::fill(start->begin(), start->end(), 0.0);
      x.run(g, *float64_table(), 1, 0, g.tokens);
      auto loss = [&] {
        Operands<double> y = x;
        y.forward(g, *float64_table(), 1, 0, g.tokens);
        double sum = 0;
        for (int64_t t = 0; t < g.tokens; ++t)
          for (int64_t j = 0; j < y.width; ++j) sum += y.y[t * y.y_row + j] * y.dy[t * y.y_row + j];
        return sum;
      };
      const std::vector<double> dx = x.dx, dweight = x.dweight, dbias = x.dbias;
      check_gradient("dx", x.x, dx, loss);
      check_gradient("dweight", x.weight, dweight, loss);
      if (g.layer) check_gradient("dbias", x.bias, dbias, loss);
    }
}

TEST(a_row_alone_has_the_bits_it_has_in_the_batch) {
  for (const KernelTable* t : float_tables())
    for (Case g : kCases) {
      g.residual = true;
      Operands<float> all(g, {}), rows(g, {});
      all.run(g, *t, 2, 0, g.tokens);
      for (int64_t i = g.tokens - 1; i >= 0; --i) rows.run(g, *t, 1, i, i + 1);
      CHECK(same_bits(all.sum, rows.sum) && same_bits(all.y, rows.y) && same_bits(all.rstd, rows.rstd) &&
                same_bits(all.dx, rows.dx) && same_bits(all.mean, rows.mean),
            t->name, g.name());
    }
}

TEST(weight_gradients_of_a_cut_batch_continue_the_chain) {
  for (const KernelTable* t : float_tables())
    for (Case g : kCases)
      for (bool gather : {false, true})
        for (int64_t cut : {1, 5, 8}) {
          g.gather = gather;
          Operands<float> whole(g, {}), parts(g, {});
          whole.run(g, *t, 1, 0, g.tokens);
          parts.run(g, *t, 2, 0, cut);
          parts.run(g, *t, 3, cut, g.tokens);
          CHECK(same_bits(whole.outputs(), parts.outputs()), t->name, g.name(), cut);
        }
}

TEST(control_another_order_of_tokens_gives_other_bits) {
  for (const Case& g : kCases) {
    Operands<float> forward(g, {}), backward(g, {});
    forward.run(g, *scalar_table(), 1, 0, g.tokens);
    for (int64_t i = g.tokens - 1; i >= 0; --i) backward.run(g, *scalar_table(), 1, i, i + 1);
    CHECK(!same_bits(forward.dweight, backward.dweight), g.name());
  }
}

TEST(gradients_that_are_not_wanted_may_be_null) {
  for (const Case& g : kCases) {
    Operands<float> all(g, {}), some(g, {});
    all.run(g, *scalar_table(), 1, 0, g.tokens);
    some.forward(g, *scalar_table(), 1, 0, g.tokens);
    if (g.layer)
      scalar_table()->layer_norm_backward(
          {g.tokens, g.d, some.x.data(), some.x_row, nullptr, some.weight.data(), some.mean.data(), some.rstd.data(),
           some.dy.data(), some.y_row, some.dx.data(), some.x_row, false, nullptr, nullptr},
          1);
    else
      scalar_table()->rms_norm_backward(
          {g.tokens, g.groups, g.d, some.x.data(), some.x_row, nullptr, some.weight.data(), some.rstd.data(), some.dy.data(),
           some.y_row, some.dx.data(), some.x_row, false, nullptr},
          1);
    CHECK(same_bits(all.dx, some.dx), g.name());
  }
}

TEST(nan_stays_in_its_row_and_reaches_the_weights) {
  for (const KernelTable* t : float_tables())
    for (const Case& g : kCases) {
      Operands<float> clean(g, {}), dirty(g, {});
      clean.run(g, *t, 1, 0, g.tokens);
      dirty.x[4 * dirty.x_row + 1] = kNan<float>;
      dirty.run(g, *t, 2, 0, g.tokens);
      for (int64_t i = 0; i < g.tokens; ++i)
        if (i != 4)
          CHECK(same_bits(&clean.y[i * clean.y_row], &dirty.y[i * dirty.y_row], clean.width) &&
                    same_bits(&clean.dx[i * clean.x_row], &dirty.dx[i * dirty.x_row], clean.width),
                t->name, g.name(), i);
      for (int64_t j = 0; j < g.d; ++j)
        CHECK(std::isnan(dirty.y[4 * dirty.y_row + j]) && std::isnan(dirty.dx[4 * dirty.x_row + j]) &&
                  std::isnan(dirty.dweight[j]),
              t->name, g.name(), j);
    }
}

TEST(column_sum_is_one_chain_a_column) {
  for (int64_t rows : {0, 1, 13})
    for (int64_t d : {1, 15, 16, 63, 64, 65, 200}) {
      auto run_sum = [&](const KernelTable& t, int threads, const Source<float>& in) {
        std::vector<float> out = in(d, 2);
        t.column_sum({rows, d, in(rows * (d + 3), 1).data(), d + 3, out.data()}, threads);
        return Outputs<float>{out};
      };
      const Outputs<float> mine = same_everywhere(run_sum);
      const std::vector<float> x = Source<float>{}(rows * (d + 3), 1);
      std::vector<float> expected = Source<float>{}(d, 2), cut = expected, reversed = expected;
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < d; ++j) {
          expected[j] += x[i * (d + 3) + j];
          reversed[j] += x[(rows - 1 - i) * (d + 3) + j];
        }
      CHECK(same_bits(mine[0], expected), rows, d);
      if (rows == 0) continue;
      scalar_table()->column_sum({rows / 2, d, x.data(), d + 3, cut.data()}, 1);
      scalar_table()->column_sum({rows - rows / 2, d, &x[rows / 2 * (d + 3)], d + 3, cut.data()}, 2);
      CHECK(same_bits(cut, expected), rows, d);
      if (rows > 1 && d > 15) CHECK(!same_bits(reversed, expected), "control: the order shows", rows, d);
    }
}
