#include <algorithm>
#include <numeric>

#include "core/memory.h"
#include "support.h"

using namespace test;

namespace {

struct Case {
  std::vector<int32_t> lengths;
  int64_t heads, kv_heads, d;
  bool causal = true;
  int64_t window = 0;

  std::vector<int32_t> cu_seqlens() const {
    std::vector<int32_t> ends{0};
    for (int32_t length : lengths) ends.push_back(ends.back() + length);
    return ends;
  }
  double scale() const { return 1 / std::sqrt(double(d)); }
  std::string name() const {
    std::string list;
    for (int32_t length : lengths) list += std::to_string(length) + ",";
    return text("lengths", list, "heads", heads, "/", kv_heads, "d", d, "causal", causal, "window", window);
  }
};

// All rows have pitches of their own. An output's pad holds kPad.
template <class T>
struct Operands {
  std::vector<int32_t> cu_seqlens;
  int64_t tokens, wide_row, narrow_row, wide, narrow;  // of q, o and their gradients; of k, v and theirs
  std::vector<T> q, k, v, d_o, o, lse, dq, dk, dv;

  Operands(const Case& g, const Source<T>& in)
      : cu_seqlens(g.cu_seqlens()), tokens(cu_seqlens.back()), wide(g.heads * g.d), narrow(g.kv_heads * g.d) {
    wide_row = wide + 3, narrow_row = narrow + 1;
    q = in(tokens * wide_row, 1), k = in(tokens * narrow_row, 2), v = in(tokens * narrow_row, 3),
    d_o = in(tokens * wide_row, 4);
    for (T& x : q) x *= 4;  // weights far from uniform
    lse = blank<T>(tokens * g.heads);
    for (std::vector<T>* x : {&o, &dq, &dk, &dv}) {
      const int64_t pitch = x == &o || x == &dq ? wide_row : narrow_row, columns = x == &o || x == &dq ? wide : narrow;
      *x = blank<T>(tokens * pitch);
      for (int64_t i = 0; i < tokens; ++i) std::fill(x->begin() + i * pitch + columns, x->begin() + (i + 1) * pitch, T(kPad));
    }
  }
  AttentionShape shape(const Case& g) const {
    return {int64_t(cu_seqlens.size()) - 1, cu_seqlens.data(), g.heads, g.kv_heads, g.d, g.causal, g.window, g.scale()};
  }
  void forward(const Case& g, const KernelTable& t, int threads) {
    t.flash_attention(
        {shape(g), q.data(), k.data(), v.data(), wide_row, narrow_row, narrow_row, o.data(), wide_row, lse.data()}, threads);
  }
  void backward(const Case& g, const KernelTable& t, int threads) {
    t.flash_attention_backward(
        {shape(g), q.data(), k.data(), v.data(), wide_row, narrow_row, narrow_row, o.data(), lse.data(), d_o.data(), wide_row,
         wide_row, dq.data(), dk.data(), dv.data(), wide_row, narrow_row, narrow_row},
        threads);
  }
  Outputs<T> outputs() const { return {o, lse, dq, dk, dv}; }
};

template <class T>
Outputs<T> run(const Case& g, const KernelTable& t, int threads, const Source<T>& in) {
  Operands<T> x(g, in);
  x.forward(g, t, threads);
  x.backward(g, t, threads);
  return x.outputs();
}

// flash_attention.h's formulas, one pair of (query, key) at a time.
std::vector<std::vector<wide>> reference(const Case& g) {
  const Operands<double> x(g, Source<double>{});
  std::vector<std::vector<wide>> out;
  for (const std::vector<double>& blank_output : x.outputs()) out.emplace_back(blank_output.begin(), blank_output.end());
  auto &o = out[0], &lse = out[1], &dq = out[2], &dk = out[3], &dv = out[4];
  const wide scale = g.scale();
  for (int64_t i = 0; i < x.tokens; ++i) {
    std::fill_n(dq.begin() + i * x.wide_row, x.wide, 0);
    std::fill_n(dk.begin() + i * x.narrow_row, x.narrow, 0);
    std::fill_n(dv.begin() + i * x.narrow_row, x.narrow, 0);
  }
  for (std::size_t s = 0; s < g.lengths.size(); ++s)
    for (int64_t h = 0; h < g.heads; ++h)
      for (int64_t i = 0; i < g.lengths[s]; ++i) {
        const int64_t t0 = x.cu_seqlens[s], kv = h / (g.heads / g.kv_heads) * g.d, at = (t0 + i) * x.wide_row + h * g.d;
        const int64_t begin = g.window > 0 ? std::max<int64_t>(0, i + 1 - g.window) : 0, end = g.causal ? i + 1 : g.lengths[s];
        auto key = [&](int64_t j) { return (t0 + j) * x.narrow_row + kv; };
        std::vector<wide> p(static_cast<std::size_t>(end));
        wide top = -INFINITY, sum = 0, delta = 0;
        for (int64_t j = begin; j < end; ++j) {
          wide score = 0;
          for (int64_t f = 0; f < g.d; ++f) score += wide(x.q[at + f]) * x.k[key(j) + f];
          p[j] = score * scale;
          top = std::max(top, p[j]);
        }
        for (int64_t j = begin; j < end; ++j) sum += std::exp(p[j] - top);
        lse[(t0 + i) * g.heads + h] = top + std::log(sum);
        for (int64_t f = 0; f < g.d; ++f) o[at + f] = 0;
        for (int64_t j = begin; j < end; ++j) {
          p[j] = std::exp(p[j] - top) / sum;
          for (int64_t f = 0; f < g.d; ++f) o[at + f] += p[j] * x.v[key(j) + f];
        }
        for (int64_t f = 0; f < g.d; ++f) delta += x.d_o[at + f] * o[at + f];
        for (int64_t j = begin; j < end; ++j) {
          wide dp = 0;
          for (int64_t f = 0; f < g.d; ++f) dp += wide(x.d_o[at + f]) * x.v[key(j) + f];
          const wide ds = p[j] * (dp - delta) * scale;
          for (int64_t f = 0; f < g.d; ++f) {
            dq[at + f] += ds * x.k[key(j) + f];
            dk[key(j) + f] += ds * x.q[at + f];
            dv[key(j) + f] += p[j] * x.d_o[at + f];
          }
        }
      }
  return out;
}

void check(const Case& g) {
  const char* names[] = {"o", "lse", "dq", "dk", "dv"};
  const auto expected = reference(g);
  for (int threads : {1, 4}) {
    run(g, *float64_table(), threads, Source<double>{true});  // scratch memory full of NaN
    const Outputs<double> mine = run(g, *float64_table(), threads, Source<double>{});
    for (std::size_t i = 0; i < mine.size(); ++i)
      CHECK(difference(mine[i], expected[i]) < 1e-12, names[i], g.name(), "threads", threads, difference(mine[i], expected[i]));
  }
  same_everywhere([&](const KernelTable& t, int threads, const Source<float>& in) { return run(g, t, threads, in); });
}

// Sequence `s` of a batch, copied out of or into all operands.
void copy_sequence(const Case& from_case, const Operands<float>& from, std::size_t from_s, Operands<float>& to,
                   std::size_t to_s) {
  const int64_t a = from.cu_seqlens[from_s], b = to.cu_seqlens[to_s], n = from_case.lengths[from_s];
  std::copy_n(from.q.begin() + a * from.wide_row, n * from.wide_row, to.q.begin() + b * to.wide_row);
  std::copy_n(from.d_o.begin() + a * from.wide_row, n * from.wide_row, to.d_o.begin() + b * to.wide_row);
  std::copy_n(from.k.begin() + a * from.narrow_row, n * from.narrow_row, to.k.begin() + b * to.narrow_row);
  std::copy_n(from.v.begin() + a * from.narrow_row, n * from.narrow_row, to.v.begin() + b * to.narrow_row);
}
Outputs<float> sequence_outputs(const Case& g, const Operands<float>& x, std::size_t s) {
  const int64_t begin = x.cu_seqlens[s], end = x.cu_seqlens[s + 1];
  const int64_t pitches[] = {x.wide_row, g.heads, x.wide_row, x.narrow_row, x.narrow_row};
  Outputs<float> out = x.outputs();
  for (std::size_t i = 0; i < out.size(); ++i)
    out[i] = std::vector<float>(out[i].begin() + begin * pitches[i], out[i].begin() + end * pitches[i]);
  return out;
}
Outputs<float> alone(const Case& g, const Operands<float>& x, std::size_t s, const KernelTable& t, int threads) {
  Case one = g;
  one.lengths = {g.lengths[s]};
  Operands<float> mine(one, {});
  copy_sequence(g, x, s, mine, 0);
  mine.forward(one, t, threads);
  mine.backward(one, t, threads);
  return mine.outputs();
}

}  // namespace

