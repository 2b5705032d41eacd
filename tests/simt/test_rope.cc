#include "cuda/kernels/rope.cuh"
#include "device.h"
#include "kernels/select.h"

using namespace test;
namespace tc = tutelage::cuda;

namespace {

struct Case {
  int64_t tokens, heads, d, pad = 0;
  bool backward = false, in_place = false;
};
constexpr int64_t kPositions = 50;

template <class T>
struct Operands {
  Memory<T> x, y;
  Memory<int32_t> positions;
  Memory<float> cosines, sines;
  explicit Operands(const Case& c)
      : x(c.tokens * (c.heads * c.d + c.pad)),
        y(x.size()),
        positions(c.tokens),
        cosines(kPositions * c.d / 2),
        sines(cosines.size()) {
    for (int64_t i = 0; i < x.size(); ++i) {
      const bf16 b = to_bf16(static_cast<float>(uniform(1, i)));
      if constexpr (sizeof(T) == 2)
        x[i] = b, y[i] = {};
      else
        x[i] = to_float(b), y[i] = 0;
    }
    for (int64_t t = 0; t < c.tokens; ++t) positions[t] = static_cast<int32_t>((7 * t + 3) % kPositions);
    for (int64_t p = 0; p < kPositions; ++p)
      for (int64_t j = 0; j < c.d / 2; ++j) {
        const double angle =
            static_cast<double>(p) * std::pow(10000.0, -2.0 * static_cast<double>(j) / static_cast<double>(c.d));
        cosines[p * c.d / 2 + j] = static_cast<float>(std::cos(angle));
        sines[p * c.d / 2 + j] = static_cast<float>(std::sin(angle));
      }
  }
  tutelage::Rope arguments(const Case& c) {
    const int64_t row = c.heads * c.d + c.pad;
    return {c.tokens,         c.heads,        c.d,          x.data(),  row, c.in_place ? x.data() : y.data(), row,
            positions.data(), cosines.data(), sines.data(), c.backward};
  }
};

Memory<bf16> run(const Case& c) {
  Operands<bf16> o(c);
  tc::rope(o.arguments(c), nullptr);
  return c.in_place ? o.x : o.y;
}

template <class T>
std::vector<T> formula(const Case& c) {
  const Operands<float> o(c);
  std::vector<T> y(static_cast<std::size_t>(o.x.size()), T(0));
  const int64_t half = c.d / 2;
  for (int64_t t = 0; t < c.tokens; ++t)
    for (int64_t i = 0; i < c.heads * half; ++i) {
      const int64_t at = t * (c.heads * c.d + c.pad) + i / half * c.d + i % half, table = o.positions[t] * half + i % half;
      const T cosine(o.cosines[table]), sine(c.backward ? -o.sines[table] : o.sines[table]);
      const T x1(o.x[at]), x2(o.x[at + half]);
      y[static_cast<std::size_t>(at)] = x1 * cosine - x2 * sine;
      y[static_cast<std::size_t>(at + half)] = x2 * cosine + x1 * sine;
    }
  return y;
}

}  // namespace

TEST(close_to_double_and_the_cpus_bits) {
  for (Case c : {Case{1, 1, 8}, {5, 3, 24}, {7, 2, 64}, {33, 3, 80}, {4, 9, 128, 8}, {6, 2, 16, 3}})
    for (bool backward : {false, true}) {
      c.backward = backward;
      const Memory<bf16> mine = every_schedule([&] { return run(c); });
      check_error(text("rope", c.tokens, c.heads, c.d), mine, formula<double>(c), formula<Rounded>(c));
      Operands<float> cpu(c);
      tutelage::scalar_table()->rope(cpu.arguments(c), 1);
      for (int64_t i = 0; i < mine.size(); ++i) CHECK(mine[i].bits == to_bf16(cpu.y[i]).bits, c.d, i);
      Case same = c;
      same.in_place = true;
      const Memory<bf16> over = run(same);
      for (int64_t t = 0; t < c.tokens; ++t)
        for (int64_t j = 0; j < c.heads * c.d; ++j) {
          const int64_t i = t * (c.heads * c.d + c.pad) + j;
          CHECK(over[i].bits == mine[i].bits, c.d, i);
        }
    }
}

TEST(memory_is_read_and_written_in_whole_sectors) {
  check_memory_traffic("rope", [] { run({9, 4, 64}); });
}
