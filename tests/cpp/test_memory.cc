#include <cstring>
#include <new>
#include <thread>

#include "core/memory.h"
#include "support.h"

using namespace test;

TEST(blocks_are_aligned_writable_and_counted) {
  const MemoryUse before = memory_use();
  std::vector<void*> blocks;
  for (std::size_t bytes : {0, 1, 63, 64, 65, 1000, 1 << 20, 3 << 20}) {
    void* block = acquire_memory(bytes);
    CHECK(reinterpret_cast<std::uintptr_t>(block) % 64 == 0, bytes);
    std::memset(block, 0xab, bytes);
    blocks.push_back(block);
  }
  CHECK(memory_use().allocations == before.allocations + blocks.size());
  CHECK(memory_use().in_use >= before.in_use + (4u << 20), memory_use().in_use);
  CHECK(memory_use().peak >= memory_use().in_use);
  for (void* block : blocks) release_memory(block);
  release_memory(nullptr);
  CHECK(memory_use().in_use == before.in_use, memory_use().in_use);
}

TEST(a_freed_block_is_handed_out_again_unless_it_is_much_too_large) {
  free_cached_memory();
  void* block = acquire_memory(1000);
  release_memory(block);
  CHECK(memory_use().cached == 1024, memory_use().cached);
  void* other = acquire_memory(100);  // a kept block ten times too large would waste it
  CHECK(other != block);
  void* again = acquire_memory(900);
  CHECK(again == block && memory_use().cached == 0, memory_use().cached);
  release_memory(again), release_memory(other);
  free_cached_memory();
  CHECK(memory_use().cached == 0, memory_use().cached);
}

TEST(the_peak_starts_again_where_it_is_reset) {
  reset_memory_peak();
  const std::size_t start = memory_use().peak;
  { const Scratch scratch(1 << 16); }
  CHECK(memory_use().peak == start + (1 << 16), memory_use().peak, start);
  reset_memory_peak();
  CHECK(memory_use().peak == start, memory_use().peak, start);
}

TEST(impossible_sizes_throw_and_leave_everything_usable) {
  for (std::size_t bytes : {SIZE_MAX, SIZE_MAX - 64, SIZE_MAX / 2}) {
    bool thrown = false;
    try {
      acquire_memory(bytes);
    } catch (const std::bad_alloc&) {
      thrown = true;
    }
    CHECK(thrown, bytes);
  }
  const Scratch scratch(100);
  CHECK(scratch.get() != nullptr);
}

// Seventeen sizes, none of them within a quarter of another: kept without a bound they would be 3.3 times the largest.
TEST(sizes_that_never_come_again_are_not_all_kept) {
  free_cached_memory();
  std::size_t size = std::size_t{64} << 20, sum = 0;
  const std::size_t largest = size;
  for (int i = 0; i < 17; ++i, size = size / 10 * 7) {
    const Scratch scratch(size);
    sum += size;
  }
  CHECK(sum > 3 * largest, sum);
  CHECK(memory_use().cached <= memory_use().in_use + largest + largest / 4, memory_use().cached);
  free_cached_memory();
}

#if defined(__linux__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
// A fresh page reads 0, one that was taken over what was written to it. So the test fails where pages are not taken over, and
// where more of them are than there are.
TEST(a_large_block_takes_over_the_pages_of_kept_ones_that_do_not_fit) {
  free_cached_memory();
  const std::size_t page = std::size_t{2} << 20, before = memory_use().in_use;
  auto count = [&](void* block, std::size_t pages) {
    std::size_t written = 0;
    for (std::size_t i = 0; i < pages; ++i) written += static_cast<const char*>(block)[i * page + 77] == 5;
    return written;
  };
  void* first = acquire_memory(4 * page);
  void* second = acquire_memory(8 * page);
  CHECK(count(first, 4) == 0 && count(second, 8) == 0);
  std::memset(first, 5, 4 * page);
  std::memset(second, 5, 8 * page);
  release_memory(first), release_memory(second);
  void* middle = acquire_memory(6 * page);  // four pages of the first, two of the second
  CHECK(count(middle, 6) == 6, count(middle, 6));
  CHECK(memory_use().cached == 6 * page, memory_use().cached);
  void* large = acquire_memory(10 * page);  // the six that are left, and four fresh ones
  CHECK(count(large, 10) == 6, count(large, 10));
  CHECK(memory_use().cached == 0, memory_use().cached);
  std::memset(middle, 1, 6 * page);
  std::memset(large, 2, 10 * page);
  CHECK(static_cast<const char*>(middle)[6 * page - 1] == 1 && static_cast<const char*>(large)[0] == 2);
  CHECK(memory_use().in_use == before + 16 * page, memory_use().in_use);
  release_memory(middle), release_memory(large);
  void* small = acquire_memory(3 * page);  // from one kept block, the rest of which is kept
  CHECK(memory_use().cached == 13 * page, memory_use().cached);
  release_memory(small);
  free_cached_memory();
  CHECK(memory_use().cached == 0 && memory_use().in_use == before, memory_use().cached, memory_use().in_use);
}
#endif

