// Every function of cuda/ptx/, as the emulator carries it out, against its definition.
#include <algorithm>

#include "cuda/ptx/atomic.h"
#include "cuda/ptx/barrier.h"
#include "cuda/ptx/cp_async.h"
#include "cuda/ptx/ldmatrix.h"
#include "cuda/ptx/math.h"
#include "cuda/ptx/mma.h"
#include "cuda/ptx/warp.h"
#include "device.h"

using namespace test;
namespace tc = tutelage::cuda;
using namespace tutelage::cuda;

namespace {

// --- bf16 ---

bf16 rounded_by_division(float x) {  // to nearest, ties to even, from the definition
  int exponent;
  const double fraction = std::frexp(static_cast<double>(x), &exponent);  // 8 bits of precision, fewer below 2^-126
  const int bits = std::min(8, exponent + 133);                           // the smallest bf16 is 2^-133
  double r = std::ldexp(std::nearbyint(std::ldexp(fraction, bits)), exponent - bits);
  if (std::fabs(r) > 3.3895313892515355e38) r = std::copysign(std::numeric_limits<double>::infinity(), r);
  return {static_cast<std::uint16_t>(as_bits(static_cast<float>(r)) >> 16)};
}

}  // namespace

TEST(bf16_rounds_to_nearest_even) {
  for (std::uint32_t high = 0; high < 0xFFFF; high += 7)
    for (std::uint32_t low : {0u, 1u, 0x7FFFu, 0x8000u, 0x8001u, 0xFFFFu}) {
      const float x = as_float(high << 16 | low);
      if (std::isnan(x)) {
        CHECK(to_bf16(x).bits == 0x7FFF, high, low);
      } else if (std::isfinite(x)) {
        CHECK(to_bf16(x).bits == rounded_by_division(x).bits, high, low, x);
      } else {
        CHECK(to_float(to_bf16(x)) == x, x);
      }
    }
  CHECK(to_float(bf16{0x3F80}) == 1 && to_float(bf16{0xC020}) == -2.5f);
  const std::uint32_t pair = pack_bf16x2(1.0f, -2.5f);
  CHECK(pair == 0xC0203F80u && low_of(pair) == 1 && high_of(pair) == -2.5f, pair);
}

TEST(exp2_keeps_its_promises) {
  for (double x = -125.5; x < 127; x += 0.37) {
    const double y = exp2_approx(static_cast<float>(x)), exact = std::exp2(static_cast<double>(static_cast<float>(x)));
    CHECK(std::fabs(y / exact - 1) < 0x1p-22, x, y, exact);
  }
  const float infinity = std::numeric_limits<float>::infinity();
  CHECK(exp2_approx(0) == 1 && exp2_approx(-infinity) == 0 && exp2_approx(-127) == 0 && exp2_approx(200) == infinity);
  CHECK(std::isnan(exp2_approx(std::nanf(""))) && maximum(std::nanf(""), 2) == 2);
  CHECK(tc::fma(0x1.000004p0f, 0x1.000004p0f, -1) == 0x1.000002p-21f, tc::fma(0x1.000004p0f, 0x1.000004p0f, -1));
}

// --- mma, ldmatrix ---

