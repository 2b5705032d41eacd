#include "cuda/kernels/adamw.cuh"
#include "device.h"
#include "kernels/select.h"

using namespace test;
namespace tc = tutelage::cuda;

namespace {

struct State {
  Memory<float> p, g, m, v;
  Memory<bf16> copy;
  explicit State(int64_t n)
      : p(random_float(n, 1)), g(random_float(n, 2)), m(random_float(n, 3)), v(random_float(n, 4)), copy(n) {
    for (float& x : v) x *= x;
  }
  tutelage::AdamW arguments(int64_t begin, int64_t end) {
    return {end - begin,
            p.data() + begin,
            g.data() + begin,
            m.data() + begin,
            v.data() + begin,
            1e-2,
            0.9,
            0.95,
            1e-8,
            0.1,
            1 - 0.9 * 0.9 * 0.9,
            1 - 0.95 * 0.95 * 0.95,
            0.5};
  }
  bool operator==(const State& o) const { return p == o.p && m == o.m && v == o.v && copy == o.copy; }
};

State run(int64_t n, int64_t cut) {
  State s(n);
  for (auto [begin, end] : {std::pair<int64_t, int64_t>{0, cut}, {cut, n}})
    tc::adamw(s.arguments(begin, end), s.copy.data() + begin, nullptr);
  return s;
}

}  // namespace

TEST(a_step_is_the_cpus_and_the_copy_its_rounding) {
  for (int64_t n : {1, 4, 37, 1024, 3000}) {
    const State mine = every_schedule([&] { return run(n, 0); });
    State cpu(n);
    tutelage::scalar_table()->adamw(cpu.arguments(0, n), 1);
    CHECK(mine.p == cpu.p && mine.m == cpu.m && mine.v == cpu.v, n);
    for (int64_t i = 0; i < n; ++i) CHECK(mine.copy[i].bits == to_bf16(cpu.p[i]).bits, n, i);
    for (int64_t cut : {int64_t(1), n / 2, n - 1})
      if (n > 1) CHECK(run(n, cut) == mine, n, cut);  // where 16-byte accesses are not possible
    const State before(n);                            // and by the formula
    for (int64_t i = 0; i < n; ++i) {
      const double slope = before.g[i] * 0.5, mean = 0.9 * before.m[i] + 0.1 * slope,
                   square = 0.95 * before.v[i] + 0.05 * slope * slope;
      const double step = 1e-2 * (mean / (1 - 0.729)) / (std::sqrt(square / (1 - 0.857375)) + 1e-8);
      const double expected = before.p[i] * (1 - 1e-3) - step;
      CHECK(std::fabs(mine.p[i] - expected) < 1e-5, n, i, mine.p[i], expected);
    }
  }
}

TEST(no_copy_is_asked_for) {
  State s(8);
  tc::adamw(s.arguments(0, 8), nullptr, nullptr);
  CHECK(s.p == run(8, 0).p && s.copy[0].bits == 0xFFFF);
}

TEST(memory_is_read_and_written_in_whole_sectors) {
  check_memory_traffic("adamw", [] { run(4096, 0); });
}
