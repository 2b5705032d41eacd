// What the tests of kernels share: memory as a kernel is given it, schedules, and the rule that decides how much error is
// allowed.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <string>
#include <vector>

#include "core/philox.h"
#include "cuda/ptx/bf16.h"
#include "cuda/simt/simt.h"
#include "test.h"

namespace test {

using std::int32_t;
using std::int64_t;
using tutelage::cuda::bf16;
using tutelage::cuda::to_bf16;
using tutelage::cuda::to_float;

#if defined(TUTELAGE_SMALL_TESTS)
constexpr bool kSmall = true;
#else
constexpr bool kSmall = false;
#endif

// Global memory: aligned as cudaMalloc's, exactly as long as asked for (so that AddressSanitizer's red zone begins right behind
// the last element), and full of NaN (0xFF) until it is written.
template <class T>
class Memory {
 public:
  explicit Memory(int64_t n = 0) : size_(static_cast<std::size_t>(n)) {
    void* p = nullptr;
    if (posix_memalign(&p, 256, size_ * sizeof(T) + (size_ == 0)) != 0) throw std::bad_alloc();
    std::memset(p, 0xFF, size_ * sizeof(T));
    data_ = static_cast<T*>(p);
  }
  Memory(const Memory& other) : Memory(static_cast<int64_t>(other.size_)) {
    if (size_ > 0) std::memcpy(data_, other.data_, size_ * sizeof(T));
  }
  Memory(Memory&& other) noexcept : data_(other.data_), size_(other.size_) { other.data_ = nullptr, other.size_ = 0; }
  Memory& operator=(Memory other) noexcept {
    std::swap(data_, other.data_), std::swap(size_, other.size_);
    return *this;
  }
  ~Memory() { std::free(data_); }
  T* data() { return data_; }
  const T* data() const { return data_; }
  int64_t size() const { return static_cast<int64_t>(size_); }
  T& operator[](int64_t i) { return data_[i]; }
  const T& operator[](int64_t i) const { return data_[i]; }
  T* begin() { return data_; }
  T* end() { return data_ + size_; }
  const T* begin() const { return data_; }
  const T* end() const { return data_ + size_; }
  bool operator==(const Memory& other) const {
    return size_ == other.size_ && (size_ == 0 || std::memcmp(data_, other.data_, size_ * sizeof(T)) == 0);
  }

 private:
  T* data_ = nullptr;
  std::size_t size_ = 0;
};

// Uniform in [-1, 1), a function of (seed, index) alone.
inline double uniform(std::uint64_t seed, int64_t i) {
  const tutelage::PhiloxCounter draw =
      tutelage::philox4x32(seed, {static_cast<std::uint32_t>(i), static_cast<std::uint32_t>(i >> 32), 0, 0});
  return (draw[0] + 0.5) * 0x1p-31 - 1;
}
inline Memory<bf16> random_bf16(int64_t n, std::uint64_t seed, double scale = 1) {
  Memory<bf16> x(n);
  for (int64_t i = 0; i < n; ++i) x[i] = to_bf16(static_cast<float>(scale * uniform(seed, i)));
  return x;
}
inline Memory<float> random_float(int64_t n, std::uint64_t seed, double scale = 1) {
  Memory<float> x(n);
  for (int64_t i = 0; i < n; ++i) x[i] = static_cast<float>(scale * uniform(seed, i));
  return x;
}
template <class T>
Memory<T> copy_of(const std::vector<T>& v) {
  Memory<T> x(static_cast<int64_t>(v.size()));
  for (int64_t i = 0; i < x.size(); ++i) x[i] = v[static_cast<std::size_t>(i)];
  return x;
}

inline double value(bf16 x) { return to_float(x); }
inline double value(float x) { return x; }
inline double value(double x) { return x; }
template <class C>
std::vector<float> floats(const C& x) {
  std::vector<float> out;
  for (const auto& e : x) out.push_back(static_cast<float>(value(e)));
  return out;
}

// A number whose every operation is rounded to bf16: what an eager bf16 computation makes of a formula. A formula written once
// as a template over its number type is the reference (double) and the yardstick (Rounded).
class Rounded {
 public:
  Rounded() = default;
  Rounded(double x) : x_(to_float(to_bf16(static_cast<float>(x)))) {}
  explicit operator double() const { return x_; }
  friend Rounded operator+(Rounded a, Rounded b) { return a.x_ + b.x_; }
  friend Rounded operator-(Rounded a, Rounded b) { return a.x_ - b.x_; }
  friend Rounded operator*(Rounded a, Rounded b) { return a.x_ * b.x_; }
  friend Rounded operator/(Rounded a, Rounded b) { return a.x_ / b.x_; }
  friend Rounded sqrt(Rounded a) { return std::sqrt(a.x_); }
  friend Rounded exp(Rounded a) { return std::exp(a.x_); }
  friend Rounded log(Rounded a) { return std::log(a.x_); }
  friend Rounded tanh(Rounded a) { return std::tanh(a.x_); }
  friend Rounded erfc(Rounded a) { return std::erfc(a.x_); }

