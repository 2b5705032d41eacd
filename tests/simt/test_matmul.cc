#include "cuda/kernels/matmul.cuh"

#include "device.h"
#include "kernels/select.h"

using namespace test;
namespace tc = tutelage::cuda;
using tutelage::Activation;
using tutelage::Matmul;

namespace {

struct Case {
  int64_t m, n, k;
  bool a_across = false, b_across = false;
  int64_t pad = 0;  // of every pitch: what is no multiple of 8 takes the way without 16-byte accesses
  std::string name() const {
    return text("m", m, "n", n, "k", k, a_across ? "A across" : "A along", b_across ? "B across" : "B along", "pad", pad);
  }
};

// T: bf16, or float with the same values.
template <class T>
struct Operands {
  Memory<T> a, b, c, bias, residual, pre, activated;
  Matmul g;

  explicit Operands(const Case& x, Activation activation = Activation::none, bool with = false)
      : a(filled((x.a_across ? x.k : x.m) * pitch_a(x), 1)),
        b(filled((x.b_across ? x.k : x.n) * pitch_b(x), 2)),
        bias(filled(x.n, 3)),
        residual(filled(x.m * (x.n + x.pad), 4)) {
    const bool back = activation >= Activation::gelu_backward, gated = activation == Activation::swiglu_backward;
    const int64_t columns = (gated ? 2 : 1) * x.n + x.pad,
                  kept = activation == Activation::swiglu ? x.n / 2 + x.pad : x.n + x.pad;
    c = filled(x.m * columns, 5);
    pre = filled(x.m * columns, 6, 2);
    activated = Memory<T>(x.m * kept);
    g.m = x.m, g.n = x.n, g.k = x.k;
    g.a = a.data(), g.a_row = x.a_across ? 1 : pitch_a(x), g.a_col = x.a_across ? pitch_a(x) : 1;
    g.b = b.data(), g.b_row = x.b_across ? pitch_b(x) : 1, g.b_col = x.b_across ? 1 : pitch_b(x);
    g.c = c.data(), g.c_row = columns, g.activation = activation;
    if (activation != Activation::none) g.activated = activated.data(), g.activated_row = kept;
    if (back) g.pre = pre.data(), g.pre_row = columns;
    if (with) {
      if (!back) g.bias = bias.data();
      g.residual = residual.data(), g.residual_row = x.n + x.pad;
    }
  }
  Operands(const Operands&) = delete;
  static int64_t pitch_a(const Case& x) { return (x.a_across ? x.m : x.k) + x.pad; }
  static int64_t pitch_b(const Case& x) { return (x.b_across ? x.n : x.k) + x.pad; }
  static Memory<T> filled(int64_t n, std::uint64_t seed, double scale = 1) {
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
};

// C and activated of the rows there are, without what lies between them.
struct Result {
  Memory<bf16> c, activated;
  bool operator==(const Result& o) const { return c == o.c && activated == o.activated; }
};
Result run(const Case& x, Activation activation = Activation::none, bool with = false, std::optional<tc::Tiles> tiles = {}) {
  Operands<bf16> o(x, activation, with);
  tc::matmul(o.g, nullptr, tiles);
  return {o.c, o.activated};
}

std::vector<Case> shapes() {
  std::vector<Case> all = {{1, 8, 8},
                           {16, 64, 32},
                           {17, 40, 72},
                           {5, 3, 7, false, false, 1},
                           {130, 136, 40},
                           {33, 24, 56, false, true},
                           {24, 40, 19, true, true},
                           {40, 16, 24, true, false},
                           {9, 11, 13, true, true, 2},
                           {7, 9, 21, true, false, 1},
                           {3, 70, 33, false, true, 3}};
  if (!kSmall)
    all.push_back({150, 260, 200}), all.push_back({140, 130, 70, false, true}), all.push_back({136, 144, 50, true, true});
  return all;
}

}  // namespace

TEST(every_shape_and_layout_is_the_cpus_product) {
  for (const Case& x : shapes()) {
    const Result mine = every_schedule([&] { return run(x); });
    Operands<float> cpu(x);
    tutelage::scalar_table()->matmul(cpu.g, 1);
    double worst = 0, largest = 0;
    for (int64_t i = 0; i < x.m; ++i)
      for (int64_t j = 0; j < x.n; ++j) {
        const double exact = cpu.c[i * cpu.g.c_row + j];
        worst = std::fmax(worst, std::fabs(value(mine.c[i * cpu.g.c_row + j]) - exact)),
        largest = std::fmax(largest, std::fabs(exact));
      }
    CHECK(worst <= largest * 0x1p-8, x.name(), worst, largest);  // half a unit in the last place of bf16, twice
  }
}

TEST(sums_in_float_are_close_to_double) {
  for (const Case& x : shapes()) {
    Operands<bf16> o(x);
    Memory<float> c(x.m * x.n);
    o.g.c = c.data(), o.g.c_row = x.n, o.g.c_state = true, o.g.scale = 0.5;
    tc::matmul(o.g, nullptr);
    for (int64_t i = 0; i < x.m; ++i)
      for (int64_t j = 0; j < x.n; ++j) {
        double sum = 0, size = 0;
        for (int64_t p = 0; p < x.k; ++p) {
          const double product = value(o.a[i * o.g.a_row + p * o.g.a_col]) * value(o.b[p * o.g.b_row + j * o.g.b_col]);
          sum += product, size += std::fabs(product);
        }
        CHECK(std::fabs(c[i * x.n + j] - 0.5 * sum) <= 1e-6 * size, x.name(), i, j, c[i * x.n + j], 0.5 * sum);
      }
  }
}

// What is fused has the bits of the kernels of its own on the sum as it is kept.
TEST(what_is_fused_is_what_the_kernels_of_their_own_compute) {
  for (const Case& x : {Case{17, 48, 40}, Case{130, 144, 24}, Case{5, 6, 9, false, true, 1}})
    for (Activation activation : {Activation::gelu, Activation::gelu_erf, Activation::swiglu}) {
      Operands<bf16> plain(x, Activation::none, true), fused(x, activation, true);
      tc::matmul(plain.g, nullptr), tc::matmul(fused.g, nullptr);
      CHECK(plain.c == fused.c, x.name());
      const int64_t width = activation == Activation::swiglu ? x.n / 2 : x.n;
      for (int64_t i = 0; i < x.m; ++i) {
        const bf16* row = plain.c.data() + i * plain.g.c_row;
        Memory<bf16> y(width);
        if (activation == Activation::swiglu)
          tc::swiglu({1, width, row, row + width, plain.g.c_row, y.data(), width}, nullptr);
        else
          tc::gelu({width, row, y.data(), activation == Activation::gelu_erf}, nullptr);
        CHECK(
            std::memcmp(y.data(), fused.activated.data() + i * fused.g.activated_row, static_cast<std::size_t>(width) * 2) == 0,
            x.name(), i);
      }
    }
}

TEST(the_backward_of_an_activation_is_what_its_own_kernel_computes) {
  for (const Case& x : {Case{17, 48, 40, false, true}, Case{130, 136, 24, false, true}, Case{5, 7, 9, false, true, 1}})
    for (Activation activation : {Activation::gelu_backward, Activation::gelu_erf_backward, Activation::swiglu_backward}) {
      const bool gated = activation == Activation::swiglu_backward, erf = activation == Activation::gelu_erf_backward;
      Operands<bf16> plain(x, Activation::none, true), fused(x, activation, true);
      tc::matmul(plain.g, nullptr), tc::matmul(fused.g, nullptr);
      plain.g.bias = nullptr, tc::matmul(plain.g, nullptr);
      for (int64_t i = 0; i < x.m; ++i) {
        const bf16 *d = plain.c.data() + i * plain.g.c_row, *pre = fused.pre.data() + i * fused.g.pre_row;
        Memory<bf16> y(x.n), dx(x.n * (gated ? 2 : 1));
        if (gated) {
          tc::swiglu({1, x.n, pre, pre + x.n, 0, y.data(), x.n}, nullptr);
          tc::swiglu_backward({1, x.n, pre, pre + x.n, 0, d, x.n, dx.data(), dx.data() + x.n, 2 * x.n}, nullptr);
        } else {
          tc::gelu({x.n, pre, y.data(), erf}, nullptr);
          tc::gelu_backward({x.n, pre, d, dx.data(), erf}, nullptr);
        }
        const std::size_t width = static_cast<std::size_t>(x.n) * 2;
        CHECK(std::memcmp(y.data(), fused.activated.data() + i * fused.g.activated_row, width) == 0, x.name(), i);
        CHECK(std::memcmp(dx.data(), fused.c.data() + i * fused.g.c_row, width * (gated ? 2 : 1)) == 0, x.name(), i);
      }
    }
}

// Decode and training, and a row wherever it lies: one chain.
TEST(all_tiles_and_every_place_give_the_same_bits) {
  for (const Case& x : {Case{16, 200, 136}, Case{70, 80, 40, false, true}}) {
    for (Activation activation : {Activation::none, Activation::swiglu}) {
      const Result large = run(x, activation, true, tc::Tiles::large);
      for (tc::Tiles tiles : {tc::Tiles::medium, tc::Tiles::small}) CHECK(run(x, activation, true, tiles) == large, x.name());
    }
  }
  const Case across{80, 72, 60, true, true};
  CHECK(run(across, Activation::none, false, tc::Tiles::large) == run(across, Activation::none, false, tc::Tiles::medium));
  const Case tall{150, 72, 88};
  Operands<bf16> all(tall);
  tc::matmul(all.g, nullptr);
  for (int64_t first : {int64_t(0), int64_t(3), int64_t(127), int64_t(149)}) {
    Operands<bf16> one(tall);
    one.g.a = one.a.data() + first * one.g.a_row, one.g.m = 1;
    tc::matmul(one.g, nullptr);
    CHECK(std::memcmp(one.c.data(), all.c.data() + first * all.g.c_row, static_cast<std::size_t>(tall.n) * 2) == 0, first);
  }
  // and rows that are not aligned
  Operands<bf16> aligned(Case{20, 64, 64}), shifted(Case{20, 64, 64, false, false, 1});
  for (int64_t i = 0; i < 20; ++i)
    for (int64_t p = 0; p < 64; ++p) shifted.a[i * 65 + p] = aligned.a[i * 64 + p];
  for (int64_t j = 0; j < 64; ++j)
    for (int64_t p = 0; p < 64; ++p) shifted.b[j * 65 + p] = aligned.b[j * 64 + p];
  tc::matmul(aligned.g, nullptr), tc::matmul(shifted.g, nullptr);
  for (int64_t i = 0; i < 20; ++i) CHECK(std::memcmp(aligned.c.data() + i * 64, shifted.c.data() + i * 65, 128) == 0, i);
}

// P4: gradients of parts of a batch, one after the other, are those of the whole; with steps that no two sequences share.
TEST(a_sum_over_tokens_goes_on_where_it_was) {
  const std::vector<int32_t> lengths = {5, 16, 1, 37, 20};
  auto steps_of = [](const std::vector<int32_t>& part) {
    std::vector<int32_t> steps;
    int32_t first = 0;
    for (int32_t length : part) {
      for (int32_t i = 0; i < length; i += 16) steps.push_back(first + i), steps.push_back(std::min(16, length - i));
      first += length;
    }
    return copy_of(steps);
  };
  const Case x{40, 24, 79, true, true};
  auto gradient = [&](const std::vector<std::size_t>& cuts, bool with_steps) {
    Operands<bf16> o(x);
    Memory<float> c(x.m * x.n);
    int64_t token = 0;
    for (std::size_t i = 0; i + 1 < cuts.size(); ++i) {
      const std::vector<int32_t> part(lengths.begin() + static_cast<int64_t>(cuts[i]),
                                      lengths.begin() + static_cast<int64_t>(cuts[i + 1]));
      const Memory<int32_t> steps = steps_of(part);
      Matmul g = o.g;
      g.k = 0;
      for (int32_t length : part) g.k += length;
      g.a = o.a.data() + token * o.g.a_col, g.b = o.b.data() + token * o.g.b_row;
      g.c = c.data(), g.c_row = x.n, g.c_state = true, g.accumulate = i > 0;
      if (with_steps) g.k_steps = steps.data(), g.k_step_count = steps.size() / 2;
      tc::matmul(g, nullptr);
      token += g.k;
    }
    return c;
  };
  const Memory<float> whole = gradient({0, 5}, true);
  CHECK(gradient({0, 1, 3, 5}, true) == whole && gradient({0, 4, 5}, true) == whole);
  CHECK(!(gradient({0, 1, 3, 5}, false) == gradient({0, 5}, false)), "the borders of steps do not show");
  check_close("with and without steps", whole, gradient({0, 5}, false), 1e-5);
}

TEST(banks_do_not_conflict_and_sectors_are_whole) {
  for (const Case& x :
       {Case{128, 128, 64}, Case{16, 64, 64}, Case{128, 128, 64, false, true}, Case{128, 128, 64, true, true}}) {
    simt::Run counted({simt::Schedule::forward, 0, true});
    run(x), run(x, Activation::none, false, tc::Tiles::large);
    for (const simt::Launch& l : counted.launches) {
      CHECK(l.bank_conflicts == 0, x.name(), l.bank_conflicts, l.worst_bank_conflict);
      CHECK(l.excess_sectors == 0, x.name(), l.excess_sectors, l.worst_excess);
    }
  }
}

TEST(what_it_does_not_take_is_said) {
  Operands<bf16> o(Case{4, 8, 8});
  o.g.a_row = 9, o.g.a_col = 2;
  CHECK_THROWS(std::invalid_argument, "matmul: of each pair of strides one must be 1", tc::matmul(o.g, nullptr));
}
