// One planted fault of every kind that the emulator promises to find, run in a child process; the same kernel without it
// passes.
#include <csignal>
#include <fstream>
#include <functional>

#include <sys/wait.h>
#include <unistd.h>

#include "cuda/ptx/barrier.h"
#include "cuda/ptx/cp_async.h"
#include "cuda/ptx/ldmatrix.h"
#include "cuda/ptx/memory.h"
#include "cuda/ptx/warp.h"
#include "device.h"

using namespace test;
using namespace tutelage::cuda;

namespace {

#if defined(__SANITIZE_ADDRESS__)
constexpr bool kAddress = true, kThread = false;
#elif defined(__SANITIZE_THREAD__)
constexpr bool kAddress = false, kThread = true;
#else
constexpr bool kAddress = false, kThread = false;
#endif

struct Ending {
  bool died;  // by a signal or with another status than 0
  std::string told;
};

// What becomes of a process that does this. 20 seconds without an end are a failure: a fault is told, never a hang.
Ending ending(const std::function<void()>& run) {
  int ends[2];
  CHECK(pipe(ends) == 0);
  simt::forget_fibers();  // ThreadSanitizer gives up on a child of several threads
  std::fflush(nullptr);
  const pid_t child = fork();
  CHECK(child >= 0);
  if (child == 0) {
    dup2(ends[1], 1), dup2(ends[1], 2);
    close(ends[0]), close(ends[1]);
    alarm(20);
    run();
    std::fflush(nullptr);
    std::exit(0);  // ThreadSanitizer's status is set on the way out
  }
  close(ends[1]);
  Ending e{};
  char buffer[4096];
  for (ssize_t n; (n = read(ends[0], buffer, sizeof buffer)) > 0;) e.told.append(buffer, static_cast<std::size_t>(n));
  close(ends[0]);
  int status = 0;
  CHECK(waitpid(child, &status, 0) == child);
  CHECK(!(WIFSIGNALED(status) && WTERMSIG(status) == SIGALRM), "it hung");
  e.died = status != 0;
  return e;
}

// test_faults.cc:N of the line that ends in "// fault: <name>"
std::string line_of(const std::string& name) {
  std::ifstream source(__FILE__);
  std::string line;
  for (int n = 1; std::getline(source, line); ++n)
    if (line.ends_with("// fault: " + name)) return "test_faults.cc:" + std::to_string(n);
  CHECK(false, "no line of this file is marked", name);
  return "";
}

void check_found(const std::function<void()>& run, const std::string& message, const std::string& line) {
  const Ending e = ending(run);
  CHECK(e.died && e.told.find(message) != std::string::npos, line, "expected:", message, "told:", e.told);
  CHECK(e.told.find(line_of(line)) != std::string::npos, "expected:", line_of(line), "told:", e.told);
}
void check_passes(const std::function<void()>& run) {
  const Ending e = ending(run);
  CHECK(!e.died && e.told.empty(), e.told);
}

// A kernel of the form f(float* out, bool faulty) on a block of 64 threads with 64 floats of shared memory.
using Planted = void (*)(float*, bool);
std::function<void()> run_of(Planted kernel, bool faulty, unsigned threads = 64) {
  return [=] {
    Memory<float> out(64);
    launch(kernel, 1, threads, 64 * sizeof(float), nullptr, out.data(), faulty);
  };
}
void check_planted(Planted kernel, const std::string& message, const std::string& line) {
  check_passes(run_of(kernel, false));
  check_found(run_of(kernel, true), message, line);
}

// --- out of bounds, misaligned ---

static __global__ void past_shared(float* out, bool faulty) {
  float* s = dyn_smem<float>();
  st_shared(s + threadIdx.x + (faulty ? 1 : 0), 1.0f);  // fault: past shared
  __syncthreads();
  st_global(out + threadIdx.x, ld_shared(s + threadIdx.x));
}
static __global__ void past_shared_by_pointer(float* out, bool faulty) {
  float* s = dyn_smem<float>();
  s[threadIdx.x] = 1.0f;
  out[threadIdx.x] = s[threadIdx.x + (faulty ? 1 : 0)];  // fault: past shared by pointer
}
static __global__ void past_global(float* out, bool faulty) {
  st_global(out + threadIdx.x + (faulty ? 1 : 0), 1.0f);  // fault: past global
}
static __global__ void copy_past_global(float* out, bool faulty) {
  auto* s = dyn_smem<Pack<float, 4>>();
  if (threadIdx.x < 16) cp_async_16(s + threadIdx.x, out + 4 * threadIdx.x + (faulty ? 4 : 0));  // fault: copy past global
  cp_async_commit();
  cp_async_wait_group<0>();
}
static __global__ void shared_for_global(float* out, bool faulty) {
  float* s = dyn_smem<float>();
  st_global((faulty ? s : out) + threadIdx.x, 1.0f);  // fault: shared for global
}
static __global__ void misaligned(float* out, bool faulty) {
  auto* p = reinterpret_cast<Pack<float, 4>*>(out + (faulty ? 1 : 0));
  if (threadIdx.x < 15) st_global(p + threadIdx.x, Pack<float, 4>{});  // fault: misaligned
}
static __global__ void misaligned_row(float*, bool faulty) {
  bf16* s = dyn_smem<bf16>();
  for (unsigned i = threadIdx.x; i < 128; i += 64) st_shared(s + i, bf16{0});
  __syncthreads();
  std::uint32_t r[2];
  ldmatrix_x2(r, s + lane_id() % 8 * 8 + (faulty && lane_id() == 3 ? 1 : 0));  // fault: misaligned row
}

// --- reads of what nobody wrote, or not yet ---

static __global__ void unwritten(float* out, bool faulty) {
  float* s = dyn_smem<float>();
  if (!faulty || threadIdx.x != 5) st_shared(s + threadIdx.x, 1.0f);
  __syncthreads();
  st_global(out + threadIdx.x, ld_shared(s + (63 - threadIdx.x)));
}
static __global__ void no_wait(float* out, bool faulty) {
  auto* s = dyn_smem<Pack<float, 4>>();
  if (threadIdx.x < 16) cp_async_16(s + threadIdx.x, out + 4 * threadIdx.x);
  cp_async_commit();
  if (faulty)
    cp_async_wait_group<1>();
  else
    cp_async_wait_group<0>();
  __syncthreads();
  st_global(out + threadIdx.x, ld_shared(reinterpret_cast<float*>(s) + threadIdx.x));
  __syncthreads();
  cp_async_wait_group<0>();
}
// Two stages, one copy ahead: without the second barrier a warp overwrites the stage that another still reads.
static __global__ void refilled_too_early(float* out, bool faulty) {
  auto* s = dyn_smem<Pack<float, 4>>();
  auto fetch = [&](int round) {
    if (round < 4 && threadIdx.x < 8) cp_async_16(s + round % 2 * 8 + threadIdx.x, out + 4 * threadIdx.x);
    cp_async_commit();
  };
  float sum = 0;
  fetch(0);
  for (int round = 0; round < 4; ++round) {
    fetch(round + 1);
    cp_async_wait_group<1>();
    __syncthreads();
    sum += ld_shared(reinterpret_cast<float*>(s + round % 2 * 8) + threadIdx.x % 32);  // fault: refilled too early
    if (!faulty) __syncthreads();
  }
  st_global(out + 64 + threadIdx.x, sum);
}
static __global__ void never_waited_for(float* out, bool faulty) {
  auto* s = dyn_smem<Pack<float, 4>>();
  if (threadIdx.x < 16) cp_async_16(s + threadIdx.x, out + 4 * threadIdx.x);  // fault: never waited for
  cp_async_commit();
  if (!faulty) cp_async_wait_group<0>();
}

// --- barriers ---

static __global__ void no_barrier(float* out, bool faulty) {
  float* s = dyn_smem<float>();
  st_shared(s + threadIdx.x, static_cast<float>(threadIdx.x));
  if (!faulty) __syncthreads();
  st_global(out + threadIdx.x, ld_shared(s + (threadIdx.x ^ 32)));  // fault: no barrier
}
// Every round is read before the next is written, except that the barrier between the two is missing. Whoever leaves the first
// barrier late has, in the emulator's order of events, left it after the next round was written.
static __global__ void no_second_barrier(float* out, bool faulty) {
  float* s = dyn_smem<float>();
  float sum = 0;
  for (int round = 0; round < 3; ++round) {
    st_shared(s + threadIdx.x, static_cast<float>(round));
    __syncthreads();
    sum = 10 * sum + ld_shared(s + (threadIdx.x ^ 32));  // fault: no second barrier
    if (!faulty) __syncthreads();
  }
  st_global(out + threadIdx.x, sum);
}
static __global__ void no_warp_barrier(float* out, bool faulty) {
  float* s = dyn_smem<float>();
  st_shared(s + threadIdx.x, static_cast<float>(threadIdx.x));
  if (faulty)
    shfl_xor(1, 1);  // lanes meet here, but a shuffle orders no memory
  else
    __syncwarp();
  st_global(out + threadIdx.x, ld_shared(s + (threadIdx.x ^ 1)));  // fault: no warp barrier
}
static __global__ void divergent_barrier(float*, bool faulty) {
  if (faulty && threadIdx.x % 2)
    __syncthreads();
  else
    __syncthreads();  // fault: divergent barrier
}
static __global__ void barrier_of_some_lanes(float*, bool faulty) {
  if (!faulty || threadIdx.x % 32 < 16) __syncthreads();  // fault: barrier of some lanes
}
static __global__ void barrier_of_one_warp(float*, bool faulty) {
  if (!faulty || threadIdx.x < 32) __syncthreads();  // fault: barrier of one warp
}
static __global__ void two_barriers(float*, bool faulty) {
  if (threadIdx.x < 32) {
    barrier_sync(1, 64);  // fault: two barriers
    barrier_sync(2, 64);
  } else {
    barrier_sync(faulty ? 2 : 1, 64);
    barrier_sync(faulty ? 1 : 2, 64);
  }
}
static __global__ void another_count(float*, bool faulty) {
  barrier_sync(1, faulty && threadIdx.x < 32 ? 32 : 64);
  barrier_sync(1, faulty && threadIdx.x >= 32 ? 96 : 64);  // fault: another count
}
static __global__ void divergent_shuffle(float* out, bool faulty) {
  float x = 1;
  if (!faulty || threadIdx.x % 32 != 7) x = shfl_xor(x, 1);  // fault: divergent shuffle
  st_global(out + threadIdx.x, x);
}

static __global__ void nothing(float*, bool) {}

std::vector<float> result(Planted kernel, bool faulty, simt::Schedule schedule, std::uint64_t seed) {
  const simt::Run run({schedule, seed, false});
  Memory<float> out(128);
  for (int i = 0; i < 128; ++i) out[i] = static_cast<float>(i);
  launch(kernel, 1, 64, 64 * sizeof(float), nullptr, out.data(), faulty);
  return floats(out);
}
bool has_nan(const std::vector<float>& x) {
  for (float e : x)
    if (std::isnan(e)) return true;
  return false;
}
// Whether forward, reversed and some random schedules give finite results, all the same.
bool same_in_every_schedule(Planted kernel, bool faulty) {
  const std::vector<float> expected = result(kernel, faulty, simt::Schedule::forward, 0);
  bool same = !has_nan(expected) && result(kernel, faulty, simt::Schedule::reversed, 0) == expected;
  for (std::uint64_t seed = 1; seed < 5; ++seed)
    same = same && result(kernel, faulty, simt::Schedule::random, seed) == expected;
  return same;
}

}  // namespace

