// What the emulator does where nothing is wrong: indices, schedules, counts. What it finds: test_faults.cc.
#include <algorithm>
#include <functional>

#include "cuda/ptx/memory.h"
#include "cuda/ptx/warp.h"
#include "device.h"

using namespace test;
using namespace tutelage::cuda;

namespace {

struct Index {
  unsigned block[3], thread[3], size[3], grid[3];
};
static __global__ void indices(Index* out) {
  const unsigned t = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const unsigned b = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  out[b * blockDim.x * blockDim.y * blockDim.z + t] = {{blockIdx.x, blockIdx.y, blockIdx.z},
                                                       {threadIdx.x, threadIdx.y, threadIdx.z},
                                                       {blockDim.x, blockDim.y, blockDim.z},
                                                       {gridDim.x, gridDim.y, gridDim.z}};
}

static __global__ void append(int* log, int* length) {  // a race on purpose: which lane runs when
  log[(*length)++] = static_cast<int>(blockIdx.x * 64 + threadIdx.x);
}

template <int Stride>
static __global__ void strided(float* out) {
  float* s = dyn_smem<float>();
  st_shared(s + threadIdx.x * Stride, static_cast<float>(threadIdx.x));
  __syncwarp();
  st_global(out + threadIdx.x * Stride, ld_shared(s + threadIdx.x * Stride));
}

template <class T>
static __global__ void wide(const T* in, T* out) {
  T* s = dyn_smem<T>();
  st_shared(s + threadIdx.x, ld_global(in + threadIdx.x));
  __syncthreads();
  st_global(out + threadIdx.x, ld_shared(s + (threadIdx.x ^ 3)));
}

static __global__ void shifted_loop(const float* in, float* out, int rounds) {  // some lanes take part in only some rounds
  float sum = 0;
  for (int i = 0; i < rounds; ++i)
    if ((static_cast<int>(threadIdx.x) + i) % 2 == 0) sum += ld_global(in + 32 * i + threadIdx.x);
  st_global(out + threadIdx.x, sum);
}

simt::Launch counted(const std::function<void()>& run) {
  simt::Run settings({simt::Schedule::forward, 0, true});
  run();
  CHECK(settings.launches.size() == 1, settings.launches.size());
  return settings.launches[0];
}

}  // namespace

TEST(every_thread_knows_where_it_is) {
  const dim3 grid(3, 2, 2), block(8, 4, 3);
  Memory<Index> out(12 * 96);
  launch(indices, grid, block, 0, nullptr, out.data());
  for (unsigned b = 0; b < 12; ++b)
    for (unsigned t = 0; t < 96; ++t) {
      const Index& i = out[b * 96 + t];
      CHECK(i.block[0] == b % 3 && i.block[1] == b / 3 % 2 && i.block[2] == b / 6, b, t);
      CHECK(i.thread[0] == t % 8 && i.thread[1] == t / 8 % 4 && i.thread[2] == t / 32, b, t);
      CHECK(i.size[0] == 8 && i.size[1] == 4 && i.size[2] == 3 && i.grid[0] == 3 && i.grid[1] == 2 && i.grid[2] == 2, b, t);
    }
  launch(indices, dim3(0), block, 0, nullptr, out.data());  // no blocks: nothing is done
}

#if !defined(__SANITIZE_THREAD__)
TEST(schedules_are_what_they_are_called) {
  auto order = [](simt::Schedule schedule, std::uint64_t seed) {
    std::vector<int> log(192);
    int length = 0;
    const simt::Run run({schedule, seed, false});
    launch(append, 3, 64, 0, nullptr, log.data(), &length);
    CHECK(length == 192, length);
    return log;
  };
  std::vector<int> expected(192);
  for (int i = 0; i < 192; ++i) expected[static_cast<std::size_t>(i)] = i;
  CHECK(order(simt::Schedule::forward, 0) == expected);
  std::reverse(expected.begin(), expected.end());
  CHECK(order(simt::Schedule::reversed, 0) == expected);
  const auto one = order(simt::Schedule::random, 1);
  CHECK(one == order(simt::Schedule::random, 1) && one != order(simt::Schedule::random, 2) && one != expected);
  std::vector<int> blocks, lanes;
  for (int i : one) {
    if (blocks.empty() || blocks.back() != i / 64) blocks.push_back(i / 64);
    if (i / 32 == one[0] / 32) lanes.push_back(i % 32);
  }
  CHECK(blocks.size() == 3 && !std::is_sorted(lanes.begin(), lanes.end()) && lanes.size() == 32, blocks.size(), lanes.size());
}
#endif

