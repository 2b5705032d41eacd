#include <algorithm>

#include "support.h"

using namespace test;

namespace {

struct Case {
  int64_t rows, hidden, vocab;
  double temperature = 1.0;
  bool kept = false;       // logits between forward and backward
  int64_t block_rows = 4;  // when they are computed again
  bool indexed = false;    // row r at place 2 (rows - r) of logprob and entropy
  bool accumulate = true;
  std::string name() const {
    return text(rows, "x", hidden, "x", vocab, "temperature", temperature, "kept", kept, "block", block_rows, "indexed",
                indexed, "accumulate", accumulate);
  }
};

template <class T>
struct Operands {
  int64_t places;  // of logprob, entropy and their gradients
  std::vector<T> x, weight, d_logprob, d_entropy, z, logprob, entropy, lse, dx, dweight;
  std::vector<int32_t> targets, index;

  Operands(const Case& g, const Source<T>& in)
      : places(g.indexed ? 2 * g.rows + 1 : g.rows),
        x(in(g.rows * g.hidden, 1)),
        weight(in(g.vocab * g.hidden, 2)),
        d_logprob(in(places, 3)),
        d_entropy(in(places, 4)),
        z(blank<T>(g.kept ? g.rows * g.vocab : 0)),
        logprob(static_cast<std::size_t>(places), T(kPad)),
        entropy(logprob),
        lse(blank<T>(g.rows)),
        dx(blank<T>(g.rows * g.hidden)),
        dweight(g.accumulate ? in(g.vocab * g.hidden, 5) : blank<T>(g.vocab * g.hidden)) {
    for (int64_t i = 0; i < g.rows; ++i) {
      targets.push_back(int32_t(i % 3 == 2 ? g.vocab - 1 : i * 131 % g.vocab));
      index.push_back(int32_t(g.indexed ? 2 * (g.rows - i) : i));
    }
  }
  int64_t first(const Case& g, int64_t begin) const { return g.indexed ? 0 : begin; }  // place of row `begin` without an index

  // Rows [begin, end).
  void forward(const Case& g, const KernelTable& t, int threads, int64_t begin, int64_t end) {
    LinearLogprob call;
    call.rows = end - begin, call.hidden = g.hidden, call.vocab = g.vocab, call.temperature = g.temperature;
    call.x = x.data() + begin * g.hidden, call.weight = weight.data(), call.targets = targets.data() + begin;
    call.index = g.indexed ? index.data() + begin : nullptr;
    call.z = g.kept ? z.data() + begin * g.vocab : nullptr;
    call.logprob = logprob.data() + first(g, begin), call.entropy = entropy.data() + first(g, begin),
    call.lse = lse.data() + begin;
    t.linear_logprob(call, threads);
  }
  LinearLogprobBackward backward_call(const Case& g, int64_t begin, int64_t end) {
    LinearLogprobBackward call;
    call.rows = end - begin, call.hidden = g.hidden, call.vocab = g.vocab, call.temperature = g.temperature;
    call.x = x.data() + begin * g.hidden, call.weight = weight.data(), call.targets = targets.data() + begin;
    call.index = g.indexed ? index.data() + begin : nullptr;
    call.z = g.kept ? z.data() + begin * g.vocab : nullptr, call.block_rows = g.block_rows;
    call.entropy = entropy.data() + first(g, begin), call.lse = lse.data() + begin;
    call.d_logprob = d_logprob.data() + first(g, begin), call.d_entropy = d_entropy.data() + first(g, begin);
    call.dx = dx.data() + begin * g.hidden, call.dweight = dweight.data(), call.accumulate = g.accumulate;
    return call;
  }
  void backward(const Case& g, const KernelTable& t, int threads, int64_t begin, int64_t end) {
    t.linear_logprob_backward(backward_call(g, begin, end), threads);
  }
  Outputs<T> outputs() const { return {logprob, entropy, lse, dx, dweight}; }
};

template <class T>
Outputs<T> run(const Case& g, const KernelTable& t, int threads, const Source<T>& in) {
  Operands<T> x(g, in);
  x.forward(g, t, threads, 0, g.rows);
  x.backward(g, t, threads, 0, g.rows);
  return x.outputs();
}

std::vector<std::vector<wide>> reference(const Case& g) {
  const Operands<double> x(g, Source<double>{});
  std::vector<std::vector<wide>> out;
  for (const std::vector<double>& start : x.outputs()) out.emplace_back(start.begin(), start.end());
  std::fill(out[3].begin(), out[3].end(), 0);
  if (!g.accumulate) std::fill(out[4].begin(), out[4].end(), 0);
  std::vector<wide> z(static_cast<std::size_t>(g.vocab));
  for (int64_t i = 0; i < g.rows; ++i) {
    wide top = -INFINITY, sum = 0, entropy = 0;
    for (int64_t j = 0; j < g.vocab; ++j) {
      z[j] = 0;
      for (int64_t f = 0; f < g.hidden; ++f) z[j] += wide(x.x[i * g.hidden + f]) * x.weight[j * g.hidden + f];
      z[j] /= g.temperature;
      top = std::max(top, z[j]);
    }
    for (wide v : z) sum += std::exp(v - top);
    const wide lse = top + std::log(sum);
    for (wide v : z) entropy -= std::exp(v - lse) * (v - lse);
    const int64_t at = x.index[i];
    out[0][at] = z[x.targets[i]] - lse, out[1][at] = entropy, out[2][i] = lse;
    for (int64_t j = 0; j < g.vocab; ++j) {
      const wide p = std::exp(z[j] - lse);
      const wide dz =
          (x.d_logprob[at] * ((j == x.targets[i] ? 1 : 0) - p) - x.d_entropy[at] * p * (z[j] - lse + entropy)) / g.temperature;
      for (int64_t f = 0; f < g.hidden; ++f) {
        out[3][i * g.hidden + f] += dz * x.weight[j * g.hidden + f];
        out[4][j * g.hidden + f] += dz * x.x[i * g.hidden + f];
      }
    }
  }
  return out;
}

void check(const Case& g) {
  const char* names[] = {"logprob", "entropy", "lse", "dx", "dweight"};
  const Outputs<double> mine = run(g, *float64_table(), 2, Source<double>{});
  const auto expected = reference(g);
  for (std::size_t i = 0; i < mine.size(); ++i) {
    if (g.vocab == 1 && i != 2 && i != 4) continue;  // exactly 0: below
    CHECK(difference(mine[i], expected[i]) < 1e-12, names[i], g.name(), difference(mine[i], expected[i]));
  }
  if (g.vocab == 1)
    for (std::size_t i : {0, 1, 3})
      for (double v : mine[i]) CHECK(std::fabs(v) < 1e-15, names[i], v);
  same_everywhere([&](const KernelTable& t, int threads, const Source<float>& in) { return run(g, t, threads, in); });
}

}  // namespace

