#include "engine/fixed_math.h"

#include <bit>
#include <cstdint>

namespace tutelage {

namespace {

// 1, 1/step!, ...: coefficient i of a Taylor series, (first + i * step)! in the denominator, signs alternating or not.
template <int terms>
struct Series {
  double at[terms];
};
template <int terms>
constexpr Series<terms> taylor(int first, int step, double sign) {
  Series<terms> series{};
  double factorial = 1;
  for (int i = 1; i <= first; ++i) factorial *= i;
  double signed_one = 1;
  for (int i = 0; i < terms; ++i) {
    series.at[i] = signed_one / factorial;
    for (int k = 1; k <= step; ++k) factorial *= first + i * step + k;
    signed_one *= sign;
  }
  return series;
}
template <int terms>
constexpr Series<terms> odd_reciprocals() {
  Series<terms> series{};
  for (int i = 0; i < terms; ++i) series.at[i] = 1.0 / (2 * i + 1);
  return series;
}
template <int terms>
double horner(const Series<terms>& series, double x) {
  double sum = series.at[terms - 1];
  for (int i = terms - 2; i >= 0; --i) sum = sum * x + series.at[i];
  return sum;
}

constexpr auto kExp = taylor<16>(0, 1, 1);      // 0.3466^16 / 16! = 2e-21
constexpr auto kSin = taylor<10>(1, 2, -1);     // (pi/4)^21 / 21! = 1e-22
constexpr auto kCos = taylor<10>(0, 2, -1);     // (pi/4)^20 / 20! = 3e-21
constexpr auto kAtanh = odd_reciprocals<12>();  // 0.0295^12 / 25 = 2e-20

}  // namespace

namespace {

// Nearest whole number, ties to even, for |x| < 2^51: adding 1.5 x 2^52 leaves no bits for a fraction.
double nearest(double x) {
  constexpr double big = 6755399441055744.0;
  return (x + big) - big;
}
double power_of_two(std::int64_t n) {  // n in [-1022, 1023]
  return std::bit_cast<double>(static_cast<std::uint64_t>(n + 1023) << 52);
}

}  // namespace

double fixed_exp(double x) {
  const double n = nearest(x * 1.4426950408889634);
  const double r = (x - n * 6.93145751953125e-1) - n * 1.42860682030941723212e-6;  // ln 2 in two parts
  const auto whole = static_cast<std::int64_t>(n), half = whole / 2;               // in two steps: results below 2^-1022 too
  return horner(kExp, r) * power_of_two(half) * power_of_two(whole - half);
}

double fixed_log(double x) {
  // x = m 2^e with m in [sqrt(1/2), sqrt(2)): the exponent field, counted from sqrt(1/2)
  constexpr std::uint64_t origin = 0x3fe6a09e667f3bcd, mantissa = 0x000fffffffffffff;
  const std::uint64_t bits = std::bit_cast<std::uint64_t>(x) - origin;
  const double m = std::bit_cast<double>((bits & mantissa) + origin);
  const auto e = static_cast<double>(static_cast<std::int64_t>(bits) >> 52);
  const double s = (m - 1) / (m + 1), s2 = s * s;
  return e * 6.93145751953125e-1 + (2 * s * horner(kAtanh, s2) + e * 1.42860682030941723212e-6);  // log m = 2 atanh(s)
}

SinCos fixed_sincos(double x) {
  // x - n pi/2 with pi/2 in three parts of 33 bits each: n of up to 22 bits times a part is exact
  const double n = nearest(x * 0.63661977236758134);
  const double r = ((x - n * 1.57079632673412561417) - n * 6.07710050630396597660e-11) - n * 2.02226624871116645580e-21;
  const double r2 = r * r;
  const double s = horner(kSin, r2) * r, c = horner(kCos, r2);
  switch (static_cast<long long>(n) & 3) {
    case 0:
      return {s, c};
    case 1:
      return {c, -s};
    case 2:
      return {-s, -c};
    default:
      return {-c, s};
  }
}

}  // namespace tutelage