namespace {

// C (16 x 8) = A (16 x 16) B^T (B: 8 x 16), A and B by ldmatrix from memory copied by cp.async.
template <bool Two>
static __global__ void one_tile(const bf16* a, const bf16* b, float* c) {
  bf16 *sa = dyn_smem<bf16>(), *sb = sa + 16 * 16;
  const unsigned lane = lane_id();
  cp_async_16(sa + 8 * lane, a + 8 * lane);
  if (lane < 16) cp_async_16(sb + 8 * lane, b + 8 * lane);
  cp_async_commit();
  cp_async_wait_group<0>();
  __syncwarp();
  std::uint32_t fa[4], fb[2];
  ldmatrix_x4(fa, sa + lane % 16 * 16 + lane / 16 * 8);
  ldmatrix_x2(fb, sb + lane % 8 * 16 + lane / 8 % 2 * 8);
  float d[4] = {0, 0, 0, 0};
  mma_m16n8k16_bf16(d, fa, fb);
  if (Two) mma_m16n8k16_bf16(d, fa, fb);
  for (unsigned i = 0; i < 4; ++i) st_global(c + (lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2, d[i]);
}

// out[lane * 4 + i] = register i of an ldmatrix over 4 matrices that lie one behind the other
template <int Kind>
static __global__ void matrices(const bf16* in, std::uint32_t* out) {
  bf16* s = dyn_smem<bf16>();
  const unsigned lane = lane_id();
  for (unsigned i = lane; i < 4 * 64; i += 32) st_shared(s + i, ld_global(in + i));
  __syncwarp();
  std::uint32_t r[4] = {0, 0, 0, 0}, half[2];
  if (Kind == 0) ldmatrix_x4(r, s + lane * 8);
  if (Kind == 1) ldmatrix_x4_trans(r, s + lane * 8);
  // the addresses of lanes 16 … 31 are not used
  if (Kind == 2) ldmatrix_x2(half, lane < 16 ? s + lane * 8 : nullptr);
  if (Kind == 3) ldmatrix_x2_trans(half, lane < 16 ? s + lane * 8 : nullptr);
  if (Kind >= 2) r[0] = half[0], r[1] = half[1];
  for (unsigned i = 0; i < 4; ++i) st_global(out + lane * 4 + i, r[i]);
}

}  // namespace

TEST(a_tile_is_the_product) {
  const Memory<bf16> a = random_bf16(256, 1), b = random_bf16(128, 2);
  auto product = [&](bool two) {
    return every_schedule([&] {
      Memory<float> c(128);
      launch(two ? one_tile<true> : one_tile<false>, 1, 32, 24 * 16 * 2, nullptr, a.data(), b.data(), c.data());
      return c;
    });
  };
  const Memory<float> once = product(false), twice = product(true);
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 8; ++j) {
      double exact = 0;
      for (int k = 0; k < 16; ++k) exact += value(a[i * 16 + k]) * value(b[j * 16 + k]);
      CHECK(std::fabs(once[i * 8 + j] - exact) < 1e-6, i, j, once[i * 8 + j], exact);
      CHECK(std::fabs(twice[i * 8 + j] - 2 * exact) < 1e-6, i, j, twice[i * 8 + j], exact);
    }
}

TEST(ldmatrix_deals_out_rows_and_columns) {
  Memory<bf16> in(256);
  for (int i = 0; i < 256; ++i) in[i] = {static_cast<std::uint16_t>(i)};
  void (*const kinds[])(const bf16*, std::uint32_t*) = {matrices<0>, matrices<1>, matrices<2>, matrices<3>};
  for (int kind = 0; kind < 4; ++kind) {
    const auto out = every_schedule([&] {
      Memory<std::uint32_t> r(128);
      launch(kinds[kind], 1, 32, 512, nullptr, in.data(), r.data());
      return r;
    });
    for (unsigned lane = 0; lane < 32; ++lane)
      for (unsigned i = 0; i < (kind < 2 ? 4u : 2u); ++i) {
        const unsigned row = lane / 4, column = 2 * (lane % 4);
        const unsigned first = 64 * i + (kind % 2 ? column * 8 + row : row * 8 + column);
        CHECK(out[lane * 4 + i] == (first | (first + (kind % 2 ? 8 : 1)) << 16), kind, lane, i, out[lane * 4 + i]);
      }
  }
}

// --- cp.async ---

namespace {

// Four chunks through two buffers, one group ahead.
static __global__ void two_stages(const std::uint32_t* in, std::uint32_t* out, unsigned bytes) {
  auto* s = dyn_smem<Pack<std::uint32_t, 4>>();
  const unsigned lane = lane_id();
  auto fetch = [&](unsigned chunk) {
    if (chunk < 4) cp_async_16(s + (chunk % 2) * 32 + lane, in + (chunk * 32 + lane) * 4, chunk == 3 ? bytes : 16);
    cp_async_commit();
  };
  fetch(0);
  for (unsigned chunk = 0; chunk < 4; ++chunk) {
    fetch(chunk + 1);
    cp_async_wait_group<1>();
    __syncwarp();
    const auto v = ld_shared(s + (chunk % 2) * 32 + (lane ^ 1));  // another lane's
    st_global(reinterpret_cast<Pack<std::uint32_t, 4>*>(out) + chunk * 32 + lane, v);
    __syncwarp();
  }
}

}  // namespace

