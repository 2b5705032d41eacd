#include "cuda/kernels/linear_logprob.cuh"

#include <algorithm>
#include <cmath>

#include "cuda/kernels/sample.cuh"
#include "device.h"
#include "kernels/select.h"

using namespace test;
namespace tc = tutelage::cuda;
using tutelage::LinearLogprob;
using tutelage::LinearLogprobBackward;

namespace {

struct Case {
  int64_t rows, hidden, vocab;
  double temperature = 1;
  bool keep = false;
};

template <class T>
Memory<T> filled(int64_t n, std::uint64_t seed, double scale) {
  Memory<T> x(n);
  for (int64_t i = 0; i < n; ++i) {
    const bf16 v = to_bf16(static_cast<float>(scale * uniform(seed, i)));
    if constexpr (sizeof(T) == 2)
      x[i] = v;
    else
      x[i] = to_float(v);
  }
  return x;
}

// T: bf16, or float with the same values.
template <class T>
struct Operands {
  Case c;
  Memory<T> x, weight, dx;
  Memory<int32_t> targets, index;
  Memory<float> logprob, entropy, lse, d_logprob, d_entropy, z, dweight;

  explicit Operands(const Case& c_)
      : c(c_),
        x(filled<T>(c.rows * c.hidden, 1, 1)),
        weight(filled<T>(c.vocab * c.hidden, 2, 1)),
        dx(c.rows * c.hidden),
        targets(c.rows),
        index(c.rows),
        logprob(c.rows),
        entropy(c.rows),
        lse(c.rows),
        d_logprob(random_float(c.rows, 3)),
        d_entropy(random_float(c.rows, 4)),
        z(c.keep ? c.rows * c.vocab : 0),
        dweight(random_float(c.vocab * c.hidden, 5)) {
    for (int64_t i = 0; i < c.rows; ++i) {
      targets[i] = static_cast<int32_t>((i * 37 + 5) % c.vocab);
      index[i] = static_cast<int32_t>(c.rows - 1 - i);
    }
  }
  LinearLogprob forward() {
    LinearLogprob g;
    g.rows = c.rows, g.hidden = c.hidden, g.vocab = c.vocab, g.x = x.data(), g.weight = weight.data();
    g.targets = targets.data(), g.index = index.data(), g.temperature = c.temperature, g.z = c.keep ? z.data() : nullptr;
    g.logprob = logprob.data(), g.entropy = entropy.data(), g.lse = lse.data();
    return g;
  }
  LinearLogprobBackward backward() {
    LinearLogprobBackward g;
    g.rows = c.rows, g.hidden = c.hidden, g.vocab = c.vocab, g.x = x.data(), g.weight = weight.data();
    g.targets = targets.data(), g.index = index.data(), g.temperature = c.temperature, g.z = c.keep ? z.data() : nullptr;
    g.block_rows = c.rows, g.entropy = entropy.data(), g.lse = lse.data();
    g.d_logprob = d_logprob.data(), g.d_entropy = d_entropy.data(), g.dx = dx.data(), g.dweight = dweight.data();
    return g;
  }
};

struct Result {
  Memory<float> logprob, entropy, lse, dweight;
  Memory<bf16> dx;
  bool operator==(const Result& o) const {
    return logprob == o.logprob && entropy == o.entropy && lse == o.lse && dweight == o.dweight && dx == o.dx;
  }
};
void forward(const LinearLogprob& g) {
  Memory<float> scratch(tc::linear_logprob_scratch_bytes(g) / 4);
  tc::linear_logprob(g, nullptr, scratch.data());
}
void backward(const LinearLogprobBackward& g, int64_t bytes = tc::kGradientBytes) {
  Memory<bf16> scratch(tc::linear_logprob_backward_scratch_bytes(g, bytes) / 2);
  tc::linear_logprob_backward(g, nullptr, scratch.data(), bytes);
}
// The logits by the product that generation uses.
Memory<float> product(const Operands<bf16>& o) {
  Memory<float> z(o.c.rows * o.c.vocab);
  tutelage::Matmul g;
  g.m = o.c.rows, g.n = o.c.vocab, g.k = o.c.hidden, g.a = o.x.data(), g.a_row = o.c.hidden;
  g.b = o.weight.data(), g.b_row = 1, g.b_col = o.c.hidden, g.c = z.data(), g.c_row = o.c.vocab, g.c_state = true;
  g.scale = 1 / o.c.temperature;
  tc::matmul(g, nullptr);
  return z;
}
Result run(const Case& c) {
  Operands<bf16> o(c);
  forward(o.forward()), backward(o.backward());
  return {o.logprob, o.entropy, o.lse, o.dweight, o.dx};
}

const std::vector<Case> kCases = {{5, 24, 300}, {1, 8, 7, 0.7}, {33, 40, 257, 1.5, true}, {17, 16, 520, 0.5, true},
                                  {3, 9, 11},   {130, 16, 64}};

}  // namespace

