#include "cuda/kernels/total.cuh"
#include "device.h"

using namespace test;
namespace tc = tutelage::cuda;

namespace {

Memory<float> total_of(const Memory<float>& x, const std::vector<int32_t>& cuts, const Memory<std::uint8_t>* mask) {
  const Memory<int32_t> cu = copy_of(cuts);
  const int64_t segments = cuts.empty() ? 1 : cu.size() - 1;
  Memory<float> out(segments);
  tc::total({x.size(), x.data(), mask ? reinterpret_cast<const bool*>(mask->data()) : nullptr, segments,
             cuts.empty() ? nullptr : cu.data(), out.data()},
            nullptr);
  return out;
}
double squares_of(const Memory<float>& x) {
  Memory<double> parts(tc::squares_parts(x.size())), out(1);
  tc::sum_of_squares({x.size(), x.data(), out.data()}, parts.data(), nullptr);
  return out[0];
}
Memory<std::uint8_t> some(int64_t n) {
  Memory<std::uint8_t> mask(n);
  for (int64_t i = 0; i < n; ++i) mask[i] = uniform(9, i) > 0;
  return mask;
}

}  // namespace

TEST(sums_are_the_sums) {
  for (int64_t n : {0, 1, 31, 256, 4095, 4096, 4097, 10000}) {
    const Memory<float> x = random_float(n, 1);
    const Memory<std::uint8_t> mask = some(n);
    double all = 0, masked = 0, size = 0, squares = 0;
    for (int64_t i = 0; i < n; ++i) {
      all += x[i], size += std::fabs(x[i]), squares += double(x[i]) * x[i];
      if (mask[i]) masked += x[i];
    }
    CHECK(std::fabs(every_schedule([&] { return total_of(x, {}, nullptr); })[0] - all) <= 1e-6 * size, n);
    CHECK(std::fabs(total_of(x, {}, &mask)[0] - masked) <= 1e-6 * size, n);
    CHECK(std::fabs(every_schedule([&] { return squares_of(x); }) - squares) <= 1e-6 * squares, n);
  }
  const int64_t large = kSmall ? 300000 : 1100000;  // several parts
  const Memory<float> x = random_float(large, 3);
  double squares = 0;
  for (float e : x) squares += double(e) * e;
  CHECK(std::fabs(squares_of(x) - squares) < 1e-6 * squares, squares_of(x), squares);
}

TEST(a_segment_depends_on_its_own_elements_only) {
  const int64_t n = 9000;
  Memory<float> x = random_float(n, 1);
  const Memory<std::uint8_t> mask = some(n);
  const std::vector<int32_t> cuts = {0, 1, 1, 300, 4700, 9000};
  const Memory<float> together = every_schedule([&] { return total_of(x, cuts, &mask); });
  for (std::size_t s = 0; s + 1 < cuts.size(); ++s) {
    const int64_t begin = cuts[s], length = cuts[s + 1] - begin;
    Memory<float> own(length);
    Memory<std::uint8_t> own_mask(length);
    std::copy(x.begin() + begin, x.begin() + begin + length, own.begin());
    std::copy(mask.begin() + begin, mask.begin() + begin + length, own_mask.begin());
    const Memory<float> alone = total_of(own, {}, &own_mask);
    CHECK(std::memcmp(&alone[0], &together[static_cast<int64_t>(s)], 4) == 0, s, alone[0], together[static_cast<int64_t>(s)]);
  }
  // masked elements may hold anything; others may not be hidden
  for (int64_t i = 0; i < n; ++i)
    if (!mask[i]) x[i] = std::numeric_limits<float>::quiet_NaN();
  CHECK(total_of(x, cuts, &mask) == together);
  CHECK(std::isnan(total_of(x, cuts, nullptr)[4]));
}

TEST(memory_is_read_in_whole_sectors) {
  const Memory<float> x = random_float(8192, 1);
  check_memory_traffic("total", [&] { total_of(x, {}, nullptr), squares_of(x); });
}
