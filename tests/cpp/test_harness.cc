// Negative controls of the two comparisons that every other file relies on.
#include "support.h"

using namespace test;

TEST(same_bits_sees_one_flipped_low_bit_and_the_sign_of_zero) {
  const std::vector<float> x = Source<float>{}(100, 1);
  for (std::size_t i : {0, 50, 99}) {
    std::vector<float> y = x;
    CHECK(same_bits(x, y));
    y[i] = std::nextafter(y[i], 2.0f);
    CHECK(!same_bits(x, y), i);
    CHECK(!same_bits(Outputs<float>{x, x}, Outputs<float>{x, y}), i);
  }
  CHECK(!same_bits(std::vector<float>{0.0f}, std::vector<float>{-0.0f}));
  CHECK(!same_bits(x, std::vector<float>(x.begin(), x.end() - 1)));
}

TEST(same_everywhere_sees_a_level_a_thread_count_and_a_read_of_stale_memory) {
  auto caught = [](auto wrong) {
    try {
      same_everywhere([&](const KernelTable& t, int threads, const Source<float>& in) {
        return Outputs<float>{{wrong(t, threads, in) ? 1.0f : 0.0f}};
      });
    } catch (const Failure&) {
      return true;
    }
    return false;
  };
  std::fprintf(stderr, "(the failures that follow are negative controls)\n");
  CHECK(!caught([](const KernelTable&, int, const Source<float>&) { return false; }));
  CHECK(caught([](const KernelTable& t, int, const Source<float>&) { return &t == float_tables().back(); }) ==
        (float_tables().size() > 1));
  CHECK(caught([](const KernelTable&, int threads, const Source<float>&) { return threads == 4; }));
  float scratch = 0;
  CHECK(caught([&](const KernelTable&, int, const Source<float>& in) {
    const bool stale = std::isnan(scratch);
    scratch = in(1, 1)[0];
    return stale;
  }));
}

TEST(difference_sees_small_errors_and_nan) {
  CHECK(difference({1.0, 2.0}, {1.0L, 2.0L}) == 0);
  CHECK(difference({1.0, 2.0 + 1e-11}, {1.0L, 2.0L}) > 1e-12);
  CHECK(difference({1.0, kNan<double>}, {1.0L, 2.0L}) > 1);
}

TEST(a_wrong_message_or_no_exception_is_a_failure) {
  auto caught = [](auto body) {
    try {
      body();
    } catch (const Failure&) {
      return true;
    }
    return false;
  };
  CHECK(caught([] { CHECK_THROWS(std::runtime_error, "one", throw std::runtime_error("two")); }));
  CHECK(caught([] { CHECK_THROWS(std::runtime_error, "one", (void)0); }));
}
