#include "engine/fixed_math.h"

#include <cmath>

namespace tutelage {

// nearbyint, ldexp and frexp are exact operations: they round nothing that could differ.

double fixed_exp(double x) {
  const double n = std::nearbyint(x * 1.4426950408889634);
  const double r = (x - n * 6.93145751953125e-1) - n * 1.42860682030941723212e-6;  // ln 2 in two parts
  double p = 1.0;
  for (int i = 18; i >= 1; --i) p = 1.0 + p * r / i;  // Taylor; 0.35^19 / 19! = 2e-26
  return std::ldexp(p, static_cast<int>(n));
}

double fixed_log(double x) {
  int e = 0;
  double m = std::frexp(x, &e);  // [0.5, 1)
  if (m < 0.70710678118654752) m *= 2, --e;
  const double s = (m - 1) / (m + 1), s2 = s * s;
  double p = 0;
  for (int i = 27; i >= 1; i -= 2) p = p * s2 + 1.0 / i;  // 2 atanh(s); 0.0295^14 / 29 = 1e-23
  return e * 6.93145751953125e-1 + (2 * s * p + e * 1.42860682030941723212e-6);
}

SinCos fixed_sincos(double x) {
  // x - n pi/2 with pi/2 in three parts of 33 bits each: n of up to 22 bits times a part is exact
  const double n = std::nearbyint(x * 0.63661977236758134);
  const double r = ((x - n * 1.57079632673412561417) - n * 6.07710050630396597660e-11) - n * 2.02226624871116645580e-21;
  const double r2 = r * r;
  double s = 1.0, c = 1.0;
  for (int i = 20; i >= 2; i -= 2) {
    s = 1.0 - s * r2 / (i * (i + 1));
    c = 1.0 - c * r2 / (i * (i - 1));
  }
  s *= r;
  switch (static_cast<long long>(n) & 3) {
    case 0: return {s, c};
    case 1: return {c, -s};
    case 2: return {-s, -c};
    default: return {-c, s};
  }
}

}  // namespace tutelage