TEST(shapes) {
  for (int64_t vocab : {1, 2, 17, 255, 256, 257, 600})
    for (int64_t rows : {1, 5, 13})
      for (bool kept : {false, true}) check({rows, 24, vocab, 1.0, kept});
  check({7, 1, 300});
  for (bool kept : {false, true}) {
    check({7, 24, 300, 0.7, kept, 3, true});
    check({7, 24, 300, 1.0, kept, 3, false, false});
    check({7, 24, 300, 0.7, kept, 3, true, false});
  }
  check({7, 37, 300, 0.7});
  check({7, 37, 300, 0.7, true});
  check({7, 8, 300, 100.0, true});
  if (!kSmall) {
    check({130, 40, 977, 1.3, true});
    check({130, 40, 977, 1.3, false, 50});
    check({3, 500, 5000});
  }
}

TEST(nothing_to_do_writes_nothing) {
  Case g{0, 4, 5};
  g.rows = 1;
  Operands<float> x(g, {});
  x.forward(g, *scalar_table(), 2, 0, 0);
  x.backward(g, *scalar_table(), 2, 0, 0);
  CHECK(same_bits(x.outputs(), Operands<float>(g, {}).outputs()));
}

TEST(no_rows_have_a_gradient_of_zero) {
  const float x = 0;
  for (const Level& level : levels())
    for (bool accumulate : {false, true}) {
      if (!level.supported) continue;
      std::vector<float> dweight(35, 2.0f);
      LinearLogprobBackward call;
      call.hidden = 5, call.vocab = 7, call.block_rows = 4, call.x = &x, call.weight = dweight.data();
      call.dweight = dweight.data(), call.accumulate = accumulate;
      level.table->linear_logprob_backward(call, 2);
      for (float v : dweight) CHECK(v == (accumulate ? 2.0f : 0.0f), level.table->name, accumulate, v);
    }
}

TEST(gradients_agree_with_central_differences) {
  for (double temperature : {1.0, 0.7}) {
    const Case g{5, 9, 300, temperature};
    Operands<double> x(g, {});
    std::fill(x.dweight.begin(), x.dweight.end(), 0.0);
    x.forward(g, *float64_table(), 1, 0, g.rows);
    x.backward(g, *float64_table(), 1, 0, g.rows);
    auto loss = [&] {
      Operands<double> y = x;
      y.forward(g, *float64_table(), 1, 0, g.rows);
      return dot(y.logprob, y.d_logprob) + dot(y.entropy, y.d_entropy);
    };
    const std::vector<double> dx = x.dx, dweight = x.dweight;
    check_gradient("dx", x.x, dx, loss);
    check_gradient("dweight", x.weight, dweight, loss);
  }
}

TEST(logits_computed_again_in_any_blocks_give_the_bits_of_kept_ones) {
  for (const KernelTable* t : float_tables())
    for (double temperature : {1.0, 0.7})
      for (int64_t vocab : {17, 530}) {
        Case g{13, 24, vocab, temperature, true};
        const Outputs<float> kept = run(g, *t, 1, Source<float>{});
        g.kept = false;
        for (int64_t block : {0, 1, 2, 3, 5, 12, 13, 99})
          for (int threads : {1, 3}) {
            g.block_rows = block;
            CHECK(same_bits(run(g, *t, threads, Source<float>{}), kept), t->name, g.name(), threads);
          }
      }
}

