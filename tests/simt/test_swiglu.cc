#include "cuda/kernels/swiglu.cuh"
#include "device.h"
#include "kernels/select.h"

using namespace test;
namespace tc = tutelage::cuda;

namespace {

struct Case {
  int64_t rows, columns, pad;  // gate and up lie side by side in one matrix; pad: of y's rows
};

template <class T>
struct Operands {
  Memory<T> in, dy, y, d;
  explicit Operands(const Case& c) : in(c.rows * 2 * c.columns), dy(c.rows * (c.columns + c.pad)), y(dy.size()), d(in.size()) {
    fill(in, 1, 4), fill(dy, 2, 1);
    for (T& e : y) e = T{};
  }
  static void fill(Memory<T>& m, std::uint64_t seed, double scale) {
    for (int64_t i = 0; i < m.size(); ++i) {
      const bf16 b = to_bf16(static_cast<float>(scale * uniform(seed, i)));
      if constexpr (sizeof(T) == 2)
        m[i] = b;
      else
        m[i] = to_float(b);
    }
  }
  tutelage::Swiglu forward(const Case& c) {
    return {c.rows, c.columns, in.data(), in.data() + c.columns, 2 * c.columns, y.data(), c.columns + c.pad};
  }
  tutelage::SwigluBackward backward(const Case& c) {
    return {c.rows,    c.columns,         in.data(), in.data() + c.columns, 2 * c.columns,
            dy.data(), c.columns + c.pad, d.data(),  d.data() + c.columns,  2 * c.columns};
  }
  bool operator==(const Operands& o) const { return y == o.y && d == o.d; }
};

Operands<bf16> run(const Case& c) {
  Operands<bf16> o(c);
  tc::swiglu(o.forward(c), nullptr);
  tc::swiglu_backward(o.backward(c), nullptr);
  return o;
}

template <class T>
std::pair<std::vector<T>, std::vector<T>> formula(const Case& c) {
  const Operands<float> o(c);
  std::vector<T> y, d(static_cast<std::size_t>(o.in.size()));
  using std::exp;
  for (int64_t r = 0; r < c.rows; ++r)
    for (int64_t j = 0; j < c.columns + c.pad; ++j) {
      if (j >= c.columns) {
        y.push_back(T(0));
        continue;
      }
      const int64_t at = r * 2 * c.columns + j;
      const T gate(o.in[at]), up(o.in[at + c.columns]), dy(o.dy[r * (c.columns + c.pad) + j]), one(1);
      const T s = one / (one + exp(T(0) - gate)), silu = gate * s;
      y.push_back(silu * up);
      d[static_cast<std::size_t>(at)] = dy * up * (s + silu * (one - s));
      d[static_cast<std::size_t>(at + c.columns)] = dy * silu;
    }
  return {y, d};
}

}  // namespace

TEST(close_to_double_and_the_cpus_bits) {
  for (const Case& c : {Case{1, 1, 0}, {3, 5, 2}, {7, 64, 8}, {33, 136, 8}, {2, 2056, 1}}) {
    const Operands<bf16> mine = every_schedule([&] { return run(c); });
    const auto [y, d] = formula<double>(c);
    const auto [rounded_y, rounded_d] = formula<Rounded>(c);
    check_error(text("y", c.rows, c.columns), mine.y, y, rounded_y);
    check_error(text("gradients", c.rows, c.columns), mine.d, d, rounded_d);
    Operands<float> cpu(c);
    tutelage::scalar_table()->swiglu(cpu.forward(c), 1);
    tutelage::scalar_table()->swiglu_backward(cpu.backward(c), 1);
    for (int64_t i = 0; i < mine.y.size(); ++i) CHECK(mine.y[i].bits == to_bf16(cpu.y[i]).bits, c.columns, i);
    for (int64_t i = 0; i < mine.d.size(); ++i) CHECK(mine.d[i].bits == to_bf16(cpu.d[i]).bits, c.columns, i);
  }
}

TEST(memory_is_read_and_written_in_whole_sectors) {
  check_memory_traffic("swiglu", [] { run({5, 512, 64}); });
}