TEST(bank_conflicts_and_sectors_are_counted) {
  Memory<float> out(32 * 33);
  auto run = [&](void (*kernel)(float*), std::size_t stride) {
    return counted([&] { launch(kernel, 1, 32, 32 * 4 * stride, nullptr, out.data()); });
  };
  // a store and a load, each of 32 lanes: `ways` lanes a bank are ways - 1 passes too many
  const simt::Launch whole = run(strided<1>, 1), two = run(strided<2>, 2), eight = run(strided<8>, 8),
                     all = run(strided<32>, 32), odd = run(strided<33>, 33);
  CHECK(whole.shared_accesses == 2 && whole.global_accesses == 1, whole.shared_accesses, whole.global_accesses);
  CHECK(whole.bank_conflicts == 0 && two.bank_conflicts == 2 && eight.bank_conflicts == 14 && all.bank_conflicts == 62 &&
            odd.bank_conflicts == 0,
        whole.bank_conflicts, two.bank_conflicts, eight.bank_conflicts, all.bank_conflicts, odd.bank_conflicts);
  // 128 bytes fill 4 sectors; spread over 256 they touch 8, from stride 8 on 32
  CHECK(whole.excess_sectors == 0 && two.excess_sectors == 4 && eight.excess_sectors == 28 && all.excess_sectors == 28,
        whole.excess_sectors, two.excess_sectors, eight.excess_sectors, all.excess_sectors);
  CHECK(all.worst_bank_conflict.find("test_emulator.cc:") != std::string::npos, all.worst_bank_conflict);
  CHECK(whole.worst_bank_conflict.empty() && whole.worst_excess.empty(), whole.worst_bank_conflict);
}

TEST(wide_accesses_go_by_halves_and_quarters) {
  auto conflicts = [](auto kernel, auto element) {
    Memory<decltype(element)> in(64), out(64);
    return counted([&] { launch(kernel, 1, 64, 64 * sizeof(element), nullptr, in.data(), out.data()); });
  };
  for (const simt::Launch& l :
       {conflicts(wide<Pack<float, 4>>, Pack<float, 4>{}), conflicts(wide<Pack<float, 2>>, Pack<float, 2>{}),
        conflicts(wide<float>, 0.0f), conflicts(wide<bf16>, bf16{}), conflicts(wide<char>, char{})}) {
    CHECK(l.shared_accesses == 4 && l.global_accesses == 4, l.shared_accesses, l.global_accesses);
    CHECK(l.bank_conflicts == 0 && l.excess_sectors == 0, l.bank_conflicts, l.excess_sectors);
  }
}

TEST(lanes_that_skip_a_round_are_matched_by_count) {
  // The n-th execution since the warp last met counts as simultaneous: even and odd lanes, of other rounds, are taken together.
  // Such a loop is counted too high (a line of 64 bytes would be 2 sectors), never too low.
  Memory<float> in(8 * 32), out(32);
  const simt::Launch l = counted([&] { launch(shifted_loop, 1, 32, 0, nullptr, in.data(), out.data(), 8); });
  CHECK(l.global_accesses == 5 && l.excess_sectors > 0, l.global_accesses, l.excess_sectors);
}

TEST(fresh_shared_memory_is_nan_in_every_block) {
  auto kernel = +[](float* out) {
    float* s = dyn_smem<float>();
    st_global(out + blockIdx.x * 32 + threadIdx.x, ld_shared(s + threadIdx.x));
    st_shared(s + threadIdx.x, 1.0f);
  };
  Memory<float> out(96);
  launch(kernel, 3, 32, 128, nullptr, out.data());
  for (float x : out) CHECK(std::isnan(x), x);
}

TEST(runs_nest_and_list_their_launches) {
  Memory<float> out(32);
  simt::Run outer({simt::Schedule::forward, 0, false});
  launch(strided<1>, 1, 32, 128, nullptr, out.data());
  {
    simt::Run inner({simt::Schedule::forward, 0, true});
    launch(strided<1>, 1, 32, 128, nullptr, out.data());
    CHECK(inner.launches.size() == 1 && inner.launches[0].shared_accesses == 2);
  }
  CHECK(outer.launches.size() == 1 && outer.launches[0].shared_accesses == 0, outer.launches.size());
  CHECK(outer.launches[0].shared_bytes == 128 && outer.launches[0].block.x == 32 && outer.launches[0].grid.x == 1);
}