 private:
  double x_ = 0;
};
inline double value(Rounded x) { return static_cast<double>(x); }

// The largest |x - reference|; infinity where one of the two is NaN.
template <class X, class R>
double largest_error(const X& x, const R& reference) {
  CHECK(static_cast<int64_t>(x.size()) == static_cast<int64_t>(reference.size()), x.size(), reference.size());
  double worst = 0;
  auto r = reference.begin();
  for (const auto& e : x) {
    const double distance = std::fabs(value(e) - value(*r++));
    if (!(distance <= worst)) worst = std::isnan(distance) ? std::numeric_limits<double>::infinity() : distance;
  }
  return worst;
}

// The rule of FlashAttention's tests: our error against the exact result (and against the CPU's kernels, whose own error is of
// another order) is at most twice that of an eager bf16 computation. Where that happens to have none, half a unit in the last
// place of the result is allowed.
template <class X, class R, class Y>
void check_error(const std::string& name, const X& mine, const R& exact, const Y& yardstick) {
  double largest = 0;
  for (const auto& e : exact) largest = std::fmax(largest, std::fabs(value(e)));
  const double error = largest_error(mine, exact), allowed = std::fmax(2 * largest_error(yardstick, exact), largest * 0x1p-9);
  CHECK(error <= allowed, name, "error", error, "of", largest, "is more than", allowed);
}
template <class X, class R>
void check_close(const std::string& name, const X& mine, const R& exact, double tolerance) {
  double largest = 0;
  for (const auto& e : exact) largest = std::fmax(largest, std::fabs(value(e)));
  const double error = largest_error(mine, exact);
  CHECK(error <= tolerance * largest, name, "error", error, "of", largest, "is more than", tolerance, "times it");
}

// run() gives the same under every order of lanes, warps and blocks; its result of the forward order.
template <class Run>
auto every_schedule(const Run& run) {
  auto under = [&](simt::Schedule schedule, std::uint64_t seed) {
    const simt::Run settings({schedule, seed, false});
    return run();
  };
  auto expected = under(simt::Schedule::forward, 0);
  CHECK(under(simt::Schedule::reversed, 0) == expected, "the reversed order gives other bits");
  for (std::uint64_t seed = 1; seed <= (kSmall ? 1 : 3); ++seed)
    CHECK(under(simt::Schedule::random, seed) == expected, "a random order gives other bits, seed", seed);
  return expected;
}

// run()'s launches make no bank conflict and move no sector that they do not fill.
template <class Run>
void check_memory_traffic(const std::string& name, const Run& run) {
  simt::Run counted({simt::Schedule::forward, 0, true});
  run();
  CHECK(!counted.launches.empty(), name);
  for (const simt::Launch& l : counted.launches) {
    CHECK(l.global_accesses > 0, name, "no access was counted");
    CHECK(l.bank_conflicts == 0, name, l.bank_conflicts, "bank conflicts, most at", l.worst_bank_conflict);
    CHECK(l.excess_sectors == 0, name, l.excess_sectors, "sectors too many, most at", l.worst_excess);
  }
}

}  // namespace test