TEST(shared_memory_has_bounds) {
  check_planted(past_shared, "store of 4 bytes out of the bounds of shared memory: at byte 256 of 256", "past shared");
  check_planted(shared_for_global, "store of global memory at an address in shared memory", "shared for global");
}

TEST(address_sanitizer_names_the_kernels_line) {
  if (!kAddress) return;  // the asan-ubsan build's part
  check_planted(past_shared_by_pointer, "heap-buffer-overflow", "past shared by pointer");
  check_planted(past_global, "heap-buffer-overflow", "past global");
  check_planted(copy_past_global, "heap-buffer-overflow", "copy past global");
}

TEST(misaligned_accesses_are_refused) {
  check_planted(misaligned, "misaligned store of 16 bytes: the address is 4 beyond a multiple", "misaligned");
  check_planted(misaligned_row, "misaligned load of 16 bytes: the address is 2 beyond a multiple", "misaligned row");
}

TEST(what_nobody_wrote_is_nan) {
  for (Planted kernel : {unwritten, no_wait}) {
    CHECK(!has_nan(result(kernel, false, simt::Schedule::forward, 0)));
    CHECK(has_nan(result(kernel, true, simt::Schedule::forward, 0)));
  }
}

TEST(a_copy_lands_only_when_waited_for) {
  check_planted(never_waited_for, "a thread left the kernel with a cp.async that it never waited for", "never waited for");
}