TEST(a_row_alone_has_the_bits_it_has_in_the_batch_and_a_cut_batch_continues_the_chain) {
  for (const KernelTable* t : float_tables())
    for (int options = 0; options < 4; ++options) {
      const Case g{13, 24, 530, 0.7, bool(options & 1), 4, bool(options & 2)};
      Operands<float> all(g, {}), rows(g, {}), reversed(g, {});
      all.forward(g, *t, 2, 0, g.rows);
      all.backward(g, *t, 2, 0, g.rows);
      for (int64_t i = 0; i < g.rows; ++i) rows.forward(g, *t, 1, i, i + 1);
      for (int64_t i = 0; i < g.rows; ++i) rows.backward(g, *t, 1, i, i + 1);
      CHECK(same_bits(all.outputs(), rows.outputs()), t->name, g.name());
      for (int64_t cut : {1, 6, 12}) {
        Operands<float> parts(g, {});
        parts.forward(g, *t, 1, 0, g.rows);
        parts.backward(g, *t, 3, 0, cut);
        parts.backward(g, *t, 1, cut, g.rows);
        CHECK(same_bits(all.outputs(), parts.outputs()), t->name, g.name(), cut);
      }
      reversed.forward(g, *t, 1, 0, g.rows);
      for (int64_t i = g.rows - 1; i >= 0; --i) reversed.backward(g, *t, 1, i, i + 1);
      CHECK(!same_bits(all.dweight, reversed.dweight), "control: the order of rows shows", t->name);
    }
}

TEST(gradients_that_are_not_wanted_may_be_null) {
  for (bool kept : {false, true}) {
    const Case g{7, 24, 300, 1.0, kept};
    const Outputs<float> both = run(g, *scalar_table(), 1, Source<float>{});
    for (bool weight : {false, true}) {
      Operands<float> x(g, {});
      x.forward(g, *scalar_table(), 1, 0, g.rows);
      LinearLogprobBackward call = x.backward_call(g, 0, g.rows);
      (weight ? call.dx : call.dweight) = nullptr;
      scalar_table()->linear_logprob_backward(call, 2);
      CHECK(weight ? same_bits(x.dweight, both[4]) : same_bits(x.dx, both[3]), kept, weight);
    }
  }
}

TEST(large_logits_neither_overflow_nor_lose_the_target) {
  for (const KernelTable* t : float_tables()) {
    const Case g{2, 1, 300};
    Operands<float> x(g, {});
    x.x = {1000, -1000};
    for (int64_t j = 0; j < 300; ++j) x.weight[j] = j == 131 ? 10.0f : float(j) / 300;
    x.targets = {131, 0};
    x.forward(g, *t, 1, 0, 2);
    CHECK(x.logprob[0] == 0 && x.entropy[0] == 0 && x.lse[0] == 10000, t->name, x.logprob[0], x.entropy[0], x.lse[0]);
    CHECK(x.logprob[1] < 0 && x.logprob[1] > -1 && x.entropy[1] > 0, t->name, x.logprob[1], x.entropy[1]);
  }
}

TEST(nan_stays_in_its_row_and_is_never_hidden) {
  for (const KernelTable* t : float_tables())
    for (bool kept : {false, true}) {
      const Case g{7, 24, 530, 1.0, kept};
      Operands<float> clean(g, {}), row(g, {}), column(g, {});
      clean.forward(g, *t, 1, 0, g.rows);
      clean.backward(g, *t, 1, 0, g.rows);
      row.x[3 * 24 + 7] = kNan<float>;
      row.forward(g, *t, 1, 0, g.rows);
      row.backward(g, *t, 1, 0, g.rows);
      for (int64_t i = 0; i < g.rows; ++i)
        for (const auto& [mine, was] :
             {std::pair{&row.logprob, &clean.logprob}, {&row.entropy, &clean.entropy}, {&row.lse, &clean.lse}})
          CHECK(i == 3 ? std::isnan((*mine)[i]) : same_bits(&(*mine)[i], &(*was)[i], 1), t->name, "kept", kept, "row", i,
                (*mine)[i]);
      for (int64_t i = 0; i < g.rows; ++i)
        CHECK(i == 3 ? std::isnan(row.dx[i * 24]) : same_bits(&row.dx[i * 24], &clean.dx[i * 24], 24), t->name, i);
      for (float v : row.dweight) CHECK(std::isnan(v), t->name);
      column.weight[int64_t(t->name[0] == 's' ? 2 : 529) * 24] = kNan<float>;  // one word of the vocabulary: every row
      column.forward(g, *t, 1, 0, g.rows);
      for (int64_t i = 0; i < g.rows; ++i)
        CHECK(std::isnan(column.logprob[i]) && std::isnan(column.entropy[i]) && std::isnan(column.lse[i]), t->name, "row", i,
              column.logprob[i], column.entropy[i], column.lse[i]);
    }
}