TEST(shapes) {
  for (int64_t d : {8, 24, 64, 128})
    for (int64_t heads : {1, 3}) {
      check({{1}, heads, 1, d});
      check({{17}, heads, 1, d});
      check({{1, 17, 0, 5}, heads, heads, d});
    }
  check({{40, 3}, 4, 2, 16});
  check({{51}, 2, 1, 40});
  check({{0}, 1, 1, 8});
}

TEST(several_key_tiles) {
  check({{130}, 1, 1, 8});
  check({{kSmall ? 150 : 300}, 2, 1, 24});
  if (kSmall) return;
  check({{129, 257, 1, 48, 49}, 3, 1, 8});
  check({{385}, 1, 1, 64});
  check({{200, 200, 7, 100}, 2, 2, 32});
}

TEST(sliding_window) {
  for (int64_t window : {1, 2, 16, 17, 50, 127, 128, 200}) {
    if (kSmall && window != 1 && window != 17 && window != 128) continue;
    check({{17, kSmall ? 140 : 290}, 2, 1, 8, true, window});
    if (!kSmall) check({{60, 31, 1, 100}, 3, 3, 24, true, window});
  }
}

TEST(not_causal) {
  check({{1, 17, 60}, 3, 1, 24, false});
  check({{kSmall ? 140 : 290}, 2, 2, 8, false});
  check({{kSmall ? 140 : 290}, 1, 1, 8, false, 50});
}