// In the release build by the bits, in the tsan build by ThreadSanitizer, whatever the schedule.
TEST(a_missing_barrier_is_found) {
  const std::pair<Planted, std::string> planted[] = {{no_barrier, "no barrier"},
                                                     {no_second_barrier, "no second barrier"},
                                                     {no_warp_barrier, "no warp barrier"},
                                                     {refilled_too_early, "refilled too early"}};
  for (const auto& [kernel, line] : planted) {
    CHECK(same_in_every_schedule(kernel, false), line);
    if (kThread)
      check_found([k = kernel] { result(k, true, simt::Schedule::forward, 0); }, "data race", line);
    else if (kernel != no_warp_barrier)  // no schedule can show that one: the lanes did meet
      CHECK(!same_in_every_schedule(kernel, true), line);
  }
}

TEST(divergence_and_deadlock_are_told_with_the_place) {
  check_planted(divergent_barrier, "divergent collective: thread", "divergent barrier");
  check_planted(barrier_of_some_lanes, "of the same warp has left the kernel", "barrier of some lanes");
  check_planted(barrier_of_one_warp,
                "deadlock: barrier 0 waits for 64 threads, 32 have come; a warp that has not is at the end",
                "barrier of one warp");
  check_planted(two_barriers, "deadlock: barrier 1 waits for 64 threads, 32 have come", "two barriers");
  check_planted(another_count, "barrier 1 of 96 threads: a multiple of 32 up to the block's 64 is expected", "another count");
  check_planted(divergent_shuffle, "divergent collective: thread", "divergent shuffle");
}

TEST(launches_that_a_gpu_would_refuse) {
  auto told = [](unsigned threads, std::size_t shared) {
    return ending([=] {
             Memory<float> out(1);
             launch(nothing, 1, threads, shared, nullptr, out.data(), false);
           })
        .told;
  };
  auto begins = [](const std::string& text, const std::string& with) { return text.find(with) != std::string::npos; };
  CHECK(told(1024, 99 * 1024).empty());
  CHECK(begins(told(48, 0), "a block of 48 threads: 32 to 1024 in whole warps are expected"));
  CHECK(begins(told(1056, 0), "a block of 1056 threads"));
  CHECK(begins(told(32, 99 * 1024 + 1), "101377 bytes of shared memory: at most 101376"));
  CHECK(begins(told(32, 99 * 1024 + 1), "test_faults.cc:"));
}
