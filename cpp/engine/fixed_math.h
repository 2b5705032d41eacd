// exp, log, sin and cos in double from +, -, x and / alone, so that tables and initial weights have the same bits on every
// machine (the C library's functions differ between versions). About 1e-15 accurate; finite arguments only.
// Test: tests/cpp/test_fixed_math.cc.
#pragma once

namespace tutelage {

double fixed_exp(double x);  // |x| < 708
double fixed_log(double x);  // normal x > 0
struct SinCos {
  double sin, cos;
};
SinCos fixed_sincos(double x);  // |x| < 2^22

}  // namespace tutelage
