#include <algorithm>

#include "support.h"

using namespace test;

namespace {

struct Case {
  int64_t m, n, k;
  Activation activation = Activation::none;
  bool a_transposed = false, b_transposed = false, accumulate = false, bias = false, residual = false;
  double scale = 1;

  bool gated() const { return activation == Activation::swiglu || activation == Activation::swiglu_backward; }
  bool backward() const { return activation >= Activation::gelu_backward; }
  int64_t features() const { return activation == Activation::swiglu ? n / 2 : n; }  // columns of `activated`
  int64_t c_columns() const { return activation == Activation::swiglu_backward ? 2 * n : n; }
  std::string name() const {
    return text(m, "x", n, "x", k, "activation", int(activation), "layouts", a_transposed, b_transposed, "accumulate",
                accumulate, "bias", bias, "residual", residual, "scale", scale);
  }
};

template <class T>
struct Operands {
  std::vector<T> a, b, bias, residual, pre, c, activated;
  int64_t a_row, a_col, b_row, b_col, residual_row, pre_row, c_row, activated_row;

  Operands(const Case& g, const Source<T>& in) {
    auto lay_out = [](bool transposed, int64_t rows, int64_t columns, int64_t* row, int64_t* column) {
      *row = transposed ? 1 : columns + 3, *column = transposed ? rows + 3 : 1;
      return (rows + 3) * (columns + 3);
    };
    a = in(lay_out(g.a_transposed, g.m, g.k, &a_row, &a_col), 1);
    b = in(lay_out(g.b_transposed, g.k, g.n, &b_row, &b_col), 2);
    bias = in(g.n, 3);
    residual = in(g.m * (residual_row = g.n + 1), 4);
    pre = in(g.m * (pre_row = 2 * g.n + 1), 5);
    c_row = g.c_columns() + 5, activated_row = g.features() + 5;
    c = g.accumulate ? in(g.m * c_row, 6) : blank<T>(g.m * c_row);
    activated = blank<T>(g.m * activated_row);
    for (int64_t i = 0; i < g.m; ++i) {
      std::fill_n(c.begin() + i * c_row + g.c_columns(), 5, T(kPad));
      std::fill_n(activated.begin() + i * activated_row + g.features(), 5, T(kPad));
    }
  }
  Matmul call(const Case& g) {
    Matmul call;
    call.m = g.m, call.n = g.n, call.k = g.k;
    call.a = a.data(), call.a_row = a_row, call.a_col = a_col;
    call.b = b.data(), call.b_row = b_row, call.b_col = b_col;
    call.c = c.data(), call.c_row = c_row, call.accumulate = g.accumulate, call.scale = g.scale;
    if (g.bias) call.bias = bias.data();
    if (g.residual) call.residual = residual.data(), call.residual_row = residual_row;
    call.activation = g.activation, call.activated = activated.data(), call.activated_row = activated_row;
    call.pre = pre.data(), call.pre_row = pre_row;
    return call;
  }
};

template <class T>
Outputs<T> run(const Case& g, const KernelTable& t, int threads, const Source<T>& in) {
  Operands<T> x(g, in);
  t.matmul(x.call(g), threads);
  return {x.c, x.activated};
}

wide sigmoid(wide x) { return 1 / (1 + std::exp(-x)); }
wide gelu(wide x, bool erf) {
  if (erf) return x * std::erfc(-x / std::sqrt(2.0L)) / 2;
  return 0.5L * x * (1 + std::tanh(std::sqrt(2 / 3.14159265358979323846L) * (x + 0.044715L * x * x * x)));
}
wide gelu_slope(wide x, bool erf) {
  const wide pi = 3.14159265358979323846L;
  if (erf) return std::erfc(-x / std::sqrt(2.0L)) / 2 + x * std::exp(-x * x / 2) / std::sqrt(2 * pi);
  const wide c = std::sqrt(2 / pi), t = std::tanh(c * (x + 0.044715L * x * x * x));
  return 0.5L * (1 + t) + 0.5L * x * (1 - t * t) * c * (1 + 3 * 0.044715L * x * x);
}

// matmul.h's formula, element by element.
std::vector<std::vector<wide>> reference(const Case& g) {
  const Operands<double> x(g, Source<double>{});
  std::vector<std::vector<wide>> out{{x.c.begin(), x.c.end()}, {x.activated.begin(), x.activated.end()}};
  for (int64_t i = 0; i < g.m; ++i) {
    auto c = out[0].begin() + i * x.c_row, activated = out[1].begin() + i * x.activated_row;
    for (int64_t j = 0; j < g.n; ++j) {
      wide sum = g.accumulate ? c[j] : 0;
      for (int64_t p = 0; p < g.k; ++p)
        sum += static_cast<wide>(x.a[i * x.a_row + p * x.a_col]) * x.b[p * x.b_row + j * x.b_col];
      sum *= g.scale;
      if (g.bias) sum += x.bias[j];
      if (g.residual) sum += x.residual[i * x.residual_row + j];
      const bool erf = g.activation == Activation::gelu_erf || g.activation == Activation::gelu_erf_backward;
      const wide pre = x.pre[i * x.pre_row + j], up = x.pre[i * x.pre_row + (g.gated() ? g.n : 0) + j], s = sigmoid(pre);
      switch (g.activation) {
        case Activation::none:
        case Activation::swiglu:
          c[j] = sum;
          break;
        case Activation::gelu:
        case Activation::gelu_erf:
          c[j] = sum;
          activated[j] = gelu(sum, erf);
          break;
        case Activation::gelu_backward:
        case Activation::gelu_erf_backward:
          c[j] = sum * gelu_slope(pre, erf);
          activated[j] = gelu(pre, erf);
          break;
        case Activation::swiglu_backward:
          c[j] = sum * up * s * (1 + pre * (1 - s));
          c[g.n + j] = sum * pre * s;
          activated[j] = pre * s * up;
          break;
      }
    }
    if (g.activation == Activation::swiglu)
      for (int64_t j = 0; j < g.n / 2; ++j) activated[j] = c[j] * sigmoid(c[j]) * c[g.n / 2 + j];
  }
  return out;
}

void check(const Case& g) {
  Outputs<double> mine = run(g, *float64_table(), 2, Source<double>{});
  const auto expected = reference(g);
  CHECK(difference(mine[0], expected[0]) < 1e-12, g.name(), difference(mine[0], expected[0]));
  if (g.activation == Activation::none)
    CHECK(std::isnan(mine[1][0]), g.name());  // not asked for: not written
  else
    CHECK(difference(mine[1], expected[1]) < 1e-12, g.name(), difference(mine[1], expected[1]));
  same_everywhere([&](const KernelTable& t, int threads, const Source<float>& in) { return run(g, t, threads, in); });
}

constexpr Case kOdd{13, 37, 29};

}  // namespace

