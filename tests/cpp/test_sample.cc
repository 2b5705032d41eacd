#include <algorithm>
#include <map>

#include "support.h"

namespace tutelage {
const KernelTable* other_tiles_table();  // other_tiles.cc
}

using namespace test;

namespace {

template <class T>
struct Drawn {
  std::vector<int32_t> tokens;
  std::vector<T> logprob, support, z;
};

constexpr int64_t kHidden = 24;

template <class T>
Drawn<T> draw(const KernelTable& t, int threads, const std::vector<T>& x, const std::vector<T>& w, int64_t vocab,
              const std::vector<SampleSettings>& settings, bool packed = false) {
  const int64_t rows = int64_t(settings.size());
  Drawn<T> out{std::vector<int32_t>(settings.size(), -7), blank<T>(rows), blank<T>(rows), blank<T>(rows * vocab)};
  std::vector<T> panels = blank<T>(packed_weight_elements(vocab, kHidden, false));
  t.pack_weight({.n = vocab, .k = kHidden, .b = w.data(), .b_row = 1, .b_col = kHidden, .out = panels.data()}, threads);
  Sample s;
  s.rows = rows, s.hidden = kHidden, s.vocab = vocab, s.x = x.data(), s.weight = w.data(), s.settings = settings.data();
  s.packed = packed ? panels.data() : nullptr;
  s.z = out.z.data(), s.tokens = out.tokens.data(), s.logprob = out.logprob.data(), s.support_logprob = out.support.data();
  t.sample(s, threads);
  return out;
}

std::vector<SampleSettings> many_settings(int64_t rows) {
  std::vector<SampleSettings> all;
  for (int64_t i = 0; i < rows; ++i) {
    SampleSettings s;
    s.temperature = i % 5 == 0 ? 0.0 : i % 2 == 0 ? 1.0 : 0.7;
    s.top_k = i % 3 == 1 ? 1 + i : 0;
    s.top_p = i % 4 == 2 ? 0.6 : 1.0;
    s.min_p = i % 7 == 3 ? 0.05 : 0.0;
    s.key = std::uint64_t(i) * 977, s.position = std::uint32_t(i);
    all.push_back(s);
  }
  return all;
}

// The support by the plain definition, from the scaled logits; and its probabilities.
std::map<int32_t, double> support_of(const SampleSettings& s, const double* z, int64_t vocab) {
  std::vector<int32_t> order(static_cast<std::size_t>(vocab));
  for (int64_t j = 0; j < vocab; ++j) order[static_cast<std::size_t>(j)] = int32_t(j);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return z[a] > z[b]; });
  if (s.top_k > 0 && s.top_k < vocab) order.resize(static_cast<std::size_t>(s.top_k));
  double mass = 0, reached = 0;
  for (int32_t j : order) mass += std::exp(z[j] - z[order[0]]);
  std::map<int32_t, double> kept;
  for (int32_t j : order) {
    const double p = std::exp(z[j] - z[order[0]]);
    if (reached >= s.top_p * mass || p < s.min_p) break;
    kept[j] = p, reached += p;
  }
  for (auto& [token, p] : kept) p /= reached;
  return kept;
}

}  // namespace

TEST(every_level_and_any_threads_draw_the_same) {
  for (int64_t vocab : {275, 1040}) {
    if (kSmall && vocab != 275) continue;
    const std::vector<SampleSettings> settings = many_settings(23);
    same_everywhere([&](const KernelTable& t, int threads, const Source<float>& in) {
      const std::vector<float> x = in(23 * kHidden, 1), w = in(vocab * kHidden, 2);
      Outputs<float> out;
      for (bool packed : {false, true}) {
        const Drawn<float> d = draw(t, threads, x, w, vocab, settings, packed);
        out.insert(out.end(), {d.logprob, d.support, std::vector<float>(d.tokens.begin(), d.tokens.end())});
      }
      if (!in.nan) CHECK(same_bits(out[0], out[3]) && same_bits(out[1], out[4]) && out[2] == out[5], t.name);
      return out;
    });
  }
}

TEST(logprobs_are_those_of_linear_logprob) {
  const int64_t rows = 31, vocab = 700;
  const std::vector<float> x = Source<float>{}(rows * kHidden, 1), w = Source<float>{}(vocab * kHidden, 2);
  auto scored = [&](const KernelTable& t, const std::vector<int32_t>& targets, double temperature) {
    std::vector<float> logprob = blank<float>(rows), entropy = blank<float>(rows), lse = blank<float>(rows);
    t.linear_logprob({.rows = rows,
                      .hidden = kHidden,
                      .vocab = vocab,
                      .x = x.data(),
                      .weight = w.data(),
                      .targets = targets.data(),
                      .temperature = temperature,
                      .logprob = logprob.data(),
                      .entropy = entropy.data(),
                      .lse = lse.data()},
                     1);
    return logprob;
  };
  for (double temperature : {1.0, 0.7, 0.0}) {
    std::vector<SampleSettings> settings = many_settings(rows);
    for (SampleSettings& s : settings) s.temperature = temperature;
    const Drawn<float> d = draw(*float_tables().back(), 2, x, w, vocab, settings, true);
    const double used = temperature == 0 ? 1.0 : temperature;
    CHECK(same_bits(scored(*scalar_table(), d.tokens, used), d.logprob), temperature);
    CHECK(!same_bits(scored(*other_tiles_table(), d.tokens, used), d.logprob), "control: another vocabulary tile", temperature);
  }
}