// The formula in double; eager: as bf16 computes it operation by operation, sums of products and of the softmax in double.
struct Formula {
  std::vector<double> logprob, entropy, dx, dweight;
};
Formula formula(const Operands<bf16>& o, bool eager) {
  auto kept = [eager](double x) { return eager ? value(to_bf16(static_cast<float>(x))) : x; };
  const Case& c = o.c;
  auto size = [](int64_t n) { return static_cast<std::size_t>(n); };
  Formula f{std::vector<double>(size(c.rows)), std::vector<double>(size(c.rows)), std::vector<double>(size(c.rows * c.hidden)),
            std::vector<double>(size(c.vocab * c.hidden))};
  for (int64_t i = 0; i < c.rows; ++i) {
    std::vector<double> z(size(c.vocab));
    for (int64_t j = 0; j < c.vocab; ++j) {
      double sum = 0;
      for (int64_t h = 0; h < c.hidden; ++h) sum += value(o.x[i * c.hidden + h]) * value(o.weight[j * c.hidden + h]);
      z[size(j)] = kept(kept(sum) / c.temperature);
    }
    const double top = *std::max_element(z.begin(), z.end());
    double sum = 0, weighted = 0;
    for (double x : z) sum += std::exp(x - top), weighted += std::exp(x - top) * x;
    const double lse = top + std::log(sum), entropy = lse - weighted / sum;
    const int64_t out = o.index[i];
    f.logprob[size(out)] = kept(z[size(o.targets[i])] - lse), f.entropy[size(out)] = kept(entropy);
    for (int64_t j = 0; j < c.vocab; ++j) {
      const double p = std::exp(z[size(j)] - lse);
      const double dz = o.d_logprob[out] * ((j == o.targets[i]) - p) - o.d_entropy[out] * p * (z[size(j)] - lse + entropy);
      const double d = kept(kept(dz) / c.temperature);
      for (int64_t h = 0; h < c.hidden; ++h) {
        f.dx[size(i * c.hidden + h)] += d * value(o.weight[j * c.hidden + h]);
        f.dweight[size(j * c.hidden + h)] += d * value(o.x[i * c.hidden + h]);
      }
    }
  }
  for (std::vector<double>* d : {&f.dx, &f.dweight})
    for (double& x : *d) x = kept(x);
  for (int64_t i = 0; i < o.dweight.size(); ++i) f.dweight[size(i)] += o.dweight[i];
  return f;
}

TEST(outputs_and_gradients_are_close_to_double_and_to_the_cpus) {
  for (const Case& c : kCases) {
    const Result mine = every_schedule([&] { return run(c); });
    const Operands<bf16> fresh(c);
    const Formula exact = formula(fresh, false), eager = formula(fresh, true);
    Operands<float> cpu(c);
    tutelage::scalar_table()->linear_logprob(cpu.forward(), 1);
    tutelage::scalar_table()->linear_logprob_backward(cpu.backward(), 1);
    const std::string name = text(c.rows, c.hidden, c.vocab);
    check_error("logprob " + name, mine.logprob, exact.logprob, eager.logprob);
    check_error("entropy " + name, mine.entropy, exact.entropy, eager.entropy);
    check_error("dx " + name, mine.dx, exact.dx, eager.dx);
    check_error("dweight " + name, mine.dweight, exact.dweight, eager.dweight);
    check_error("dx, CPU " + name, mine.dx, cpu.dx, eager.dx);
    check_error("dweight, CPU " + name, mine.dweight, cpu.dweight, eager.dweight);
    check_close("logprob, CPU " + name, mine.logprob, cpu.logprob, 1e-5);
    check_close("entropy, CPU " + name, mine.entropy, cpu.entropy, 1e-5);
    check_close("lse, CPU " + name, mine.lse, cpu.lse, 1e-5);
  }
}