TEST(shapes_and_layouts) {
  std::vector<Case> shapes = {{1, 1, 1},  {1, 16, 4},  {1, 50, 33},  {2, 17, 3},   {5, 15, 17}, {6, 16, 16},
                              {7, 33, 5}, {12, 64, 7}, {13, 130, 9}, {24, 48, 64}, {97, 31, 20}};
  if (!kSmall) shapes.insert(shapes.end(), {{13, 33, 385}, {200, 300, 70}, {9, 1100, 12}});
  for (Case g : shapes)
    for (int layouts = 0; layouts < 4; ++layouts) {
      g.a_transposed = layouts & 1, g.b_transposed = layouts & 2;
      for (bool accumulate : {false, true}) {
        g.accumulate = accumulate;
        check(g);
      }
    }
}

TEST(shapes_beyond_every_block) {  // of rows, of k, of packed B, and an A too large to be kept
  if (kSmall) {
    check({100, 20, 400});
    return;
  }
  check({3, 1040, 1300});
  check({3, 1040, 3000});
  check({3, 500, 5000});
  check({1300, 40, 3, Activation::none, true, false, true});
  check({1100, 17, 1000});
  check({3, 1040, 1300, Activation::gelu_backward});
  check({100, 1200, 800, Activation::swiglu});
}

TEST(epilogues) {
  for (int activation = 0; activation <= int(Activation::swiglu_backward); ++activation)
    for (int64_t m : {1, 13})
      for (int64_t n : {2, 34, 62, 300}) {
        if (kSmall && n == 300) continue;
        Case g{m, n, 21, static_cast<Activation>(activation)};
        for (int extras = 0; extras < 4; ++extras) {
          g.bias = extras & 1, g.residual = extras & 2, g.b_transposed = extras & 1;
          if (g.bias && g.backward()) continue;
          if (g.residual && g.activation == Activation::swiglu) continue;
          check(g);
        }
      }
}

