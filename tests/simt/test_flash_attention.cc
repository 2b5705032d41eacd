#include "attention.h"
#include "cuda/kernels/flash_attention_backward.cuh"
#include "kernels/select.h"

using namespace test;
namespace tc = tutelage::cuda;

namespace {

struct Forward {
  Memory<bf16> o;
  Memory<float> lse;
  bool operator==(const Forward& other) const { return o == other.o && lse == other.lse; }
};

template <class T>
tutelage::Attention arguments(const AttentionCase& c, const AttentionOperands<T>& x, T* o, float* lse) {
  return {x.shape(c), x.q(), x.k(c), x.v(c), x.row, x.row, x.row, o, x.o_row, lse};
}
template <int Split = tc::kSplit>
Forward forward(const AttentionCase& c, const AttentionOperands<bf16>& x) {
  Forward r{Memory<bf16>(x.tokens * x.o_row), Memory<float>(x.tokens * c.heads)};
  tc::flash_attention<Split>(arguments(c, x, r.o.data(), r.lse.data()), nullptr);
  return r;
}
Forward forward(const AttentionCase& c, const std::vector<std::uint64_t>& salts = {}) {
  return forward(c, AttentionOperands<bf16>(c, salts));
}

template <class T>
tutelage::AttentionBackward arguments(const AttentionCase& c, const AttentionOperands<T>& x, const T* o, const float* lse,
                                      T* dqkv) {
  return {x.shape(c),
          x.q(),
          x.k(c),
          x.v(c),
          x.row,
          x.row,
          x.row,
          o,
          lse,
          x.d_o.data(),
          x.o_row,
          x.o_row,
          dqkv,
          dqkv + c.heads * c.d,
          dqkv + (c.heads + c.kv_heads) * c.d,
          x.row,
          x.row,
          x.row};
}
Memory<bf16> backward(const AttentionCase& c, const AttentionOperands<bf16>& x, const Forward& f) {
  Memory<bf16> dqkv(x.qkv.size());
  const tutelage::AttentionBackward g = arguments(c, x, f.o.data(), f.lse.data(), dqkv.data());
  Memory<float> scratch(tc::flash_attention_backward_scratch_bytes(g) / 4);
  tc::flash_attention_backward(g, nullptr, scratch.data());
  return dqkv;
}
// One of dq, dk, dv as a matrix of its own: their errors are of different sizes.
template <class C>
std::vector<double> part(const AttentionCase& c, const C& dqkv, int64_t begin, int64_t width) {
  std::vector<double> out;
  int64_t i = 0;
  for (const auto& e : dqkv) {
    const int64_t column = i++ % ((c.heads + 2 * c.kv_heads) * c.d) - begin * c.d;
    if (column >= 0 && column < width * c.d) out.push_back(value(e));
  }
  return out;
}

std::vector<AttentionCase> shapes() {
  std::vector<AttentionCase> all = {{{1, 17, 70}, 2, 1, 8}, {{5, 0, 2}, 3, 1, 24},         {{130, 3}, 2, 2, 64},
                                    {{65, 64}, 2, 1, 80},   {{63, 1, 66}, 4, 2, 128},      {{140, 40}, 2, 2, 16, 50},
                                    {{70}, 1, 1, 64, 9},    {{33, 90}, 1, 1, 32, 0, false}};
  if (!kSmall) all.push_back({{530}, 1, 1, 64}), all.push_back({{600}, 1, 1, 16, 100});
  return all;
}

}  // namespace

TEST(forward_is_close_to_double_and_to_the_cpus) {
  for (const AttentionCase& c : shapes()) {
    const Forward mine = every_schedule([&] { return forward(c); });
    const AttentionOperands<float> x(c);
    const AttentionResult exact = attention_formula(c, x, false), eager = attention_formula(c, x, true);
    check_error("o " + c.name(), mine.o, exact.o, eager.o);
    check_error("lse " + c.name(), mine.lse, exact.lse, eager.lse);
    Memory<float> o(mine.o.size()), lse(mine.lse.size());
    tutelage::scalar_table()->flash_attention(arguments(c, x, o.data(), lse.data()), 1);
    check_error("o, CPU " + c.name(), mine.o, o, eager.o);
    check_close("lse, CPU " + c.name(), mine.lse, lse, 1e-5);
  }
}

// P1: what stands around a sequence and where it stands shows in no bit.
TEST(a_sequence_has_the_same_bits_in_every_batch) {
  const int64_t d = 64;
  const AttentionCase alone{{70}, 2, 1, d};
  const Forward expected = forward(alone, {7});
  const int64_t row = alone.heads * d;
  for (int place = 0; place < 3; ++place) {
    AttentionCase c{{9, 33, 129}, 2, 1, d};
    std::vector<std::uint64_t> salts = {1, 2, 3};
    c.lengths[static_cast<std::size_t>(place)] = 70, salts[static_cast<std::size_t>(place)] = 7;
    const Forward all = forward(c, salts);
    int64_t first = 0;
    for (int s = 0; s < place; ++s) first += c.lengths[static_cast<std::size_t>(s)];
    CHECK(std::memcmp(all.o.data() + first * row, expected.o.data(), sizeof(bf16) * 70 * static_cast<std::size_t>(row)) == 0,
          place);
    CHECK(std::memcmp(all.lse.data() + first * 2, expected.lse.data(), sizeof(float) * 140) == 0, place);
  }
}