TEST(kept_logits_and_logits_computed_again_give_the_same_bits) {
  for (Case c : kCases) {
    const Result once = run(c);
    c.keep = !c.keep;
    CHECK(run(c) == once, c.rows, c.hidden, c.vocab);
  }
}

// What the fused kernel makes of a tile where it lies is what the kernels of their own make of the logits in memory.
TEST(logits_and_their_statistics_are_those_of_the_kernels_of_their_own) {
  for (Case c : kCases) {
    c.keep = true;
    Operands<bf16> o(c);
    const int64_t tiles = tc::vocab_tiles(c.vocab);
    Memory<tc::TileStatistics> mine(c.rows * tiles), own(c.rows * tiles);
    Memory<float> target(c.rows);
    tc::launch_logits(tc::logits_of(o.forward(), 0, c.rows),
                      tc::LogitStatistics{o.targets.data(), mine.data(), target.data(), o.z.data()}, nullptr);
    const Memory<float> z = product(o);
    tc::tile_statistics_of(z.data(), c.rows, c.vocab, own.data(), nullptr);
    CHECK(o.z == z && mine == own, c.rows, c.hidden, c.vocab);
    for (int64_t i = 0; i < c.rows; ++i) CHECK(target[i] == z[i * c.vocab + o.targets[i]], i);
  }
}

// Blocks of rows do not show, with steps of rows (which no block may cut) and without.
TEST(gradients_of_blocks_of_rows_are_those_of_all_at_once) {
  const Case c{kSmall ? 150 : 300, 16, 70};
  std::vector<int32_t> steps;
  for (int32_t at = 0, length = 7; at < c.rows; at += length, length = length * 5 % 33 + 1)
    for (int32_t k = 0; k < length && at + k < c.rows; k += 16)
      steps.push_back(at + k), steps.push_back(std::min({16, length - k, static_cast<int32_t>(c.rows) - at - k}));
  const Memory<int32_t> placed = copy_of(steps);
  for (bool stepped : {false, true}) {
    auto gradients = [&](int64_t bytes) {
      Operands<bf16> o(c);
      forward(o.forward());
      LinearLogprobBackward g = o.backward();
      if (stepped) g.row_steps = placed.data(), g.row_steps_host = steps.data(), g.row_step_count = placed.size() / 2;
      backward(g, bytes);
      return Result{o.logprob, o.entropy, o.lse, o.dweight, o.dx};
    };
    CHECK(gradients(1) == gradients(tc::kGradientBytes), stepped);
  }
}

// Memory that is exactly as long as these say is what every test here runs in.
TEST(no_logits_are_held) {
  Operands<bf16> o(Case{1, 8, 7});
  LinearLogprob g = o.forward();
  g.rows = 4096, g.vocab = 49152;
  CHECK(tc::linear_logprob_scratch_bytes(g) == g.rows * (192 * 12 + 4), tc::linear_logprob_scratch_bytes(g));
  LinearLogprobBackward b = o.backward();
  b.rows = 4096, b.vocab = 49152;
  CHECK(tc::linear_logprob_backward_scratch_bytes(b) <= tc::kGradientBytes, tc::linear_logprob_backward_scratch_bytes(b));
  b.rows = 100;
  CHECK(tc::linear_logprob_backward_scratch_bytes(b) == 100 * 49152 * 2, tc::linear_logprob_backward_scratch_bytes(b));
}

// P1: a row does not depend on the others.
TEST(a_row_has_the_same_bits_alone) {
  const Case c{40, 24, 300};
  Operands<bf16> all(c);
  forward(all.forward());
  for (int64_t row : {int64_t(0), int64_t(17), int64_t(39)}) {
    Operands<bf16> one(Case{1, 24, 300});
    for (int64_t j = 0; j < 24; ++j) one.x[j] = all.x[row * 24 + j];
    one.targets[0] = all.targets[row];
    forward(one.forward());
    CHECK(one.logprob[0] == all.logprob[39 - row] && one.entropy[0] == all.entropy[39 - row] && one.lse[0] == all.lse[row],
          row);
  }
}