TEST(a_scale_multiplies_the_finished_sum) {
  for (int64_t m : {1, 13})
    for (int64_t n : {2, 48, 300})
      for (bool accumulate : {false, true}) check({m, n, 21, Activation::none, false, true, accumulate, false, false, 1.7});
}

// What comes through an adapter on its way back: written where the activated values will be.
TEST(a_residual_may_lie_where_the_activated_values_go) {
  for (const KernelTable* t : float_tables())
    for (Activation activation : {Activation::gelu_backward, Activation::gelu_erf_backward, Activation::swiglu_backward})
      for (int threads : {1, 3}) {
        Case g{29, 70, 100, activation};
        g.residual = true;
        Operands<float> apart(g, {}), together(g, {});
        t->matmul(apart.call(g), threads);
        Matmul call = together.call(g);
        for (int64_t i = 0; i < g.m; ++i)
          std::copy_n(&together.residual[i * together.residual_row], g.n, &together.activated[i * together.activated_row]);
        call.residual = call.activated, call.residual_row = call.activated_row;
        t->matmul(call, threads);
        CHECK(same_bits(apart.c, together.c) && same_bits(apart.activated, together.activated), t->name, g.name());
      }
}

TEST(a_fused_activation_has_the_bits_of_the_separate_kernel) {
  for (const KernelTable* t : float_tables()) {
    for (bool erf : {false, true}) {
      Case g = kOdd;
      g.activation = erf ? Activation::gelu_erf : Activation::gelu, g.bias = true;
      Operands<float> x(g, {});
      t->matmul(x.call(g), 1);
      for (int64_t i = 0; i < g.m; ++i) {
        std::vector<float> y = blank<float>(g.n);
        t->gelu({g.n, &x.c[i * x.c_row], y.data(), erf}, 1);
        CHECK(same_bits(y.data(), &x.activated[i * x.activated_row], g.n), t->name, erf, i);
      }
    }
    Case g{13, 74, 29, Activation::swiglu};
    Operands<float> x(g, {});
    t->matmul(x.call(g), 1);
    std::vector<float> y = blank<float>(g.m * 37);
    t->swiglu({g.m, 37, x.c.data(), x.c.data() + 37, x.c_row, y.data(), 37}, 1);
    for (int64_t i = 0; i < g.m; ++i) CHECK(same_bits(&y[i * 37], &x.activated[i * x.activated_row], 37), t->name, i);
  }
}

TEST(a_row_alone_has_the_bits_it_has_in_the_batch) {
  for (const KernelTable* t : float_tables())
    for (Activation activation : {Activation::none, Activation::gelu, Activation::swiglu_backward})
      for (bool transposed : {false, true}) {
        Case g{29, 70, 100, activation, transposed, !transposed};
        g.residual = activation == Activation::none;
        Operands<float> all(g, {}), one(g, {});
        t->matmul(all.call(g), 1);
        for (int64_t i = 0; i < g.m; ++i) {
          Matmul call = one.call(g);
          call.m = 1;
          call.a = &one.a[i * one.a_row];
          call.c = &one.c[i * one.c_row];
          call.activated = &one.activated[i * one.activated_row];
          call.pre = &one.pre[i * one.pre_row];
          if (g.residual) call.residual = &one.residual[i * one.residual_row];
          t->matmul(call, 1);
        }
        CHECK(same_bits(all.c, one.c) && same_bits(all.activated, one.activated), t->name, g.name());
      }
}

TEST(k_cut_into_accumulating_calls_continues_every_chain) {
  for (const KernelTable* t : float_tables())
    for (int layouts = 0; layouts < 4; ++layouts)
      for (int64_t cut : {1, 10, 50, 99}) {
        Case g{13, 37, 100, Activation::none, bool(layouts & 1), bool(layouts & 2), true};
        Operands<float> whole(g, {}), parts(g, {});
        t->matmul(whole.call(g), 1);
        Matmul call = parts.call(g);
        call.k = cut;
        t->matmul(call, 2);
        call.k = g.k - cut;
        call.a = &parts.a[cut * parts.a_col];
        call.b = &parts.b[cut * parts.b_row];
        t->matmul(call, 3);
        CHECK(same_bits(whole.c, parts.c), t->name, g.name(), cut);
      }
}

