// The machine's ceilings, timed: what bench/ and `tutelage doctor` state speeds as fractions of. Test:
// tests/python/test_bench.py.
#include <pybind11/pybind11.h>

#include <chrono>
#include <string>

#include "bind/dlpack.h"
#include "core/error.h"
#include "kernels/select.h"

namespace py = pybind11;

namespace tutelage {
namespace {

using namespace py::literals;

// The best level that this CPU can run, whatever level is in use: a ceiling belongs to the machine.
const KernelTable& machine_table() {
  for (const Level& level : levels())
    if (level.supported) return *level.table;
  return *scalar_table();
}

void check(int threads, double seconds) {
  if (threads < 1) throw ArgumentError("threads must be at least 1, but it is " + std::to_string(threads));
  if (!(seconds > 0 && seconds <= 60)) throw ArgumentError("seconds must lie in (0, 60], but it is " + std::to_string(seconds));
}

// Work per second of calls work(rounds), twice the rounds each time, until `seconds` have passed: no call decides by itself how
// long the next one is, so a moment without a core costs that moment only.
template <class Work>
double rate(double seconds, std::int64_t rounds, const Work& work) {
  using Clock = std::chrono::steady_clock;
  const Clock::time_point start = Clock::now();
  for (double done = 0;; rounds *= 2) {
    done += work(rounds);
    const double elapsed = std::chrono::duration<double>(Clock::now() - start).count();
    if (elapsed >= seconds) return done / elapsed;
  }
}

double fma_peak(int threads, double seconds) {
  check(threads, seconds);
  const py::gil_scoped_release release;
  return 1e-9 * rate(seconds, 4096, [&](std::int64_t rounds) {  // from some 50 us on
           double flops = 0;
           machine_table().fma_peak({rounds, &flops}, threads);
           return flops;
         });
}

double read_bandwidth(py::handle tensor, int threads, double seconds) {
  check(threads, seconds);
  const TensorArgument x(tensor, "x");
  x.view.require_cpu().require_dtype(DType::float32).require_shape({-1}).require_contiguous();
  const std::int64_t n = x.extent(0);
  if (n < 1024) throw ArgumentError("x must have at least 1024 elements, but it has " + std::to_string(n));
  const py::gil_scoped_release release;
  double sum = 0;
  return 1e-9 * rate(seconds, 1, [&](std::int64_t rounds) {
           machine_table().read_sweep({n, rounds, x.view.data, &sum}, threads);
           return static_cast<double>(rounds) * static_cast<double>(n) * sizeof(float);
         });
}

}  // namespace

void bind_ceilings(py::module_& m) {
  m.def(
      "fma_peak", &fma_peak, "threads"_a, "seconds"_a = 0.2,
      "GFLOP/s of fused float32 multiply-adds on so many threads, measured for at least so many seconds; kernels/ceilings.h.");
  m.def("read_bandwidth", &read_bandwidth, "x"_a, "threads"_a, "seconds"_a = 0.2,
        "GB/s of reading x, float32 [n], over and over on so many threads: memory, or a cache that it fits in.");
}

}  // namespace tutelage