TEST(threads_may_allocate_at_the_same_time) {
  const std::size_t before = memory_use().in_use;
  std::vector<std::thread> threads;
  for (int w = 0; w < 4; ++w)
    threads.emplace_back([w] {
      for (std::size_t i = 1; i < 200; ++i) {
        const Scratch scratch(i * 100);
        std::memset(scratch.get(), w, i * 100);
      }
    });
  for (std::thread& thread : threads) thread.join();
  CHECK(memory_use().in_use == before, memory_use().in_use);
}

// Every allocation of every kernel made to fail in turn: std::bad_alloc, nothing lost, and the next call has the same bits.
TEST(any_allocation_of_a_kernel_may_fail) {
  const int64_t n = 7 * 48;
  const std::vector<float> x = Source<float>{}(n, 1), y = Source<float>{}(n, 2), w = Source<float>{}(300 * 48, 3);
  const int32_t cu_seqlens[] = {0, 3, 7}, targets[] = {0, 299, 5, 7, 100, 2, 3};
  const AttentionShape shape{2, cu_seqlens, 6, 2, 8, true, 0, 0.3};
  auto everything = [&](int threads) {
    const KernelTable& t = *float_tables().back();
    Outputs<float> out(6, blank<float>(n));
    std::vector<float> lse = blank<float>(7 * 6), dweight(w.size(), 0.0f), statistics = blank<float>(3 * 7),
                       total = blank<float>(1);
    t.matmul({.m = 7,
              .n = 40,
              .k = 48,
              .a = x.data(),
              .a_row = 48,
              .b = w.data(),
              .b_row = 40,
              .b_col = 1,
              .c = out[0].data(),
              .c_row = 48},
             threads);
    t.flash_attention({shape, x.data(), y.data(), w.data(), 48, 16, 16, out[1].data(), 48, lse.data()}, threads);
    t.flash_attention_backward({shape, x.data(), y.data(), w.data(), 48, 16, 16, out[1].data(), lse.data(), y.data(), 48, 48,
                                out[2].data(), out[3].data(), out[4].data(), 48, 16, 16},
                               threads);
    t.linear_logprob({.rows = 7,
                      .hidden = 48,
                      .vocab = 300,
                      .x = x.data(),
                      .weight = w.data(),
                      .targets = targets,
                      .logprob = &statistics[0],
                      .entropy = &statistics[7],
                      .lse = &statistics[14]},
                     threads);
    t.linear_logprob_backward({.rows = 7,
                               .hidden = 48,
                               .vocab = 300,
                               .x = x.data(),
                               .weight = w.data(),
                               .targets = targets,
                               .block_rows = 4,
                               .entropy = &statistics[7],
                               .lse = &statistics[14],
                               .d_logprob = x.data(),
                               .d_entropy = y.data(),
                               .dx = out[5].data(),
                               .dweight = dweight.data()},
                              threads);
    t.total({n, x.data(), nullptr, 1, nullptr, total.data()}, threads);
    out.insert(out.end(), {lse, dweight, statistics, total});
    return out;
  };
  for (int threads : {1, 3}) {
    const Outputs<float> expected = everything(threads);
    const std::size_t in_use = memory_use().in_use;
    int failures = 0;
    for (std::uint64_t k = 1;; ++k) {
      fail_allocation(k);
      try {
        everything(threads);
        break;  // the k-th was never reached
      } catch (const std::bad_alloc&) {
        ++failures;
      }
      fail_allocation(0);
      CHECK(memory_use().in_use == in_use, "lost memory at allocation", k, "threads", threads);
      CHECK(same_bits(everything(threads), expected), "allocation", k, "threads", threads);
    }
    fail_allocation(0);
    CHECK(failures > 15, failures);
  }
}
