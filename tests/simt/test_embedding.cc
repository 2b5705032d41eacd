#include "cuda/kernels/embedding.cuh"
#include "device.h"
#include "kernels/select.h"

using namespace test;
namespace tc = tutelage::cuda;

namespace {

constexpr int64_t kRows = 37;

Memory<int32_t> ids_of(int64_t tokens) {  // some often, some never
  Memory<int32_t> ids(tokens);
  for (int64_t t = 0; t < tokens; ++t) ids[t] = static_cast<int32_t>(t % 3 == 0 ? 5 : (t * t + 11) % kRows);
  return ids;
}

Memory<bf16> forward(int64_t tokens, int64_t d, bool positions) {
  const Memory<int32_t> ids = ids_of(tokens);
  Memory<int32_t> places(tokens);
  for (int64_t t = 0; t < tokens; ++t) places[t] = static_cast<int32_t>(tokens - 1 - t);
  const Memory<bf16> table = random_bf16(kRows * d, 1), position_table = random_bf16(tokens * d, 2);
  Memory<bf16> y(tokens * d);
  tc::embedding({tokens, d, ids.data(), table.data(), positions ? places.data() : nullptr,
                 positions ? position_table.data() : nullptr, y.data()},
                nullptr);
  return y;
}

template <class T>
Memory<float> backward(int64_t tokens, int64_t d, int64_t cut) {
  const Memory<int32_t> ids = ids_of(tokens);
  const std::vector<float> numbers = floats(random_bf16(tokens * d, 3));
  Memory<T> dy(tokens * d);
  for (int64_t i = 0; i < dy.size(); ++i) {
    if constexpr (sizeof(T) == 4)
      dy[i] = numbers[static_cast<std::size_t>(i)];
    else
      dy[i] = to_bf16(numbers[static_cast<std::size_t>(i)]);
  }
  Memory<float> dtable = random_float(kRows * d, 4);
  for (auto [begin, end] : {std::pair<int64_t, int64_t>{0, cut}, {cut, tokens}})
    tc::embedding_backward({end - begin, d, ids.data() + begin, dy.data() + begin * d, dtable.data(), sizeof(T) == 4}, nullptr);
  return dtable;
}

}  // namespace

TEST(rows_are_looked_up_and_positions_added) {
  for (auto [tokens, d] : {std::pair<int64_t, int64_t>{1, 1}, {5, 7}, {67, 64}, {9, 1032}}) {
    const Memory<int32_t> ids = ids_of(tokens);
    const Memory<bf16> table = random_bf16(kRows * d, 1), position_table = random_bf16(tokens * d, 2);
    const Memory<bf16> plain = every_schedule([&, t = tokens, w = d] { return forward(t, w, false); });
    const Memory<bf16> placed = every_schedule([&, t = tokens, w = d] { return forward(t, w, true); });
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t j = 0; j < d; ++j) {
        const bf16 own = table[ids[t] * d + j];
        CHECK(plain[t * d + j].bits == own.bits, t, j);
        CHECK(placed[t * d + j].bits == to_bf16(to_float(own) + to_float(position_table[(tokens - 1 - t) * d + j])).bits, t, j);
      }
  }
}

TEST(a_row_of_the_gradient_is_one_chain_however_the_tokens_are_cut) {
  for (auto [tokens, d] : {std::pair<int64_t, int64_t>{1, 1}, {40, 7}, {300, 24}, {12, 2100}, {kSmall ? 270 : 520, 3}}) {
    const Memory<int32_t> ids = ids_of(tokens);
    const std::vector<float> dy = floats(random_bf16(tokens * d, 3));
    std::vector<float> expected = floats(random_float(kRows * d, 4));
    tutelage::scalar_table()->embedding_backward({tokens, d, ids.data(), dy.data(), expected.data()}, 1);
    for (int64_t cut : {int64_t(0), tokens / 3, tokens}) {
      if (kSmall && cut == tokens) continue;
      const auto mine = every_schedule([&, t = tokens, w = d] { return backward<bf16>(t, w, cut); });
      CHECK(floats(mine) == expected, tokens, d, cut);  // the CPU's bits: the same chain
      CHECK(backward<float>(tokens, d, cut) == mine, tokens, d, cut);
    }
  }
}

TEST(memory_is_read_and_written_in_whole_sectors) {
  check_memory_traffic("embedding", [] { forward(40, 128, true); });
  check_memory_traffic("embedding backward", [] { backward<bf16>(256, 256, 0); });
}
