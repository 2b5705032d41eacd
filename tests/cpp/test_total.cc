// total and sum_of_squares.
#include <algorithm>
#include <memory>

#include "support.h"

using namespace test;

namespace {

std::unique_ptr<bool[]> mask_of(int64_t n) {
  auto mask = std::make_unique<bool[]>(static_cast<std::size_t>(n));
  for (int64_t i = 0; i < n; ++i) mask[i] = i % 3 != 1;
  return mask;
}
template <class T>
T total_of(const KernelTable& t, const std::vector<T>& x, const bool* mask = nullptr, int threads = 1) {
  T out = kNan<T>;
  t.total({int64_t(x.size()), x.data(), mask, 1, nullptr, &out}, threads);
  return out;
}
const int64_t kLengths[] = {0, 1, 15, 16, 17, 100, 4095, 4096, 4097, 20011};

}  // namespace

TEST(sums_with_and_without_a_mask) {
  for (int64_t n : kLengths)
    for (bool masked : {false, true}) {
      const auto mask = mask_of(n);
      const std::vector<double> x = Source<double>{}(n, 1);
      wide expected = 0, squares = 0;
      for (int64_t i = 0; i < n; ++i) expected += masked && !mask[i] ? 0 : x[i], squares += wide(x[i]) * x[i];
      const double mine = total_of(*float64_table(), x, masked ? mask.get() : nullptr, 2);
      CHECK(std::fabs(mine - expected) <= 1e-12L * (1 + std::fabs(expected)), n, masked, mine);
      double square = -1;
      float64_table()->sum_of_squares({n, x.data(), &square}, 2);
      CHECK(std::fabs(square - squares) <= 1e-12L * (1 + squares), n, square);
      same_everywhere([&](const KernelTable& t, int threads, const Source<float>& in) {
        const std::vector<float> y = in(n, 1);
        double sum = -1;
        t.sum_of_squares({n, y.data(), &sum}, threads);
        return Outputs<float>{
            {total_of(t, y, masked ? mask.get() : nullptr, threads), float(sum), float(sum - double(float(sum)))}};
      });
    }
}

TEST(a_segment_alone_has_the_bits_it_has_among_others) {
  const std::vector<int32_t> cu_seqlens{0, 5, 5, 22, 4122, 8300, 8301};
  const int64_t n = cu_seqlens.back(), segments = int64_t(cu_seqlens.size()) - 1;
  const auto mask = mask_of(n);
  for (bool masked : {false, true}) {
    auto sums = [&](const KernelTable& t, int threads, std::vector<float> x) {
      std::vector<float> out = blank<float>(segments);
      t.total({n, x.data(), masked ? mask.get() : nullptr, segments, cu_seqlens.data(), out.data()}, threads);
      return out;
    };
    const std::vector<float> x = Source<float>{}(n, 1);
    const Outputs<float> mine = same_everywhere(
        [&](const KernelTable& t, int threads, const Source<float>& in) { return Outputs<float>{sums(t, threads, in(n, 1))}; });
    for (int64_t s = 0; s < segments; ++s) {
      const std::vector<float> part(x.begin() + cu_seqlens[s], x.begin() + cu_seqlens[s + 1]);
      const float alone = total_of(*scalar_table(), part, masked ? mask.get() + cu_seqlens[s] : nullptr);
      CHECK(same_bits(&mine[0][s], &alone, 1), masked, s, mine[0][s], alone);
      std::vector<float> dirty(x.size(), kNan<float>);  // every neighbour
      std::copy(part.begin(), part.end(), dirty.begin() + cu_seqlens[s]);
      const std::vector<float> among_nan = sums(*float_tables().back(), 2, dirty);
      CHECK(same_bits(&among_nan[s], &alone, 1), masked, s, among_nan[s]);
    }
    CHECK(mine[0][1] == 0, "an empty segment", mine[0][1]);
  }
}

TEST(nan_counts_unless_masked) {
  for (const KernelTable* t : float_tables())
    for (int64_t at : {0, 17, 4999}) {
      std::vector<float> x = Source<float>{}(5000, 1);
      const auto mask = std::make_unique<bool[]>(5000);
      std::fill_n(mask.get(), 5000, true);
      x[at] = kNan<float>;
      double squares = 0;
      t->sum_of_squares({5000, x.data(), &squares}, 1);
      CHECK(std::isnan(total_of(*t, x, mask.get())) && std::isnan(squares), t->name, at);
      mask[at] = false;
      const float masked = total_of(*t, x, mask.get());
      x[at] = 0;
      const float zero = total_of(*t, x);
      CHECK(same_bits(&masked, &zero, 1), t->name, at, masked, zero);
    }
}

TEST(control_another_order_gives_other_bits) {
  std::vector<float> x = Source<float>{}(20011, 1);
  const float forward = total_of(*scalar_table(), x);
  std::reverse(x.begin(), x.end());
  const float backward = total_of(*scalar_table(), x);
  CHECK(!same_bits(&forward, &backward, 1), forward, backward);
}
