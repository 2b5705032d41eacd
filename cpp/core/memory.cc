#include "core/memory.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <map>
#include <mutex>
#include <new>
#include <unordered_map>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace tutelage {
namespace {

constexpr std::size_t kLine = 64;
constexpr std::size_t kHugePage = std::size_t{2} << 20;

bool is_large(std::size_t bytes) { return bytes >= kHugePage; }

// Large blocks are whole huge pages. Where the system can move pages between addresses, a new one takes over those of kept
// blocks; the sanitizers know nothing of pages that move.
#if defined(__linux__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
constexpr bool kPagesMove = true;

void* map_large(std::size_t bytes) noexcept {
  if (bytes > SIZE_MAX - kHugePage) return nullptr;
  void* mapped = mmap(nullptr, bytes + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) return nullptr;
  char* begin = static_cast<char*>(mapped);
  const std::size_t before = (kHugePage - reinterpret_cast<std::uintptr_t>(begin) % kHugePage) % kHugePage;
  if (before > 0) munmap(begin, before);
  if (before < kHugePage) munmap(begin + before + bytes, kHugePage - before);
  madvise(begin + before, bytes, MADV_HUGEPAGE);
  return begin + before;
}
void unmap_large(void* block, std::size_t bytes) noexcept { munmap(block, bytes); }

// The pages of from[0, bytes) to to[0, bytes), which stays memory all through; `from` is none afterwards. One huge page a call:
// a longer stretch may consist of several mappings, which mremap takes from Linux 6.17 on only.
bool move_pages(char* from, char* to, std::size_t bytes) noexcept {
  for (std::size_t at = 0; at < bytes; at += kHugePage) {
    if (mremap(from + at, kHugePage, kHugePage, MREMAP_MAYMOVE | MREMAP_FIXED, to + at) != MAP_FAILED) continue;
    munmap(from + at, kHugePage);  // no room for another mapping: a fresh page then, for `to` may be unmapped already
    if (mmap(to + at, kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == MAP_FAILED)
      return false;
  }
  return true;
}
#else
constexpr bool kPagesMove = false;

void* map_large(std::size_t bytes) noexcept { return std::aligned_alloc(kHugePage, bytes); }
void unmap_large(void* block, std::size_t) noexcept { std::free(block); }
bool move_pages(char*, char*, std::size_t) noexcept { return false; }
#endif

class BlockStore {
 public:
  void* acquire(std::size_t bytes) {
    std::lock_guard lock(mutex_);
    ++use_.allocations;
    if (fail_in_ != 0 && --fail_in_ == 0) throw std::bad_alloc();
    const std::size_t unit = is_large(bytes) ? kHugePage : kLine;
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
    void* block = fresh(rounded);
    if (block == nullptr) {
      drop_cached();
      block = fresh(rounded);
      if (block == nullptr) throw std::bad_alloc();
    }
    try {
      sizes_[block] = rounded;
    } catch (...) {
      discard(block, rounded);
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
      discard(block, size);
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
  struct Kept {
    void* block;
    std::uint64_t released;  // rises: when it came back
  };

  void* fresh(std::size_t rounded) noexcept {
    if (!is_large(rounded) || !kPagesMove) make_room(rounded);
    if (!is_large(rounded)) return std::aligned_alloc(kLine, rounded);
    void* block = map_large(rounded);
    if (block == nullptr || !kPagesMove) return block;
    if (take_over(static_cast<char*>(block), rounded)) {
      make_room(rounded);
      return block;
    }
    unmap_large(block, rounded);
    return nullptr;
  }
  // Gives the block pages of kept ones, as far as they go: of those that lay idle longest first, from their ends.
  bool take_over(char* block, std::size_t bytes) noexcept {
    while (bytes > 0) {
      const auto oldest = find_oldest(free_.lower_bound(kHugePage));
      if (oldest == free_.end()) break;
      const std::size_t size = oldest->first, taken = std::min(size, bytes);
      auto kept = free_.extract(oldest);
      use_.cached -= taken;
      const bool moved = move_pages(static_cast<char*>(kept.mapped().block) + (size - taken), block, taken);
      if (size > taken) {
        kept.key() = size - taken;
        free_.insert(std::move(kept));
      }
      if (!moved) return false;
      block += taken, bytes -= taken;
    }
    return true;
  }
  static void discard(void* block, std::size_t size) noexcept {
    if (is_large(size))
      unmap_large(block, size);
    else
      std::free(block);
  }
  void drop_cached() noexcept {
    for (auto& [size, kept] : free_) discard(kept.block, size);
    free_.clear();
    use_.cached = 0;
  }
  // Batches of ever other sizes would each leave blocks that fit no other. What is held in all stays within a quarter above the
  // most that was ever in use; the blocks that lay idle longest go first.
  void make_room(std::size_t rounded) noexcept {
    const std::size_t most = std::max(most_, use_.in_use + rounded);
    while (!free_.empty() && use_.in_use + use_.cached + rounded > most + most / 4) {
      const auto oldest = find_oldest(free_.begin());
      discard(oldest->second.block, oldest->first);
      use_.cached -= oldest->first;
      free_.erase(oldest);
    }
  }
  std::multimap<std::size_t, Kept>::iterator find_oldest(std::multimap<std::size_t, Kept>::iterator at) noexcept {
    auto oldest = at;
    for (; at != free_.end(); ++at)
      if (at->second.released < oldest->second.released) oldest = at;
    return oldest;
  }
  void count(std::size_t size) noexcept {
    use_.in_use += size;
    use_.peak = std::max(use_.peak, use_.in_use);
    most_ = std::max(most_, use_.in_use);
  }

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