TEST(control_another_order_of_k_gives_other_bits) {
  Case g{13, 37, 100};
  Operands<float> forward(g, {}), reversed(g, {});
  scalar_table()->matmul(forward.call(g), 1);
  Matmul call = reversed.call(g);
  std::vector<float> a = reversed.a, b = reversed.b;
  for (int64_t p = 0; p < g.k; ++p) {
    for (int64_t i = 0; i < g.m; ++i) a[i * reversed.a_row + p] = reversed.a[i * reversed.a_row + g.k - 1 - p];
    for (int64_t j = 0; j < g.n; ++j) b[p * reversed.b_row + j] = reversed.b[(g.k - 1 - p) * reversed.b_row + j];
  }
  call.a = a.data(), call.b = b.data();
  scalar_table()->matmul(call, 1);
  CHECK(!same_bits(forward.c, reversed.c));
}

TEST(nan_stays_in_its_row_and_its_column) {
  for (const KernelTable* t : float_tables()) {
    Operands<float> clean(kOdd, {}), dirty(kOdd, {});
    t->matmul(clean.call(kOdd), 1);
    dirty.a[4 * dirty.a_row + 28] = kNan<float>;
    dirty.b[11 * dirty.b_row + 36] = kNan<float>;
    t->matmul(dirty.call(kOdd), 1);
    for (int64_t i = 0; i < kOdd.m; ++i)
      for (int64_t j = 0; j < kOdd.n; ++j) {
        const float *was = &clean.c[i * clean.c_row + j], *is = &dirty.c[i * dirty.c_row + j];
        CHECK(i == 4 || j == 36 ? std::isnan(*is) : same_bits(was, is, 1), t->name, i, j, *is);
      }
  }
}

TEST(nothing_to_do_writes_nothing) {
  for (Case g : {Case{0, 5, 3}, Case{5, 0, 3}}) {
    Operands<float> x(g, {});
    const std::vector<float> before = x.c;
    scalar_table()->matmul(x.call(g), 2);
    CHECK(same_bits(before, x.c), g.name());
  }
}

// Whatever the rows, the bits of the product with the plain matrix; with bfloat16 panels, of the plain matrix rounded to it.
TEST(a_packed_weight_gives_the_bits_of_the_plain_one) {
  for (int64_t m : {1, 2, 7, 12, 13, 25, 40, 300})
    for (auto [n, k] : {std::pair<int64_t, int64_t>{50, 23}, {576, 130}, {34, 800}})
      for (Activation activation : {Activation::none, Activation::gelu, Activation::swiglu})
        for (bool transposed : {false, true})
          for (bool half : {false, true}) {
            if (kSmall && m != 1 && m != 13 && (m > 25 || n != 50)) continue;
            Case g{m, n, k, activation, false, transposed};
            g.accumulate = half != transposed, g.bias = n == 50, g.residual = n == 34 && activation == Activation::none;
            auto rounded = [&](const Source<float>& in) {
              Operands<float> x(g, in);
              for (float& value : x.b) {
                std::uint32_t bits;
                std::memcpy(&bits, &value, sizeof bits);
                bits = half ? bits & 0xffff0000u : bits;
                std::memcpy(&value, &bits, sizeof bits);
              }
              return x;
            };
            Operands<float> plain = rounded(Source<float>{});
            scalar_table()->matmul(plain.call(g), 1);
            for (const KernelTable* t : float_tables())
              for (int threads : {1, 3}) {
                Operands<float> x = rounded(Source<float>{});
                const bool gate_up = activation == Activation::swiglu;
                std::vector<float> panels = blank<float>(packed_weight_elements(n, k, gate_up));
                Matmul call = x.call(g);
                t->pack_weight({n, k, call.b, call.b_row, call.b_col, gate_up, half, panels.data()}, threads);
                call.b = nullptr, call.packed = panels.data(), call.packed_half = half;
                t->matmul(call, threads);
                CHECK(same_bits(x.c, plain.c) && same_bits(x.activated, plain.activated), g.name(), t->name, "half", half,
                      "threads", threads);
              }
          }
}
