// The comparisons that all tests of kernels rest on notice what they are there for.
#include <functional>

#include "cuda/ptx/memory.h"
#include "cuda/ptx/warp.h"
#include "device.h"

using namespace test;
using namespace tutelage::cuda;

namespace {

bool passes(const std::function<void()>& check) {  // what a failed check tells goes to stderr, and is expected here
  try {
    check();
  } catch (const Failure&) {
    return false;
  }
  return true;
}

static __global__ void last_writer(int* out) {
  if (threadIdx.x == 0) st_global(out, static_cast<int>(blockIdx.x));
}
static __global__ void spread(float* out, unsigned stride) {
  float* s = dyn_smem<float>();
  st_shared(s + threadIdx.x * stride, 1.0f);
  st_global(out + threadIdx.x, ld_shared(s + threadIdx.x * stride));
}

}  // namespace

TEST(an_error_of_more_than_twice_the_yardsticks_fails) {
  const std::vector<double> exact = {1, 2, -3}, yardstick = {1.01, 2, -3};
  auto off = [&](double by) { return std::vector<double>{1, 2 + by, -3}; };
  CHECK(passes([&] { check_error("close", off(0.019), exact, yardstick); }));
  CHECK(!passes([&] { check_error("far", off(0.021), exact, yardstick); }));
  CHECK(!passes([&] { check_error("no number", off(std::nan("")), exact, yardstick); }));
  CHECK(!passes([&] { check_close("far", off(0.004), exact, 1e-3); }) &&
        passes([&] { check_close("near", off(0.002), exact, 1e-3); }));
}

TEST(rounded_numbers_are_bf16_after_every_step) {
  const Rounded third = Rounded(1.0) / Rounded(3.0);
  CHECK(value(third) == to_float(to_bf16(1.0f / 3)), value(third));
  CHECK(value(Rounded(256.0) + Rounded(1.0)) == 256, value(Rounded(256.0) + Rounded(1.0)));
}

TEST(a_result_that_depends_on_the_order_of_blocks_fails) {
  CHECK(!passes([] {
    every_schedule([] {
      Memory<int> out(1);
      launch(last_writer, 5, 32, 0, nullptr, out.data());
      return out;
    });
  }));
}

TEST(traffic_that_is_not_whole_fails) {
  auto run = [](unsigned stride, int64_t first) {
    Memory<float> out(64);
    launch(spread, 1, 32, 32 * 4 * stride, nullptr, out.data() + first, stride);
  };
  CHECK(passes([&] { check_memory_traffic("whole", [&] { run(1, 0); }); }));
  CHECK(!passes([&] { check_memory_traffic("banks", [&] { run(2, 0); }); }));
  CHECK(!passes([&] { check_memory_traffic("sectors", [&] { run(1, 1); }); }));
}
