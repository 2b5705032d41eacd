#include "attention.h"
#include "cuda/kernels/cached_attention.cuh"

using namespace test;
namespace tc = tutelage::cuda;

namespace {

// The cache of some sequences, one layer of two; its slots hold NaN until they are written. What a call has it reads from
// memory as a device would: lists of pointers.
struct CacheMemory {
  std::vector<std::vector<Memory<bf16>>> blocks;
  int64_t layer;
  CacheMemory(const AttentionCase& c, const std::vector<int32_t>& lengths)
      : layer(tutelage::cached_attention_elements(c.kv_heads, c.d)) {
    for (int32_t length : lengths) {
      blocks.emplace_back();
      for (int32_t p = 0; p < length; p += tutelage::kCacheBlock) blocks.back().emplace_back(2 * layer);
    }
  }
};

struct Due {
  int sequence;
  int32_t begin, end;
};

// One call: rows [begin, end) of each sequence that is due; writes their o into the packed result.
template <int Split = tc::kSplit>
void step(const AttentionCase& c, const AttentionOperands<bf16>& x, CacheMemory& cache, const std::vector<Due>& due,
          Memory<bf16>& o) {
  std::vector<int32_t> rows{0}, first;
  std::vector<Memory<void*>> lists;
  for (const Due& d : due) {
    rows.push_back(rows.back() + d.end - d.begin), first.push_back(d.begin);
    // as many as there are positions: a read of another is out of bounds
    lists.emplace_back((d.end + tutelage::kCacheBlock - 1) / tutelage::kCacheBlock);
    for (int64_t b = 0; b < lists.back().size(); ++b)
      lists.back()[b] = cache.blocks[static_cast<std::size_t>(d.sequence)][static_cast<std::size_t>(b)].data();
  }
  Memory<void* const*> pointers(static_cast<int64_t>(due.size()));
  for (std::size_t s = 0; s < due.size(); ++s) pointers[static_cast<int64_t>(s)] = lists[s].data();
  const Memory<int32_t> cu_rows = copy_of(rows), first_position = copy_of(first);
  Memory<bf16> qkv(rows.back() * x.row), out(rows.back() * x.o_row);
  tutelage::CachedAttention g{c.heads,
                              c.kv_heads,
                              c.d,
                              c.window,
                              c.scale(),
                              static_cast<int64_t>(due.size()),
                              cu_rows.data(),
                              first_position.data(),
                              pointers.data(),
                              cache.layer};
  for (std::size_t s = 0; s < due.size(); ++s) {
    const int64_t from = x.offsets[static_cast<std::size_t>(due[s].sequence)] + due[s].begin, n = due[s].end - due[s].begin;
    std::memcpy(qkv.data() + rows[s] * x.row, x.qkv.data() + from * x.row, static_cast<std::size_t>(n * x.row) * sizeof(bf16));
    g.most_rows = std::max<int64_t>(g.most_rows, n), g.most_positions = std::max<int64_t>(g.most_positions, due[s].end);
  }
  g.q = qkv.data(), g.k = qkv.data() + c.heads * c.d, g.v = qkv.data() + (c.heads + c.kv_heads) * c.d;
  g.q_row = g.k_row = g.v_row = x.row, g.o = out.data(), g.o_row = x.o_row;
  Memory<float> scratch(tc::cached_attention_scratch_bytes<Split>(g) / 4);
  tc::cached_attention<Split>(g, nullptr, scratch.data());
  for (std::size_t s = 0; s < due.size(); ++s) {
    const int64_t to = x.offsets[static_cast<std::size_t>(due[s].sequence)] + due[s].begin, n = due[s].end - due[s].begin;
    std::memcpy(o.data() + to * x.o_row, out.data() + rows[s] * x.o_row, static_cast<std::size_t>(n * x.o_row) * sizeof(bf16));
  }
}

template <int Split = tc::kSplit>
Memory<bf16> forward(const AttentionCase& c, const AttentionOperands<bf16>& x) {
  Memory<bf16> o(x.tokens * x.o_row);
  tc::flash_attention<Split>({x.shape(c), x.q(), x.k(c), x.v(c), x.row, x.row, x.row, o.data(), x.o_row, nullptr}, nullptr);
  return o;
}

// All sequences side by side, `chunk` rows of each at a time.
Memory<bf16> in_chunks(const AttentionCase& c, const AttentionOperands<bf16>& x, int32_t chunk) {
  CacheMemory cache(c, c.lengths);
  Memory<bf16> o(x.tokens * x.o_row);
  for (int32_t first = 0; first < c.longest(); first += chunk) {
    std::vector<Due> due;
    for (int s = 0; s < static_cast<int>(c.lengths.size()); ++s) {
      const int32_t length = c.lengths[static_cast<std::size_t>(s)];
      if (first < length) due.push_back({s, first, std::min(length, first + chunk)});
    }
    step(c, x, cache, due, o);
  }
  return o;
}

// Everything but the last row in one chunk, then that row alone: its o.
template <int Split = tc::kSplit>
Memory<bf16> decoded(const AttentionCase& c, const AttentionOperands<bf16>& x) {
  CacheMemory cache(c, c.lengths);
  Memory<bf16> o(x.tokens * x.o_row);
  const int32_t length = c.lengths[0];
  if (length > 1) step<Split>(c, x, cache, {{0, 0, length - 1}}, o);
  step<Split>(c, x, cache, {{0, length - 1, length}}, o);
  return o;
}

}  // namespace

