#include "cuda/kernels/column_sum.cuh"
#include "device.h"

using namespace test;

namespace {

struct Case {
  int64_t rows, d, pitch;
};

Memory<float> run(const Case& c, int64_t cut) {
  Memory<bf16> x(c.rows * c.pitch);
  for (int64_t r = 0; r < c.rows; ++r)
    for (int64_t j = 0; j < c.d; ++j) x[r * c.pitch + j] = to_bf16(static_cast<float>(uniform(1, r * c.d + j)));
  Memory<float> out = random_float(c.d, 2);
  for (auto [begin, end] : {std::pair<int64_t, int64_t>{0, cut}, {cut, c.rows}})
    tutelage::cuda::column_sum({end - begin, c.d, x.data() + begin * c.pitch, c.pitch, out.data()}, nullptr);
  return out;
}

std::vector<float> chain(const Case& c) {  // the definition, to the bit
  const Memory<float> start = random_float(c.d, 2);
  std::vector<float> sums(start.begin(), start.end());
  for (int64_t r = 0; r < c.rows; ++r)
    for (int64_t j = 0; j < c.d; ++j)
      sums[static_cast<std::size_t>(j)] += to_float(to_bf16(static_cast<float>(uniform(1, r * c.d + j))));
  return sums;
}

}  // namespace

TEST(one_chain_a_column_however_the_rows_are_cut) {
  for (const Case& c : {Case{1, 1, 1}, {31, 32, 32}, {32, 64, 72}, {33, 40, 40}, {100, 45, 46}, {163, 8, 9}, {0, 5, 5}}) {
    const std::vector<float> expected = chain(c);
    for (int64_t cut : {int64_t(0), c.rows / 3, c.rows - c.rows / 5})
      CHECK(floats(every_schedule([&] { return run(c, cut); })) == expected, c.rows, c.d, c.pitch, cut);
  }
  std::vector<float> backwards = chain({100, 45, 46});  // a control: another order is other bits
  std::vector<float> sums(45);
  for (int64_t r = 99; r >= 0; --r)
    for (int64_t j = 0; j < 45; ++j)
      sums[static_cast<std::size_t>(j)] += to_float(to_bf16(static_cast<float>(uniform(1, r * 45 + j))));
  CHECK(sums != backwards);
}

TEST(memory_is_read_in_whole_sectors_and_banks_do_not_conflict) {
  check_memory_traffic("column_sum", [] { run({130, 96, 96}, 0); });
}
