#include "core/memory.h"

#include <algorithm>
#include <cstdlib>
#include <map>
#include <mutex>
#include <new>
#include <unordered_map>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace tutelage {
namespace {

constexpr std::size_t kLine = 64;
constexpr std::size_t kHugePage = std::size_t{2} << 20;

class BlockStore {
 public:
  void* acquire(std::size_t bytes) {
    std::lock_guard lock(mutex_);
    ++use_.allocations;
    if (fail_in_ != 0 && --fail_in_ == 0) throw std::bad_alloc();
    const std::size_t unit = bytes >= kHugePage ? kHugePage : kLine;
    if (bytes > SIZE_MAX - unit) throw std::bad_alloc();
    const std::size_t rounded = std::max((bytes + unit - 1) / unit * unit, kLine);
    // A kept block may be up to a quarter too large: step sizes vary a little, waste must not.
    auto kept = free_.lower_bound(rounded);
    if (kept != free_.end() && kept->first <= rounded + rounded / 4) {
      void* block = kept->second.block;
      const std::size_t size = kept->first;
      sizes_[block] = size;  // may throw: before anything is taken
      free_.erase(kept);
      use_.cached -= size;
      count(size);
      return block;
    }
    make_room(rounded);
    void* block = fresh(rounded, unit);
    if (block == nullptr) {
      drop_cached();
      block = fresh(rounded, unit);
      if (block == nullptr) throw std::bad_alloc();
    }
    try {
      sizes_[block] = rounded;
    } catch (...) {
      std::free(block);
      throw;
    }
    count(rounded);
    return block;
  }

  void release(void* block) noexcept {
    if (block == nullptr) return;
    std::lock_guard lock(mutex_);
    auto found = sizes_.find(block);
    const std::size_t size = found->second;
    sizes_.erase(found);
    use_.in_use -= size;
    try {
      free_.emplace(size, Kept{block, ++released_});
      use_.cached += size;
    } catch (...) {
      std::free(block);
    }
  }

  void trim() noexcept {
    std::lock_guard lock(mutex_);
    drop_cached();
  }
  MemoryUse use() noexcept {
    std::lock_guard lock(mutex_);
    return use_;
  }
  void reset_peak() noexcept {
    std::lock_guard lock(mutex_);
    use_.peak = use_.in_use;
  }
  void fail(std::uint64_t n) noexcept {
    std::lock_guard lock(mutex_);
    fail_in_ = n;
  }

 private:
  static void* fresh(std::size_t rounded, std::size_t unit) noexcept {
    void* block = std::aligned_alloc(unit, rounded);
#if defined(__linux__)
    if (block != nullptr && unit == kHugePage) madvise(block, rounded, MADV_HUGEPAGE);
#endif
    return block;
  }
  void drop_cached() noexcept {
    for (auto& [size, kept] : free_) std::free(kept.block);
    free_.clear();
    use_.cached = 0;
  }
  // Batches of ever other sizes would each leave blocks that fit no other. What is held in all stays within a quarter above the
  // most that was ever in use; the blocks that lay idle longest go first.
  void make_room(std::size_t rounded) noexcept {
    const std::size_t most = std::max(most_, use_.in_use + rounded);
    while (!free_.empty() && use_.in_use + use_.cached + rounded > most + most / 4) {
      auto oldest = free_.begin();
      for (auto at = free_.begin(); at != free_.end(); ++at)
        if (at->second.released < oldest->second.released) oldest = at;
      std::free(oldest->second.block);
      use_.cached -= oldest->first;
      free_.erase(oldest);
    }
  }
  void count(std::size_t size) noexcept {
    use_.in_use += size;
    use_.peak = std::max(use_.peak, use_.in_use);
    most_ = std::max(most_, use_.in_use);
  }

  struct Kept {
    void* block;
    std::uint64_t released;  // rises: when it came back
  };

  std::mutex mutex_;
  std::multimap<std::size_t, Kept> free_;
  std::uint64_t released_ = 0;
  std::size_t most_ = 0;  // in use at any time; reset_peak leaves it
  std::unordered_map<void*, std::size_t> sizes_;
  MemoryUse use_;
  std::uint64_t fail_in_ = 0;
};

// Never destroyed: Python objects may release blocks while the process ends.
BlockStore& store() {
  static auto* blocks = new BlockStore;
  return *blocks;
}

}  // namespace

void* acquire_memory(std::size_t bytes) { return store().acquire(bytes); }
void release_memory(void* block) noexcept { store().release(block); }
void free_cached_memory() noexcept { store().trim(); }
MemoryUse memory_use() noexcept { return store().use(); }
void reset_memory_peak() noexcept { store().reset_peak(); }
void fail_allocation(std::uint64_t n) noexcept { store().fail(n); }

Scratch::Scratch(std::size_t bytes) : block_(acquire_memory(bytes)) {}
Scratch::~Scratch() { release_memory(block_); }

}  // namespace tutelage
