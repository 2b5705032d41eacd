// What the kernel tests share. Only two kinds of comparison: bits (our kernels against each other) and a tolerance (the
// float64 kernels against plain loops in long double).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "core/philox.h"
#include "kernels/select.h"
#include "test.h"

namespace test {

using namespace tutelage;
using std::int32_t;
using std::int64_t;
using wide = long double;

#if defined(TUTELAGE_SMALL_TESTS)
constexpr bool kSmall = true;
#else
constexpr bool kSmall = false;
#endif

template <class T>
using Outputs = std::vector<std::vector<T>>;

constexpr double kPad = 7.0;  // between rows; a kernel must leave it alone
template <class T>
constexpr T kNan = std::numeric_limits<T>::quiet_NaN();

// Inputs: uniform in [-1, 1), a function of (seed, index) alone; or NaN, to fill the kernels' scratch memory with it.
template <class T>
struct Source {
  bool nan = false;
  std::vector<T> operator()(int64_t n, std::uint64_t seed) const {
    std::vector<T> x(static_cast<std::size_t>(n), kNan<T>);
    for (int64_t i = 0; i < n && !nan; ++i) {
      const PhiloxCounter draw = philox4x32(seed, {static_cast<std::uint32_t>(i), 0, 0, 0});
      const std::int64_t bits = (std::int64_t(draw[0]) << 21 | draw[1] >> 11) - (std::int64_t(1) << 52);
      x[static_cast<std::size_t>(i)] = sizeof(T) == 4 ? static_cast<T>(static_cast<double>(bits >> 29) * 0x1p-23)
                                                      : static_cast<T>(static_cast<double>(bits) * 0x1p-52);
    }
    return x;
  }
};

template <class T>
std::vector<T> blank(int64_t n) {  // an output before it is written
  return std::vector<T>(static_cast<std::size_t>(n), kNan<T>);
}

template <class T>
bool same_bits(const T* x, const T* y, int64_t n) {
  return n == 0 || std::memcmp(x, y, static_cast<std::size_t>(n) * sizeof(T)) == 0;  // an empty vector's data may be null
}
template <class T>
bool same_bits(const std::vector<T>& x, const std::vector<T>& y) {
  return x.size() == y.size() && same_bits(x.data(), y.data(), static_cast<int64_t>(x.size()));
}
template <class T>
bool same_bits(const Outputs<T>& x, const Outputs<T>& y) {
  bool same = x.size() == y.size();
  for (std::size_t i = 0; same && i < x.size(); ++i) same = same_bits(x[i], y[i]);
  return same;
}

// The largest |x - reference| over the largest |reference|; infinity where one of the two is NaN.
inline double difference(const std::vector<double>& x, const std::vector<wide>& reference) {
  CHECK(x.size() == reference.size(), x.size(), reference.size());
  wide worst = 0, largest = 0;
  for (std::size_t i = 0; i < x.size(); ++i) {
    const wide distance = std::fabs(static_cast<wide>(x[i]) - reference[i]);
    if (std::isnan(distance)) return std::numeric_limits<double>::infinity();
    worst = std::fmax(worst, distance);
    largest = std::fmax(largest, std::fabs(reference[i]));
  }
  return static_cast<double>(worst == 0 ? 0 : worst / largest);
}

// Every float level that this CPU runs, scalar first.
inline std::vector<const KernelTable*> float_tables() {
  std::vector<const KernelTable*> tables;
  for (const Level& level : levels())
    if (level.supported) tables.insert(tables.begin(), level.table);
  return tables;
}

// run(table, threads, source) gives the same bits at every level, for 1 to 4 threads, on scratch memory full of NaN.
template <class Run>
Outputs<float> same_everywhere(const Run& run) {
  const Outputs<float> expected = run(*scalar_table(), 1, Source<float>{});
  for (const KernelTable* table : float_tables())
    for (int threads = 1; threads <= 4; ++threads) {
      run(*table, threads, Source<float>{true});
      const Outputs<float> mine = run(*table, threads, Source<float>{});
      for (std::size_t i = 0; i < expected.size(); ++i)
        CHECK(same_bits(mine[i], expected[i]), "output", i, "of level", table->name, "with threads", threads);
    }
  return expected;
}

// gradient[i] = d loss / d x[i], by central differences at up to 40 elements of x. `loss` reads x.
template <class Loss>
void check_gradient(const char* name, std::vector<double>& x, const std::vector<double>& gradient, const Loss& loss) {
  CHECK(x.size() == gradient.size(), name);
  const std::size_t stride = x.size() / 40 + 1;
  for (std::size_t i = 0; i < x.size(); i += stride) {
    const double step = 1e-5, kept = x[i];
    x[i] = kept + step;
    const double above = loss();
    x[i] = kept - step;
    const double slope = (above - loss()) / (2 * step);
    x[i] = kept;
    CHECK(std::fabs(slope - gradient[i]) <= 1e-7 * (1 + std::fabs(slope)), name, i, slope, gradient[i]);
  }
}
inline double dot(const std::vector<double>& x, const std::vector<double>& y) {
  double sum = 0;
  for (std::size_t i = 0; i < x.size(); ++i) sum += x[i] * y[i];
  return sum;
}

}  // namespace test