TEST(gradients_agree_with_central_differences) {
  for (const Case& g : {Case{{5, 9}, 4, 2, 8}, Case{{13}, 1, 1, 8, true, 4}, Case{{9}, 2, 1, 8, false}}) {
    Operands<double> x(g, {});
    x.forward(g, *float64_table(), 1);
    x.backward(g, *float64_table(), 1);
    auto loss = [&] {
      Operands<double> y = x;
      y.forward(g, *float64_table(), 1);
      double sum = 0;
      for (int64_t i = 0; i < y.tokens; ++i)
        for (int64_t f = 0; f < y.wide; ++f) sum += y.o[i * y.wide_row + f] * y.d_o[i * y.wide_row + f];
      return sum;
    };
    auto without_pad = [&](std::vector<double> gradient, int64_t pitch, int64_t columns) {
      for (int64_t i = 0; i < x.tokens; ++i) std::fill(&gradient[i * pitch + columns], &gradient[i * pitch] + pitch, 0.0);
      return gradient;
    };
    check_gradient("dq", x.q, without_pad(x.dq, x.wide_row, x.wide), loss);
    check_gradient("dk", x.k, without_pad(x.dk, x.narrow_row, x.narrow), loss);
    check_gradient("dv", x.v, without_pad(x.dv, x.narrow_row, x.narrow), loss);
  }
}

TEST(a_sequence_alone_has_the_bits_it_has_among_others_in_any_order) {
  for (const KernelTable* t : float_tables())
    for (int64_t window : {0, 20}) {
      const Case g{{5, kSmall ? 50 : 140, 17, 64}, 4, 2, 24, true, window};
      const Operands<float> x(g, {});
      for (const std::vector<std::size_t>& order : {std::vector<std::size_t>{0, 1, 2, 3}, {3, 2, 1, 0}, {2, 0, 3, 1}}) {
        Case packed = g;
        for (std::size_t s = 0; s < order.size(); ++s) packed.lengths[s] = g.lengths[order[s]];
        Operands<float> y(packed, {});
        for (std::size_t s = 0; s < order.size(); ++s) copy_sequence(g, x, order[s], y, s);
        y.forward(packed, *t, 2);
        y.backward(packed, *t, 2);
        for (std::size_t s = 0; s < order.size(); ++s)
          for (int threads : {1, 3})
            CHECK(same_bits(sequence_outputs(packed, y, s), alone(g, x, order[s], *t, threads)), t->name, packed.name(), s);
      }
    }
}