// P2: what a draw says of its token is what scoring says of it.
TEST(a_token_has_the_log_prob_that_its_draw_had) {
  for (double temperature : {1.0, 0.7}) {
    const Case c{6, 32, 300, temperature};
    Operands<bf16> o(c);
    Memory<float> logprob(c.rows), support(c.rows);
    Memory<tutelage::SampleSettings> settings(c.rows);
    for (tutelage::SampleSettings& s : settings) s = tutelage::SampleSettings{}, s.temperature = temperature;
    o.c.temperature = 1;
    Memory<float> z = product(o);
    o.c.temperature = temperature;
    tc::scale_logits(z.data(), c.rows, c.vocab, settings.data(), nullptr);
    Memory<tc::TileStatistics> tiles(c.rows * tc::vocab_tiles(c.vocab));
    tc::tile_statistics_of(z.data(), c.rows, c.vocab, tiles.data(), nullptr);
    tc::Draw draw;
    draw.rows = c.rows, draw.vocab = c.vocab, draw.z = z.data(), draw.statistics = tiles.data(),
    draw.settings = settings.data();
    draw.tokens = o.targets.data(), draw.logprob = logprob.data(), draw.support_logprob = support.data();
    tc::sample(draw, nullptr);
    forward(o.forward());
    for (int64_t i = 0; i < c.rows; ++i) CHECK(o.logprob[c.rows - 1 - i] == logprob[i], temperature, i);
    o.targets[0] = (o.targets[0] + 1) % 300;  // the control: another token has another
    forward(o.forward());
    CHECK(o.logprob[c.rows - 1] != logprob[0]);
  }
}

// P4: with steps of rows that no two sequences share, the gradient goes on where it was.
TEST(parts_of_a_batch_give_the_gradient_of_the_whole) {
  const std::vector<int32_t> lengths = {5, 19, 33};
  const Case c{57, 16, 64};
  auto gradient = [&](bool cut) {
    Operands<bf16> o(c);
    Memory<float> sum(c.vocab * c.hidden);
    forward(o.forward());
    int64_t first = 0;
    for (std::size_t s = 0; s < (cut ? lengths.size() : 1); ++s) {
      std::vector<int32_t> steps;
      int32_t at = 0;
      for (std::size_t i = cut ? s : 0; i < (cut ? s + 1 : lengths.size()); at += lengths[i++])
        for (int32_t k = 0; k < lengths[i]; k += 16) steps.push_back(at + k), steps.push_back(std::min(16, lengths[i] - k));
      const Memory<int32_t> placed = copy_of(steps);
      LinearLogprobBackward g = o.backward();
      g.rows = at, g.x = o.x.data() + first * c.hidden, g.targets = o.targets.data() + first, g.index = o.index.data() + first;
      g.lse = o.lse.data() + first, g.dx = o.dx.data() + first * c.hidden, g.dweight = sum.data(), g.accumulate = s > 0;
      g.row_steps = placed.data(), g.row_steps_host = steps.data(), g.row_step_count = placed.size() / 2;
      backward(g);
      first += at;
    }
    return sum;
  };
  CHECK(gradient(true) == gradient(false));
}

TEST(banks_do_not_conflict_and_sectors_are_whole) {
  simt::Run counted({simt::Schedule::forward, 0, true});
  const Case c{128, 64, 512};
  run(c), run({70, 64, 300, 1, true});
  for (const simt::Launch& l : counted.launches) CHECK(l.bank_conflicts == 0, l.bank_conflicts, l.worst_bank_conflict);
  // of the first: logits, merging, logits again and their gradients, dx
  const auto& l = counted.launches;
  const int64_t together = 2;  // rows whose statistics a store writes, three of them a tile: each row's in a sector of its own
  const auto scattered = static_cast<std::uint64_t>(c.rows / together * 3 * tc::vocab_tiles(c.vocab));
  CHECK(l[0].excess_sectors == scattered, l[0].excess_sectors, scattered, l[0].worst_excess);
  for (std::size_t i : {2, 3}) CHECK(l[i].excess_sectors == 0, i, l[i].excess_sectors, l[i].worst_excess);
}
