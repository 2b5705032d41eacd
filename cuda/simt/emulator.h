// Runs a CUDA kernel on the CPU, exactly and suspiciously. docs/cuda.md says how and what it finds.
//
// Every CUDA thread is a fiber. A warp's lanes run one after the other up to the next collective (a shuffle, an mma, a
// barrier); the last to arrive carries it out for all 32. Blocks run one after the other. All of it lies on the calling
// thread: a launch returns when the kernel has finished.
//
// Test: tests/simt/ (test_emulator.cc; test_faults.cc plants every fault that is to be found).
#pragma once

#include <cstddef>
#include <cstdint>
#include <source_location>
#include <string>
#include <vector>

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
using cudaStream_t = struct CUstream_st*;

namespace simt {

using Place = std::source_location;

// In which order lanes of a warp, warps of a block and blocks of a grid run. A kernel without races gives the same bits in all.
enum class Schedule { forward, reversed, random };

struct Settings {
  Schedule schedule = Schedule::forward;
  std::uint64_t seed = 0;  // of the random schedule
  bool count = false;      // memory accesses (slower)
};

// What one launch did, counted if Settings say so. Only accesses through cuda/ptx/ are seen.
struct Launch {
  Place place;
  dim3 grid, block;
  std::size_t shared_bytes = 0;
  std::uint64_t shared_accesses = 0;  // a warp's, each of up to 32 lanes
  std::uint64_t bank_conflicts = 0;   // passes over shared memory beyond the least that the bytes need
  std::uint64_t global_accesses = 0;
  std::uint64_t excess_sectors = 0;               // 32-byte sectors moved beyond those that the bytes fill
  std::string worst_bank_conflict, worst_excess;  // file:line of the access with the most of each
};

// While it lives, launches of this thread run under `settings` and are listed. Runs nest; the innermost counts.
class Run {
 public:
  explicit Run(const Settings& settings);
  ~Run();
  Run(const Run&) = delete;
  Run& operator=(const Run&) = delete;

  const Settings settings;
  std::vector<Launch> launches;

 private:
  Run* outer_;
};

// Fibers are kept for this thread's next launch; this gives them back.
void forget_fibers();

// --- For cuda/ptx/ and the dialect -----------------------------------------------------------------------------------

constexpr unsigned kWarp = 32;
// The most shared memory a block may ask for on every GPU that runs these kernels: 99 KiB (8.6, 8.9, 12.0; 8.0 and 9.0 have
// more).
constexpr std::size_t kMaxSharedBytes = 99 * 1024;

// A message with the place, the block and the thread; then abort().
[[noreturn]] void fail(Place place, const char* format, ...) __attribute__((format(printf, 2, 3)));

// Carried out once for the whole warp; operands[i] is lane i's.
using WarpOperation = void (*)(void* const* operands);
// All 32 lanes must come with the same operation, from the same place.
void collective(WarpOperation operation, void* operand, Place place);

void sync_block(unsigned barrier, unsigned threads, Place place);    // threads 0: the whole block
void arrive_block(unsigned barrier, unsigned threads, Place place);  // goes on without waiting
void sync_warp(Place place);

enum class Space { shared, global };
enum class Access { load, store };
// Checks alignment and, for shared memory, bounds; counts. Called before every access made through cuda/ptx/.
void access(Space space, Access kind, const void* address, std::size_t bytes, Place place);

struct PendingCopy {
  void* to;  // shared
  const void* from;
  unsigned bytes, zeros;  // so many bytes from `from`, then zeros
};
void async_copy(const PendingCopy& copy, Place place);
void async_commit();
// The copies of all but the last `groups` committed groups, in order, and forgets them. The caller makes them.
const std::vector<PendingCopy>& async_landed(unsigned groups);

const dim3& thread_index();
const dim3& block_index();
const dim3& block_size();
const dim3& grid_size();
unsigned lane_index();
unsigned char* shared_memory();

// With TUTELAGE_SIMT_LAUNCHES=FILE, every new (kernel, block, shared memory) of the process is a line at FILE's end, the kernel
// given by its distance in bytes from this function: tools/check_cuda.py asks for it, to know what occupancy to expect.
void run_launch(dim3 grid, dim3 block, std::size_t shared_bytes, void (*body)(void*), void* arguments, const void* kernel,
                Place place);

}  // namespace simt