TEST(a_prefix_has_the_bits_of_the_whole_sequence) {  // what decoding relies on
  const int32_t length = kSmall ? 140 : 200;
  for (const KernelTable* t : float_tables())
    for (int64_t window : {0, 1, 37}) {
      const Case whole{{length}, 2, 1, 24, true, window};
      Operands<float> x(whole, {});
      x.forward(whole, *t, 1);
      for (int32_t end = 1; end < length; end += kSmall ? 46 : 3) {
        const Case prefix{{end}, 2, 1, 24, true, window};
        Operands<float> y(prefix, {});  // numbers are a function of the index: the first `end` rows of x
        y.forward(prefix, *t, 2);
        CHECK(same_bits(y.o.data(), x.o.data(), end * x.wide_row) && same_bits(y.lse.data(), x.lse.data(), end * 2), t->name,
              "window", window, "prefix", end);
      }
    }
}

TEST(a_neighbour_full_of_nan_changes_nothing) {
  for (const KernelTable* t : float_tables())
    for (int threads : {1, 4}) {
      const Case g{{19, 33, 50, 7, 21}, 2, 1, 8};
      Operands<float> x(g, {});
      for (std::size_t s : {1, 3})
        for (int32_t i = x.cu_seqlens[s]; i < x.cu_seqlens[s + 1]; ++i) {
          std::fill_n(&x.q[i * x.wide_row], x.wide_row, kNan<float>);
          std::fill_n(&x.d_o[i * x.wide_row], x.wide_row, kNan<float>);
          std::fill_n(&x.k[i * x.narrow_row], x.narrow_row, kNan<float>);
          std::fill_n(&x.v[i * x.narrow_row], x.narrow_row, kNan<float>);
        }
      x.forward(g, *t, threads);
      x.backward(g, *t, threads);
      for (std::size_t s : {0, 2, 4})
        CHECK(same_bits(sequence_outputs(g, x, s), alone(g, x, s, *t, 1)), t->name, "threads", threads, "sequence", s);
      for (std::size_t s : {1, 3}) {  // and NaN is not hidden where it belongs
        const Outputs<float> mine = sequence_outputs(g, x, s);
        for (const std::vector<float>& values : mine) CHECK(std::isnan(values[0]), t->name, s);
      }
    }
}

TEST(one_nan_is_seen_by_every_later_query) {
  for (const KernelTable* t : float_tables())
    for (bool in_key : {true, false}) {
      const Case g{{40}, 1, 1, 8};
      Operands<float> x(g, {});
      (in_key ? x.k : x.v)[20 * x.narrow_row + 3] = kNan<float>;
      x.forward(g, *t, 1);
      for (int64_t i = 20; i < 40; ++i) {
        CHECK(std::isnan(x.o[i * x.wide_row + 3]), t->name, "key", in_key, "query", i);
        if (in_key) CHECK(std::isnan(x.lse[i]), t->name, "query", i, x.lse[i]);
      }
    }
}

TEST(the_backward_in_one_pass_has_the_bits_of_two_passes) {
  const Case g{{kSmall ? 20 : 130, kSmall ? 60 : 200, 7, 50}, 2, 1, 24};  // 4 tasks: one pass for 1 thread, two for more
  for (const KernelTable* t : float_tables()) {
    Operands<float> x(g, {});
    x.forward(g, *t, 1);
    auto backward = [&](int threads, std::uint64_t* allocations) {
      const std::uint64_t before = memory_use().allocations;
      x.backward(g, *t, threads);
      *allocations = memory_use().allocations - before;
      return x.outputs();
    };
    std::uint64_t one_pass = 0, two_passes = 0;
    const Outputs<float> once = backward(1, &one_pass), twice = backward(2, &two_passes);
    CHECK(one_pass != two_passes, "the two ways are not told apart");
    CHECK(same_bits(once, twice), t->name);
  }
}

TEST(control_another_order_of_keys_gives_other_bits) {
  const Case g{{40}, 1, 1, 8, false};
  Operands<float> x(g, {}), y(g, {});
  for (int64_t i = 0; i < 40; ++i) {
    std::copy_n(&x.k[(39 - i) * x.narrow_row], x.narrow_row, &y.k[i * y.narrow_row]);
    std::copy_n(&x.v[(39 - i) * x.narrow_row], x.narrow_row, &y.v[i * y.narrow_row]);
  }
  x.forward(g, *scalar_table(), 1);
  y.forward(g, *scalar_table(), 1);
  CHECK(!same_bits(x.o, y.o));
}
