// The ceilings' work is counted right and done: what bench/ divides by.
#include "support.h"

using namespace test;

TEST(fma_peak_counts_the_work_of_all_threads) {
  for (const KernelTable* t : float_tables()) {
    double one = 0, three = 0, longer = 0;
    t->fma_peak({10, &one}, 1);
    t->fma_peak({10, &three}, 3);
    t->fma_peak({50, &longer}, 1);
    // at least 6 chains of 16 lanes, 2 flops each
    CHECK(one >= 10 * 6 * 16 * 2 && three == 3 * one && longer == 5 * one, t->name, one, three, longer);
  }
}

TEST(read_sweep_reads_every_element_in_every_sweep) {
  for (const KernelTable* t : float_tables())
    for (int64_t n : {0, 1, 63, 64, 65, 1000, 4099}) {
      std::vector<float> x(static_cast<std::size_t>(n));
      double expected = 0;
      for (int64_t i = 0; i < n; ++i) expected += x[static_cast<std::size_t>(i)] = static_cast<float>(i % 100);  // exact sums
      for (int threads = 1; threads <= 4; ++threads) {
        double sum = -1;
        t->read_sweep({n, 3, x.data(), &sum}, threads);
        CHECK(sum == 3 * expected, t->name, n, threads, sum, expected);
      }
    }
}