// A row sees no later token: cutting the sequence off behind it changes nothing.
TEST(a_row_has_the_same_bits_whatever_follows) {
  const AttentionCase longer{{kSmall ? 150 : 600}, 1, 1, 16};
  const Forward all = forward(longer);
  for (int32_t length : {1, 64, 65, 100}) {
    AttentionCase c = longer;
    c.lengths = {length};
    const Forward part = forward(c);
    CHECK(std::memcmp(all.o.data(), part.o.data(), sizeof(bf16) * static_cast<std::size_t>(part.o.size())) == 0, length);
    CHECK(std::memcmp(all.lse.data(), part.lse.data(), sizeof(float) * static_cast<std::size_t>(part.lse.size())) == 0, length);
  }
}

TEST(gradients_are_close_to_double_and_to_the_cpus) {
  for (const AttentionCase& c : shapes()) {
    const AttentionOperands<bf16> in(c);
    const AttentionOperands<float> x(c);
    const Forward f = forward(c, in);
    const Memory<bf16> mine = every_schedule([&] { return backward(c, in, f); });
    const AttentionResult exact = attention_formula(c, x, false), eager = attention_formula(c, x, true);
    Memory<float> o(f.o.size()), lse(f.lse.size()), cpu(mine.size());
    tutelage::scalar_table()->flash_attention(arguments(c, x, o.data(), lse.data()), 1);
    tutelage::scalar_table()->flash_attention_backward(arguments(c, x, o.data(), lse.data(), cpu.data()), 1);
    const std::pair<int64_t, int64_t> parts[] = {{0, c.heads}, {c.heads, c.kv_heads}, {c.heads + c.kv_heads, c.kv_heads}};
    const char* const names[] = {"dq ", "dk ", "dv "};
    for (int i = 0; i < 3; ++i) {
      const auto [begin, width] = parts[i];
      const auto own = part(c, mine, begin, width), yardstick = part(c, eager.dqkv, begin, width);
      check_error(names[i] + c.name(), own, part(c, exact.dqkv, begin, width), yardstick);
      check_error(names[i] + c.name() + " CPU", own, part(c, cpu, begin, width), yardstick);
    }
  }
}

TEST(gradients_have_the_same_bits_in_every_batch) {
  const AttentionCase alone{{70}, 2, 1, 64};
  auto gradients = [&](const AttentionCase& c, const std::vector<std::uint64_t>& salts) {
    const AttentionOperands<bf16> x(c, salts);
    return backward(c, x, forward(c, x));
  };
  const Memory<bf16> expected = gradients(alone, {7});
  for (int place = 0; place < 3; ++place) {
    AttentionCase c{{9, 33, 129}, 2, 1, 64};
    std::vector<std::uint64_t> salts = {1, 2, 3};
    c.lengths[static_cast<std::size_t>(place)] = 70, salts[static_cast<std::size_t>(place)] = 7;
    int64_t first = 0;
    for (int s = 0; s < place; ++s) first += c.lengths[static_cast<std::size_t>(s)];
    const Memory<bf16> all = gradients(c, salts);
    CHECK(std::memcmp(all.data() + first * 4 * 64, expected.data(), sizeof(bf16) * 70 * 4 * 64) == 0, place);
  }
}

TEST(other_splits_give_other_bits) {
  const AttentionCase c{{200}, 1, 1, 16};
  const AttentionOperands<bf16> x(c);
  const Forward whole = forward(c, x), cut = forward<64>(c, x);
  CHECK(!(whole == cut), "the size of the splits does not show");
  CHECK(std::memcmp(whole.o.data(), cut.o.data(), sizeof(bf16) * 64 * 16) == 0, "rows of one split differ");
}

TEST(banks_and_sectors) {
  for (int64_t d : {64, 80, 128}) check_memory_traffic(text("forward", d), [&] { forward({{96, 32}, 1, 1, d}); });
  for (int64_t d : {64, 80, 128}) {
    const AttentionCase c{{96, 32}, 1, 1, d};
    const AttentionOperands<bf16> x(c);
    const Forward f = forward(c, x);
    check_memory_traffic(text("backward", d), [&] { backward(c, x, f); });
  }
  // of two heads, lse lies 8 bytes apart: two sectors for each eight rows, and nothing else is read or written in parts
  simt::Run counted({simt::Schedule::forward, 0, true});
  forward({{64}, 2, 1, 64});
  CHECK(counted.launches[0].bank_conflicts == 0 && counted.launches[0].excess_sectors == 2 * 64 / 8,
        counted.launches[0].excess_sectors, counted.launches[0].worst_excess);
}

TEST(a_head_that_is_too_wide_is_refused) {
  for (int64_t d : {136, 12, 0}) {
    std::string said;
    try {
      tc::with_head_dim(d, [](auto) {});
    } catch (const std::invalid_argument& e) {
      said = e.what();
    }
    CHECK(said == "head_dim " + std::to_string(d) + ": attention on a CUDA device takes multiples of 8 up to 128", said);
  }
}
