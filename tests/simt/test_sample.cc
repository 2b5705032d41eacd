#include <algorithm>

#include "cuda/kernels/sample.cuh"
#include "device.h"
#include "kernels/select.h"

using namespace test;
namespace tc = tutelage::cuda;
using tutelage::SampleSettings;

namespace {

struct Drawn {
  Memory<int32_t> tokens;
  Memory<float> logprob, support;
  bool operator==(const Drawn&) const = default;
};

Memory<SampleSettings> many_settings(int64_t rows, std::uint64_t seed) {
  Memory<SampleSettings> all(rows);
  for (int64_t i = 0; i < rows; ++i) {
    SampleSettings s;
    s.temperature = i % 5 == 0 ? 0.0 : i % 2 == 0 ? 1.0 : 0.7;
    s.top_k = i % 3 == 1 ? 1 + i : 0;
    s.top_p = i % 4 == 2 ? 0.6 : 1.0;
    s.min_p = i % 7 == 3 ? 0.05 : 0.0;
    s.key = seed + static_cast<std::uint64_t>(i) * 977, s.position = static_cast<std::uint32_t>(i);
    all[i] = s;
  }
  return all;
}

// The CPU's draw from the same logits: hidden size 1, x = 1 and the logits as the vocabulary matrix of each row.
Drawn cpu_draw(Memory<float>& z, const Memory<SampleSettings>& settings, int64_t vocab) {
  const int64_t rows = settings.size();
  Drawn out{Memory<int32_t>(rows), Memory<float>(rows), Memory<float>(rows)};
  const std::vector<float> one = {1};
  std::vector<float> weight(static_cast<std::size_t>(vocab));
  for (int64_t row = 0; row < rows; ++row) {
    std::copy_n(z.data() + row * vocab, vocab, weight.begin());
    tutelage::Sample s;
    s.rows = 1, s.hidden = 1, s.vocab = vocab, s.x = one.data(), s.weight = weight.data(), s.settings = &settings[row];
    s.z = z.data() + row * vocab;  // scaled by the temperature, from here on
    s.tokens = &out.tokens[row], s.logprob = &out.logprob[row], s.support_logprob = &out.support[row];
    tutelage::scalar_table()->sample(s, 1);
  }
  return out;
}

Memory<tc::TileStatistics> statistics_of(const Memory<float>& z, int64_t rows, int64_t vocab) {
  Memory<tc::TileStatistics> statistics(rows * tc::vocab_tiles(vocab));
  tc::tile_statistics_of(z.data(), rows, vocab, statistics.data(), nullptr);
  return statistics;
}

Drawn draw(const Memory<float>& z, const Memory<SampleSettings>& settings, int64_t vocab) {
  const int64_t rows = settings.size();
  const Memory<tc::TileStatistics> statistics = statistics_of(z, rows, vocab);
  Drawn out{Memory<int32_t>(rows), Memory<float>(rows), Memory<float>(rows)};
  tc::sample(
      {rows, vocab, z.data(), statistics.data(), settings.data(), out.tokens.data(), out.logprob.data(), out.support.data()},
      nullptr);
  return out;
}

}  // namespace

TEST(the_same_draws_as_the_cpus) {
  for (int64_t vocab : {1, 15, 257, 1040}) {
    const int64_t rows = vocab == 1040 || !kSmall ? 23 : 9;
    Memory<float> z = random_float(rows * vocab, 7, 6);
    const Memory<SampleSettings> settings = many_settings(rows, 5);
    const Drawn cpu = cpu_draw(z, settings, vocab);
    const Drawn mine = draw(z, settings, vocab);
    for (int64_t i = 0; i < rows; ++i) {
      CHECK(mine.tokens[i] == cpu.tokens[i], vocab, i, mine.tokens[i], cpu.tokens[i]);
      CHECK(mine.tokens[i] >= 0 && mine.tokens[i] < vocab, vocab, i);
    }
    CHECK(mine.logprob == cpu.logprob && mine.support == cpu.support, vocab);
    // a control: another seed draws other tokens
    if (vocab > 15) CHECK(!(draw(z, many_settings(rows, 6), vocab).tokens == cpu.tokens), vocab);
  }
}

TEST(tile_statistics_are_the_cpus) {  // through what the CPU makes of them, for every target
  const int64_t vocab = 700;
  Memory<float> z = random_float(vocab, 3, 9);
  const Memory<tc::TileStatistics> tiles = statistics_of(z, 1, vocab);
  float top, log_sum, entropy;
  tc::merge_tiles(tiles.data(), tiles.size(), &top, &log_sum, &entropy);
  const std::vector<float> one = {1};
  for (int32_t target : {0, 255, 256, 699}) {
    float logprob, cpu_entropy, lse;
    tutelage::LinearLogprob g;
    g.rows = 1, g.hidden = 1, g.vocab = vocab, g.x = one.data(), g.weight = z.data(), g.targets = &target;
    g.logprob = &logprob, g.entropy = &cpu_entropy, g.lse = &lse;
    tutelage::scalar_table()->linear_logprob(g, 1);
    CHECK(logprob == (z[target] - top) - log_sum && cpu_entropy == entropy && lse == top + log_sum, target, logprob, entropy);
  }
}

TEST(a_row_is_drawn_alike_alone_and_in_any_schedule) {
  const int64_t vocab = 530, rows = 14;
  Memory<float> z = random_float(rows * vocab, 7, 5);
  const Memory<SampleSettings> settings = many_settings(rows, 8);
  const Drawn together = every_schedule([&] { return draw(z, settings, vocab); });
  for (int64_t row = 0; row < rows; ++row) {
    Memory<float> own(vocab);
    std::copy_n(z.data() + row * vocab, vocab, own.data());
    Memory<SampleSettings> setting(1);
    setting[0] = settings[row];
    const Drawn alone = draw(own, setting, vocab);
    CHECK(alone.tokens[0] == together.tokens[row] && alone.logprob[0] == together.logprob[row] &&
              alone.support[0] == together.support[row],
          row);
  }
}