TEST(asynchronous_copies_land_in_their_groups) {
  Memory<std::uint32_t> in(4 * 32 * 4);
  for (int64_t i = 0; i < in.size(); ++i) in[i] = 0x01010101u * static_cast<std::uint32_t>(i % 251);
  for (unsigned bytes : {16u, 12u, 2u, 1u, 0u}) {
    const auto out = every_schedule([&] {
      Memory<std::uint32_t> r(in.size());
      launch(two_stages, 1, 32, 2 * 32 * 16, nullptr, in.data(), r.data(), bytes);
      return r;
    });
    for (int64_t i = 0; i < in.size() * 4; ++i) {
      const int64_t from = i ^ 16;
      const bool beyond = i >= 3 * 512 && i % 16 >= bytes;
      const auto x = reinterpret_cast<const unsigned char*>(out.data())[i];
      CHECK(x == (beyond ? 0 : reinterpret_cast<const unsigned char*>(in.data())[from]), bytes, i, int(x));
    }
  }
}

// --- warps, barriers, atomics ---

namespace {

static __global__ void exchanges(int* out) {
  const unsigned lane = lane_id();
  const int own = static_cast<int>(lane * lane);
  out += (blockIdx.x * blockDim.x + threadIdx.x) * 6;
  const float f = shfl_xor(0.5f * static_cast<float>(lane), 1);
  st_global(out, shfl_xor(own, 5));
  st_global(out + 1, shfl(own, 31 - lane));
  st_global(out + 2, shfl_up(own, 3));
  st_global(out + 3, shfl_down(own, 3));
  st_global(out + 4, static_cast<int>(ballot(lane % 3 == 0)));
  st_global(out + 5, static_cast<int>(2 * f));
}

// Warps 0 and 1 exchange through barrier 1, warps 2 and 3 through barrier 2; warp 4 only announces what it wrote, to warp 5.
static __global__ void groups(int* out) {
  int* s = dyn_smem<int>();
  const unsigned t = threadIdx.x, warp = t / 32;
  if (warp < 4) {
    for (int round = 0; round < 3; ++round) {
      st_shared(s + t, static_cast<int>(t) * 10 + round);
      barrier_sync(1 + warp / 2, 64);
      st_global(out + t * 3 + round, ld_shared(s + (t ^ 32)));
      barrier_sync(1 + warp / 2, 64);
    }
  } else if (warp == 4) {
    st_shared(s + t, 7);
    barrier_arrive(5, 64);
  } else {
    barrier_sync(5, 64);
    st_global(out + t * 3, ld_shared(s + t - 32));
  }
}

static __global__ void count(unsigned* counter, std::uint64_t* sum, unsigned* tickets) {
  const unsigned t = blockIdx.x * blockDim.x + threadIdx.x;
  st_global(tickets + t, atomic_add(counter, 1u));
  atomic_add(sum, static_cast<std::uint64_t>(t) << 30);
}

}  // namespace

TEST(lanes_exchange) {
  const auto out = every_schedule([&] {
    Memory<int> r(2 * 64 * 6);
    launch(exchanges, 2, 64, 0, nullptr, r.data());
    return r;
  });
  for (int t = 0; t < 128; ++t) {
    const int lane = t % 32;
    auto square = [](int i) { return i * i; };
    const int expected[] = {
        square(lane ^ 5), square(31 - lane), square(lane < 3 ? lane : lane - 3), square(lane > 28 ? lane : lane + 3),
        0x49249249,       lane ^ 1};
    for (int i = 0; i < 6; ++i) CHECK(out[t * 6 + i] == expected[i], t, i, out[t * 6 + i], expected[i]);
  }
}

TEST(named_barriers_join_some_warps) {
  const auto out = every_schedule([&] {
    Memory<int> r(192 * 3);
    launch(groups, 1, 192, 192 * 4, nullptr, r.data());
    return r;
  });
  for (int t = 0; t < 128; ++t)
    for (int round = 0; round < 3; ++round) CHECK(out[t * 3 + round] == (t ^ 32) * 10 + round, t, round, out[t * 3 + round]);
  for (int t = 160; t < 192; ++t) CHECK(out[t * 3] == 7, t, out[t * 3]);
}

TEST(atomic_additions_lose_nothing) {
  Memory<unsigned> counter(1), tickets(96);
  Memory<std::uint64_t> sum(1);
  counter[0] = 0, sum[0] = 0;
  const simt::Run run({simt::Schedule::random, 5, false});
  launch(count, 3, 32, 0, nullptr, counter.data(), sum.data(), tickets.data());
  CHECK(counter[0] == 96 && sum[0] == std::uint64_t(95 * 48) << 30, counter[0], sum[0]);
  std::sort(tickets.begin(), tickets.end());
  for (unsigned i = 0; i < 96; ++i) CHECK(tickets[i] == i, i, tickets[i]);
}
