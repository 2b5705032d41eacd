#include <bit>
#include <cmath>
#include <cstdint>

#include "engine/fixed_math.h"
#include "test.h"

using namespace tutelage;

TEST(exp_log_sin_cos_against_the_c_library_in_long_double) {
  for (int i = 1; i < 40000; ++i) {
    const double x = (i - 20000) * 0.031;
    const double e = static_cast<double>(std::exp(static_cast<long double>(x)));
    CHECK(std::abs(fixed_exp(x) - e) <= 1e-15 * e, "exp", x, fixed_exp(x), e);
    const double y = i * 0.017, l = static_cast<double>(std::log(static_cast<long double>(y)));
    CHECK(std::abs(fixed_log(y) - l) <= 1e-15 * std::fmax(1.0, std::abs(l)), "log", y, fixed_log(y), l);
    const double angle = i * 37.7;  // up to 1.5 million: positions of long contexts
    const SinCos value = fixed_sincos(angle);
    const auto exact = static_cast<long double>(angle);
    CHECK(std::abs(value.sin - static_cast<double>(std::sin(exact))) <= 1e-15, "sin", angle);
    CHECK(std::abs(value.cos - static_cast<double>(std::cos(exact))) <= 1e-15, "cos", angle);
  }
}

TEST(exact_points) {
  CHECK(fixed_exp(0) == 1.0);
  CHECK(fixed_log(1) == 0.0);
  CHECK(fixed_sincos(0).sin == 0.0 && fixed_sincos(0).cos == 1.0);
}

TEST(known_bits) {  // initial weights and rotary tables are made of these: a changed bit would change every model
  CHECK(std::bit_cast<std::uint64_t>(fixed_exp(1)) == 0x4005bf0a8b14576a, std::bit_cast<std::uint64_t>(fixed_exp(1)));
  CHECK(std::bit_cast<std::uint64_t>(fixed_log(10)) == 0x40026bb1bbb55516, std::bit_cast<std::uint64_t>(fixed_log(10)));
  CHECK(std::bit_cast<std::uint64_t>(fixed_sincos(100).sin) == 0xbfe03425b78c4db8,
        std::bit_cast<std::uint64_t>(fixed_sincos(100).sin));
}
