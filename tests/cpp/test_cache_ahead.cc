// What a product fetches for the attention that follows: exactly the lines of the cache that hold something, for any cut of the
// heads between products and of the lines between tiles.
#include <cstddef>
#include <cstdint>
#include <map>
#include <vector>

#include "core/parallel.h"
#include "kernels/cached_attention.h"
#include "support.h"

using namespace test;

namespace {
using std::uint16_t;
using std::uint32_t;
using real = float;
#include "kernels/lanes_scalar.inc"
// after the lanes, as in isa_scalar.cc
#include "kernels/math.inc"
// after math.inc, whose integers it uses
#include "kernels/cache_ahead.inc"

[[maybe_unused]] void (*const kTransposes[])() = {reinterpret_cast<void (*)()>(transpose_panel),  // the lanes bring them along
                                                  reinterpret_cast<void (*)()>(transpose_tile)};

struct Cache {
  int64_t kv_heads, d, window;
  std::vector<int64_t> used;  // positions of each sequence, its one new row included
  std::vector<std::vector<float>> memory;
  std::vector<std::vector<void*>> blocks;
  std::vector<void* const*> tables;
  std::vector<int32_t> cu_rows{0}, first;
  CachedAttention call;

  Cache(int64_t heads, int64_t width, int64_t seen, std::vector<int64_t> lengths)
      : kv_heads(heads), d(width), window(seen), used(std::move(lengths)) {
    const int64_t layer = cached_attention_elements(kv_heads, d);
    for (std::size_t s = 0; s < used.size(); ++s) {
      blocks.emplace_back();
      for (int64_t b = 0; b * kCacheBlock < used[s]; ++b) {
        memory.emplace_back(static_cast<std::size_t>(2 * layer));
        blocks.back().push_back(memory.back().data());
      }
      cu_rows.push_back(int32_t(s + 1)), first.push_back(int32_t(used[s] - 1));
    }
    for (const auto& own : blocks) tables.push_back(own.data());
    call.kv_heads = kv_heads, call.head_dim = d, call.window = window, call.segments = int64_t(used.size());
    call.cu_rows = cu_rows.data(), call.first_position = first.data(), call.blocks = tables.data(), call.offset = layer;
  }

  // How often each line should be fetched: once where a slot that is written lies in it.
  std::map<const void*, int> wanted() const {
    std::map<const void*, int> lines;
    const int64_t d16 = (d + 15) / 16 * 16;
    for (std::size_t s = 0; s < used.size(); ++s)
      for (int64_t head = 0; head < kv_heads; ++head)
        for (int64_t p = window > 0 && used[s] > window ? (used[s] - window) / kCacheBlock * kCacheBlock : 0; p < used[s];
             ++p) {
          const int64_t slot = p % kCacheBlock;
          const auto* keys =
              static_cast<const float*>(blocks[s][std::size_t(p / kCacheBlock)]) + call.offset + head * kCacheBlock * (d + d16);
          for (int64_t f = 0; f < d; ++f) lines[keys + slot / 16 * 16 * d + f * 16] = 1;
          for (int64_t f = 0; f < d16; f += 16) lines[keys + kCacheBlock * d + f * kCacheBlock + slot * 16] = 1;
        }
    return lines;
  }
};

// As tile_body walks: four lines at a time.
void fetch(CacheWalk& walk, int64_t deep, std::map<const void*, int>& seen) {
  const Stretch from = walk.here();
  const char* at = from.at;
  int64_t left = from.left;
  for (int64_t step = 0; step < deep; step += 4) {
    for (int64_t u = 0; u < 4; ++u)
      if (step + u < from.lines) ++seen[at + u * 64];
    at += 4 * 64;
    if ((left -= 4) > 0) continue;
    at += from.skip, left += from.run;
  }
  walk.advance(deep);
}

TEST(every_line_that_holds_something_is_fetched_once) {
  for (int64_t heads : {1, 3})
    for (int64_t d : {8, 64, 80})
      for (int64_t window : {0, 100})
        for (int64_t parts : {1, 4})
          for (int64_t deep : {4, 192}) {
            const Cache cache(heads, d, window, {1, 37, 64, 128, 129, 300});
            std::map<const void*, int> seen;
            const int64_t items = int64_t(cache.used.size()) * heads;
            for (int64_t part = 0; part < parts; ++part)
              for (CacheWalk walk(&cache.call, items * part / parts, items * (part + 1) / parts); !walk.done();)
                fetch(walk, deep, seen);
            std::size_t missing = 0, twice = 0, beside = 0;
            const auto wanted = cache.wanted();
            for (const auto& [line, count] : wanted) missing += seen.count(line) == 0;
            for (const auto& [line, count] : seen) twice += count > 1, beside += wanted.count(line) == 0;
            // Beside: a run of values is rounded up to four.
            CHECK(missing == 0 && twice == 0, heads, d, window, parts, deep, missing, twice);
            CHECK(beside <= std::size_t(items * 3 * ((d + 15) / 16)), heads, d, window, beside);
          }
}

TEST(nothing_is_fetched_without_a_cache_or_of_no_heads) {
  CHECK(CacheWalk(nullptr, 0, 5).done());
  const Cache cache(2, 16, 0, {5});
  CHECK(CacheWalk(&cache.call, 1, 1).done() && !CacheWalk(&cache.call, 1, 2).done());
}

}  // namespace
