#include <algorithm>

#include "support.h"

namespace tutelage {
const KernelTable* other_tiles_table();  // other_tiles.cc
}

using namespace test;

namespace {

struct Case {
  std::vector<int32_t> lengths;  // of the sequences
  int64_t heads, kv_heads, d, window = 0;
  std::string name() const {
    std::string list;
    for (int32_t length : lengths) list += std::to_string(length) + ",";
    return text("lengths", list, "heads", heads, "/", kv_heads, "d", d, "window", window);
  }
};
const std::vector<Case> kCases =
    kSmall
        ? std::vector<Case>{{{1, 17, 130}, 2, 1, 8}, {{129, 128, 1}, 2, 2, 16}, {{140, 31}, 1, 1, 40, 7}, {{150}, 2, 1, 8, 130}}
        : std::vector<Case>{{{1, 17, 130}, 2, 1, 8},       {{300, 5}, 3, 1, 24},     {{129, 128, 1}, 4, 4, 16},
                            {{260, 40, 7}, 6, 2, 64, 0},   {{200, 31}, 2, 2, 40, 7}, {{290}, 2, 1, 8, 130},
                            {{64, 65, 127, 256}, 9, 3, 64}};

template <class T>
struct Operands {
  std::vector<int32_t> cu{0};
  int64_t tokens, q_row, kv_row;
  std::vector<T> q, k, v;
  Operands(const Case& g, const Source<T>& in) {
    for (int32_t n : g.lengths) cu.push_back(cu.back() + n);
    tokens = cu.back(), q_row = g.heads * g.d + 3, kv_row = g.kv_heads * g.d + 1;
    q = in(tokens * q_row, 1), k = in(tokens * kv_row, 2), v = in(tokens * kv_row, 3);
    for (T& x : q) x *= 4;  // weights far from uniform
  }
};

template <class T>
std::vector<T> whole(const Case& g, const KernelTable& t, const Operands<T>& x) {
  std::vector<T> o = blank<T>(x.tokens * x.q_row), lse = blank<T>(x.tokens * g.heads);
  const AttentionShape shape{int64_t(g.lengths.size()), x.cu.data(), g.heads, g.kv_heads, g.d, true, g.window, 0.3};
  t.flash_attention({shape, x.q.data(), x.k.data(), x.v.data(), x.q_row, x.kv_row, x.kv_row, o.data(), x.q_row, lse.data()}, 1);
  return o;
}

// The same through a cache, `chunk` tokens of every sequence at a time; the cache's slots hold NaN until they are written.
template <class T>
std::vector<T> in_chunks(const Case& g, const KernelTable& t, int threads, const Operands<T>& x, int32_t chunk) {
  const int64_t layer = cached_attention_elements(g.kv_heads, g.d), offset = layer;  // the second of three layers
  std::vector<std::vector<std::vector<T>>> cache;
  std::vector<std::vector<void*>> places;
  for (int32_t n : g.lengths) {
    cache.emplace_back(static_cast<std::size_t>((n + kCacheBlock - 1) / kCacheBlock), blank<T>(3 * layer));
    places.emplace_back();
    for (auto& block : cache.back()) places.back().push_back(block.data());
  }
  std::vector<T> o = blank<T>(x.tokens * x.q_row);
  for (int32_t first = 0; first < *std::max_element(g.lengths.begin(), g.lengths.end()); first += chunk) {
    std::vector<int32_t> cu_rows{0}, positions, from;
    std::vector<void* const*> blocks;
    for (std::size_t s = 0; s < g.lengths.size(); ++s) {
      const int32_t count = std::min(chunk, g.lengths[s] - first);
      if (count <= 0) continue;
      cu_rows.push_back(cu_rows.back() + count), positions.push_back(first), from.push_back(x.cu[s] + first);
      blocks.push_back(places[s].data());
    }
    std::vector<T> q, k, v, out = blank<T>(cu_rows.back() * x.q_row);
    for (std::size_t s = 0; s < blocks.size(); ++s) {
      const int64_t count = cu_rows[s + 1] - cu_rows[s];
      q.insert(q.end(), x.q.begin() + from[s] * x.q_row, x.q.begin() + (from[s] + count) * x.q_row);
      k.insert(k.end(), x.k.begin() + from[s] * x.kv_row, x.k.begin() + (from[s] + count) * x.kv_row);
      v.insert(v.end(), x.v.begin() + from[s] * x.kv_row, x.v.begin() + (from[s] + count) * x.kv_row);
    }
    CachedAttention c;
    c.heads = g.heads, c.kv_heads = g.kv_heads, c.head_dim = g.d, c.window = g.window, c.scale = 0.3;
    c.segments = int64_t(blocks.size()), c.cu_rows = cu_rows.data(), c.first_position = positions.data();
    c.blocks = blocks.data(), c.offset = offset;
    c.q = q.data(), c.k = k.data(), c.v = v.data(), c.q_row = x.q_row, c.k_row = x.kv_row, c.v_row = x.kv_row;
    c.o = out.data(), c.o_row = x.q_row;
    t.cached_attention(c, threads);
    for (std::size_t s = 0; s < blocks.size(); ++s)
      std::copy(out.begin() + cu_rows[s] * x.q_row, out.begin() + cu_rows[s + 1] * x.q_row, o.begin() + from[s] * x.q_row);
  }
  return o;
}

}  // namespace

TEST(any_cut_into_chunks_has_the_bits_of_the_whole_sequence) {
  for (const Case& g : kCases) {
    const Operands<float> x(g, Source<float>{});
    const std::vector<float> expected = whole(g, *scalar_table(), x);
    for (const KernelTable* t : float_tables())
      for (int32_t chunk : {1, 16, 50, 1000})
        for (int threads : {1, 3}) {
          if (kSmall && (chunk == 50 || threads == 3)) continue;
          CHECK(same_bits(in_chunks(g, *t, threads, x, chunk), expected), g.name(), t->name, "chunk", chunk, "threads",
                threads);
        }
  }
}

TEST(float64_has_the_bits_of_the_whole_sequence_too) {
  const Case g{{140, 3}, 4, 2, 24};
  const Operands<double> x(g, Source<double>{});
  for (int32_t chunk : {1, 33})
    CHECK(same_bits(in_chunks(g, *float64_table(), 2, x, chunk), whole(g, *float64_table(), x)), chunk);
}

TEST(control_another_tile_of_keys_gives_other_bits) {
  const Case g{{300}, 2, 1, 8};
  const Operands<float> x(g, Source<float>{});
  CHECK(!same_bits(whole(g, *other_tiles_table(), x), in_chunks(g, *scalar_table(), 1, x, 1)));
}