// generate = score: a row decoded alone over 1, 511, … keys has the bits that the forward gives it.
TEST(decoding_has_the_forwards_bits) {
  for (int32_t keys : {1, 64, 511, 512, 513, 1100}) {
    if (kSmall && keys > 513) continue;
    const AttentionCase c{{keys}, 2, 1, 16};
    const AttentionOperands<bf16> x(c);
    CHECK(decoded(c, x) == forward(c, x), keys);
  }
  const AttentionCase wide{{kSmall ? 130 : 520}, 4, 2, 64}, eighty{{70}, 3, 3, 80}, widest{{130}, 4, 1, 128},
      many{{67}, 36, 2, 16};
  for (const AttentionCase& c : {wide, eighty, widest, many}) {
    const AttentionOperands<bf16> x(c);
    CHECK(decoded(c, x) == forward(c, x), c.name());
  }
}

TEST(chunks_have_the_forwards_bits) {
  for (const AttentionCase& c : {AttentionCase{{150, 7, 129}, 2, 1, 16}, AttentionCase{{100, 30}, 2, 2, 24, 40},
                                 AttentionCase{{131, 2}, 1, 1, 64}, AttentionCase{{90}, 3, 1, 128}}) {
    const AttentionOperands<bf16> x(c);
    const Memory<bf16> whole = forward(c, x);
    for (int32_t chunk : {23, 64, 129}) CHECK(in_chunks(c, x, chunk) == whole, c.name(), chunk);
  }
  const AttentionCase c{{19, 5}, 2, 1, 8, 6};
  const AttentionOperands<bf16> x(c);
  CHECK(in_chunks(c, x, 1) == forward(c, x), "row by row");
}

// Over the end of a split, with a window that leaves splits out: one block a split and one for all give the same.
TEST(splits_apart_and_together_are_the_same) {
  for (int64_t window : {0, 40, 600}) {
    const AttentionCase c{{kSmall ? 540 : 1060, 530}, 4, 2, 16, window};
    const AttentionOperands<bf16> x(c);
    const Memory<bf16> whole = forward(c, x);
    CacheMemory cache(c, c.lengths);
    Memory<bf16> o(x.tokens * x.o_row);
    const int32_t a = c.lengths[0] - 1, b = c.lengths[1] - 1;
    step(c, x, cache, {{0, 0, a}, {1, 0, b}}, o);
    // 128 times the same two rows: more blocks than splits are given blocks of their own for
    std::vector<Due> many;
    for (int i = 0; i < 64; ++i) many.push_back({0, a, a + 1}), many.push_back({1, b, b + 1});
    step(c, x, cache, many, o);
    CHECK(o == whole, "together", window);
    Memory<bf16> apart = o;
    for (int64_t i = 0; i < x.o_row; ++i) apart[a * x.o_row + i] = {0x7FC0};
    const Memory<bf16> again = every_schedule([&] {
      Memory<bf16> r = apart;
      step(c, x, cache, {{1, b, b + 1}, {0, a, a + 1}}, r);
      return r;
    });
    CHECK(again == whole, "apart", window);
  }
}

// P1, P3: what else is due in a call shows in no bit.
TEST(a_row_has_the_same_bits_whatever_else_is_due) {
  const AttentionCase c{{70, 40, 90}, 2, 1, 32};
  const AttentionOperands<bf16> x(c);
  const Memory<bf16> whole = forward(c, x);
  Memory<bf16> o(x.tokens * x.o_row);
  CacheMemory cache(c, c.lengths);
  step(c, x, cache, {{2, 0, 89}, {0, 0, 1}}, o);
  step(c, x, cache, {{0, 1, 65}, {2, 89, 90}, {1, 0, 40}}, o);  // decoding beside chunks
  step(c, x, cache, {{0, 65, 70}}, o);
  CHECK(o == whole);
}

TEST(a_split_of_another_size_is_noticed) {
  const AttentionCase c{{300}, 1, 1, 16};
  const AttentionOperands<bf16> x(c);
  CHECK(!(decoded<128>(c, x) == forward(c, x)), "the size of the splits does not show");
  CHECK(decoded<128>(c, x) == forward<128>(c, x), "the same size on both sides");
}

TEST(close_to_double) {
  for (const AttentionCase& c :
       {AttentionCase{{70}, 4, 2, 64}, AttentionCase{{33, 1}, 2, 1, 80}, AttentionCase{{66}, 2, 1, 128}}) {
    const AttentionOperands<bf16> x(c);
    const AttentionOperands<float> y(c);
    const Memory<bf16> mine = every_schedule([&] { return in_chunks(c, x, 32); });
    check_error(c.name(), mine, attention_formula(c, y, false).o, attention_formula(c, y, true).o);
  }
}

TEST(banks_and_sectors_of_the_cache) {
  for (int64_t d : {64, 80, 128}) {
    const AttentionCase c{{67}, 4, 2, d};
    const AttentionOperands<bf16> x(c);
    check_memory_traffic(text("cached", d), [&] { decoded(c, x); });
    if (d == 64) check_memory_traffic("splits apart", [&] { decoded<64>(c, x); });
  }
}
