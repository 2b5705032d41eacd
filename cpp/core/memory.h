// Where the core's own memory comes from: activations, packing buffers, scratch.
//
// Blocks are kept when freed and handed out again: fresh pages cost 0.2 to 0.9 s a GiB, every step. 64-byte aligned; blocks of
// 2 MiB and more ask for huge pages, and one that no kept block fits takes over the pages of kept blocks (Linux), so that
// loops whose stages need blocks of other sizes touch no fresh memory either. What a block holds is undefined. Thread-safe.
// free_cached_memory() returns the kept blocks to the system; a failing allocation does so by itself and tries once more
// before it throws std::bad_alloc. Blocks in use and kept together stay within 1.25 times the most that was ever in use.
//
// Test: tests/cpp/test_memory.cc; every allocation made to fail in turn: tests/python/test_memory.py.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tutelage {

void* acquire_memory(std::size_t bytes);
void release_memory(void* block) noexcept;
void free_cached_memory() noexcept;

struct MemoryUse {
  std::size_t in_use = 0, cached = 0, peak = 0;  // bytes; peak of in_use
  std::uint64_t allocations = 0;                 // acquire_memory calls so far
};
MemoryUse memory_use() noexcept;
void reset_memory_peak() noexcept;

// For tests: the n-th acquire_memory from now (1 = the next) throws std::bad_alloc. 0 switches it off.
void fail_allocation(std::uint64_t n) noexcept;

// A block for as long as a scope lasts.
class Scratch {
 public:
  explicit Scratch(std::size_t bytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void* get() const { return block_; }

 private:
  void* block_;
};

}  // namespace tutelage