TEST(cuts_keep_the_support_that_they_define) {
  const int64_t vocab = 300;
  Memory<float> one = random_float(vocab, 11, 4);
  std::vector<float> sorted(one.begin(), one.end());
  std::sort(sorted.rbegin(), sorted.rend());
  double mass = 0;
  for (float x : sorted) mass += std::exp(double(x) - sorted[0]);
  struct Cut {
    int64_t top_k;
    double top_p, min_p;
  };
  for (const Cut& c : {Cut{5, 1, 0}, {0, 0.5, 0}, {0, 1, 0.2}, {20, 0.7, 0.1}, {1, 1, 0}, {300, 1, 0}}) {
    // by the definition
    std::size_t kept = c.top_k > 0 ? static_cast<std::size_t>(c.top_k) : sorted.size();
    double within = 0, reached = 0;
    for (std::size_t i = 0; i < kept; ++i) within += std::exp(double(sorted[i]) - sorted[0]);
    std::size_t n = 0;
    while (n < kept && reached < c.top_p * within && std::exp(double(sorted[n]) - sorted[0]) >= c.min_p)
      reached += std::exp(double(sorted[n++]) - sorted[0]);
    const int64_t rows = kSmall ? 4 : 12;
    Memory<float> z(rows * vocab);
    Memory<SampleSettings> settings(rows);
    for (int64_t i = 0; i < rows; ++i) {
      std::copy(one.begin(), one.end(), z.data() + i * vocab);
      SampleSettings s;
      s.top_k = c.top_k, s.top_p = c.top_p, s.min_p = c.min_p, s.key = static_cast<std::uint64_t>(i);
      settings[i] = s;
    }
    const Drawn mine = draw(z, settings, vocab);
    for (int64_t i = 0; i < rows; ++i) {
      const double x = one[mine.tokens[i]];
      CHECK(x >= sorted[n - 1], c.top_k, c.top_p, c.min_p, "of", n, "token", mine.tokens[i]);
      CHECK(std::fabs(mine.support[i] - (x - sorted[0] - std::log(reached))) < 1e-5, mine.support[i]);
      CHECK(std::fabs(mine.logprob[i] - (x - sorted[0] - std::log(mass))) < 1e-5, mine.logprob[i]);
    }
  }
}

// As cpp/kernels/linear_logprob.inc scales: by 1 / temperature, rounded once.
TEST(logits_are_divided_by_each_rows_own_temperature) {
  const double temperatures[] = {0.7, 1.0, 0.0, 3.0, 1e-3};
  const int64_t rows = 5;
  for (int64_t vocab : {1, 255, 256, 300}) {
    const Memory<float> z = random_float(rows * vocab, 3, 10);
    Memory<SampleSettings> settings(rows);
    for (int64_t i = 0; i < rows; ++i) settings[i] = SampleSettings{}, settings[i].temperature = temperatures[i];
    const Memory<float> scaled = every_schedule([&] {
      Memory<float> out = z;
      tc::scale_logits(out.data(), rows, vocab, settings.data(), nullptr);
      return out;
    });
    for (int64_t i = 0; i < rows * vocab; ++i) {
      const double t = temperatures[i / vocab];
      const float factor = t > 0 ? static_cast<float>(1 / t) : 1.0f;
      CHECK(scaled[i] == z[i] * factor, i, t, scaled[i], z[i]);
      CHECK(t == 1 || t == 0 || scaled[i] != z[i], i, t);
    }
  }
}

TEST(logits_that_are_no_numbers_draw_nothing) {
  const int64_t vocab = 300;
  for (int64_t bad : {0, 255, 290, 299}) {
    Memory<float> z = random_float(2 * vocab, 1);
    z[bad] = std::numeric_limits<float>::quiet_NaN();
    for (double temperature : {0.0, 1.0}) {
      Memory<SampleSettings> settings(2);
      for (SampleSettings& s : settings) s = SampleSettings{}, s.temperature = temperature;
      const Drawn mine = draw(z, settings, vocab);
      CHECK(mine.tokens[0] == -1 && mine.tokens[1] >= 0, bad, temperature, mine.tokens[0]);
      CHECK(std::isinf(mine.logprob[0]) && std::isfinite(mine.logprob[1]), bad, temperature);
    }
  }
}

TEST(memory_is_read_in_whole_sectors_and_banks_do_not_conflict) {
  const int64_t vocab = 1024, rows = 4;
  Memory<float> z = random_float(rows * vocab, 7, 5);
  Memory<SampleSettings> settings(rows);
  for (SampleSettings& s : settings) s = SampleSettings{}, s.top_k = 40, s.top_p = 0.9;
  const Memory<tc::TileStatistics> statistics = statistics_of(z, rows, vocab);
  simt::Run run({simt::Schedule::forward, 0, true});
  draw(z, settings, vocab);
  for (const simt::Launch& l : run.launches) CHECK(l.bank_conflicts == 0, l.bank_conflicts, l.worst_bank_conflict);
}

TEST(a_vocabulary_that_does_not_fit_is_refused) {
  tc::Draw g;
  g.rows = 1, g.vocab = 4000000;
  CHECK_THROWS(std::invalid_argument, "sample: the vocabulary of 4000000 is too large", tc::sample(g, nullptr));
}
