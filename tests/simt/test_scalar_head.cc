#include "cuda/kernels/scalar_head.cuh"
#include "device.h"

using namespace test;
namespace tc = tutelage::cuda;

namespace {

struct Case {
  int64_t tokens, d, pad;
};

struct Operands {
  Memory<bf16> hidden, weight, d_hidden;
  Memory<float> d_values, values, d_weight;
  explicit Operands(const Case& c)
      : hidden(c.tokens * (c.d + c.pad)),
        weight(random_bf16(c.d, 2)),
        d_hidden(hidden.size()),
        d_values(random_float(c.tokens, 3)),
        values(c.tokens),
        d_weight(random_float(c.d, 4)) {
    for (int64_t t = 0; t < c.tokens; ++t)
      for (int64_t j = 0; j < c.d; ++j) hidden[t * (c.d + c.pad) + j] = to_bf16(static_cast<float>(uniform(1, t * c.d + j)));
  }
  void run(const Case& c, int64_t begin, int64_t end) {
    const int64_t row = c.d + c.pad;
    tc::scalar_head({end - begin, c.d, hidden.data() + begin * row, row, weight.data(), values.data() + begin}, nullptr);
    tc::scalar_head_backward({end - begin, c.d, hidden.data() + begin * row, row, weight.data(), d_values.data() + begin,
                              d_weight.data(), d_hidden.data() + begin * row},
                             nullptr);
  }
  bool operator==(const Operands& o) const { return values == o.values && d_weight == o.d_weight && d_hidden == o.d_hidden; }
};

}  // namespace

TEST(values_and_gradients_are_the_formula) {
  for (const Case& c : {Case{1, 1, 1}, {7, 37, 0}, {33, 64, 8}, {5, 1032, 8}, {2, 4100, 3}}) {
    const Operands mine = every_schedule([&] {
      Operands o(c);
      o.run(c, 0, c.tokens);
      return o;
    });
    const Operands start(c);
    std::vector<double> d_weight(start.d_weight.begin(), start.d_weight.end());
    for (int64_t t = 0; t < c.tokens; ++t) {
      double value = 0, size = 0;
      for (int64_t j = 0; j < c.d; ++j) {
        const double h = test::value(start.hidden[t * (c.d + c.pad) + j]), w = test::value(start.weight[j]);
        value += h * w, size += std::fabs(h * w);
        d_weight[static_cast<std::size_t>(j)] += start.d_values[t] * h;
        CHECK(mine.d_hidden[t * (c.d + c.pad) + j].bits == to_bf16(start.d_values[t] * static_cast<float>(w)).bits, t, j);
      }
      CHECK(std::fabs(mine.values[t] - value) <= 1e-6 * size, c.d, t, mine.values[t], value);
    }
    check_close("d_weight", mine.d_weight, d_weight, 1e-6);
    for (int64_t cut : {int64_t(1), c.tokens / 2}) {
      Operands parts(c);
      parts.run(c, 0, cut);
      parts.run(c, cut, c.tokens);
      CHECK(parts == mine, c.tokens, c.d, cut);
    }
  }
}

TEST(memory_is_read_and_written_in_whole_sectors) {
  const Case c{9, 512, 64};
  check_memory_traffic("scalar_head", [&] {
    Operands o(c);
    o.run(c, 0, c.tokens);
  });
}