TEST(greedy_takes_the_smallest_of_equals) {
  const int64_t vocab = 600;
  std::vector<float> x(kHidden, 1.0f), w(static_cast<std::size_t>(vocab * kHidden), 0.0f);
  for (int64_t best : {37, 300, 599}) w[static_cast<std::size_t>(best * kHidden)] = 2.0f;
  SampleSettings s;
  s.temperature = 0;
  CHECK(draw(*float_tables().back(), 1, x, w, vocab, {s}).tokens[0] == 37);
}

TEST(frequencies_are_those_of_the_distribution) {  // chi-square, fixed seeds; 99.99 % quantile by Wilson and Hilferty
  const int64_t vocab = 300, draws = kSmall ? 4000 : 40000;
  std::vector<double> x = Source<double>{}(kHidden, 1), w = Source<double>{}(vocab * kHidden, 2);
  for (double& value : w) value *= 0.8;
  struct Cut {
    double temperature, top_p, min_p;
    int64_t top_k;
  };
  for (const Cut& cut :
       {Cut{1, 1, 0, 0}, Cut{0.7, 1, 0, 0}, Cut{1, 1, 0, 7}, Cut{1, 0.5, 0, 0}, Cut{1, 1, 0.2, 0}, Cut{1, 0.8, 0.1, 40}}) {
    std::vector<SampleSettings> settings(static_cast<std::size_t>(draws));
    std::vector<double> rows;
    for (int64_t i = 0; i < draws; ++i) {
      SampleSettings& s = settings[static_cast<std::size_t>(i)];
      s.temperature = cut.temperature, s.top_p = cut.top_p, s.min_p = cut.min_p, s.top_k = cut.top_k;
      s.key = 5, s.position = std::uint32_t(i);
      rows.insert(rows.end(), x.begin(), x.end());
    }
    const Drawn<double> d = draw(*float64_table(), 2, rows, w, vocab, settings);
    const std::map<int32_t, double> expected = support_of(settings[0], d.z.data(), vocab);
    std::map<int32_t, int64_t> seen;
    for (int64_t i = 0; i < draws; ++i) {
      const int32_t token = d.tokens[static_cast<std::size_t>(i)];
      CHECK(expected.count(token) == 1, "token", token, "is outside the support", cut.top_k, cut.top_p, cut.min_p);
      CHECK(std::fabs(d.support[static_cast<std::size_t>(i)] - std::log(expected.at(token))) < 1e-9, token);
      ++seen[token];
    }
    double chi = 0, rest = 0, rest_seen = 0, cells = -1;
    for (const auto& [token, p] : expected) {
      const double mean = p * double(draws);
      if (mean < 5) {  // too rare for a cell of its own
        rest += mean, rest_seen += double(seen[token]);
        continue;
      }
      chi += (double(seen[token]) - mean) * (double(seen[token]) - mean) / mean, ++cells;
    }
    if (rest >= 5) chi += (rest_seen - rest) * (rest_seen - rest) / rest, ++cells;
    const double f = std::max(cells, 1.0), limit = f * std::pow(1 - 2 / (9 * f) + 3.719 * std::sqrt(2 / (9 * f)), 3);
    CHECK(chi < limit, "chi-square", chi, "of", cells, "degrees of freedom is above", limit);
    double uniform = 0;  // control: the test notices another distribution
    for (const auto& [token, p] : expected) {
      const double mean = double(draws) / double(expected.size());
      uniform += (double(seen[token]) - mean) * (double(seen[token]) - mean) / mean;
    }
    CHECK(uniform > limit, uniform, limit);
  }
}

TEST(logits_that_are_no_numbers_draw_nothing) {
  const int64_t vocab = 300;
  std::vector<float> x = Source<float>{}(kHidden, 1), w = Source<float>{}(vocab * kHidden, 2);
  w[290 * kHidden] = kNan<float>;
  for (double temperature : {0.0, 1.0}) {
    SampleSettings s;
    s.temperature = temperature;
    for (const KernelTable* t : float_tables()) CHECK(draw(*t, 1, x, w, vocab, {s}).tokens[0] == -1, t->name, temperature);
  }
}
