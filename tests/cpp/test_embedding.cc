#include "support.h"

using namespace test;

namespace {

constexpr int64_t kVocab = 19, kPositions = 11;

std::vector<int32_t> ids_of(int64_t tokens, int64_t limit) {  // many repeats
  std::vector<int32_t> ids;
  for (int64_t i = 0; i < tokens; ++i) ids.push_back(int32_t((i * i + 3 * i) % limit));
  return ids;
}

}  // namespace

TEST(look_up_with_and_without_positions) {
  for (int64_t tokens : {0, 1, 17, 64})
    for (int64_t d : {1, 8, 16, 21, 100})
      for (bool positions : {false, true}) {
        const std::vector<int32_t> ids = ids_of(tokens, kVocab), at = ids_of(tokens, kPositions);
        const Outputs<float> mine = same_everywhere([&](const KernelTable& t, int threads, const Source<float>& in) {
          const std::vector<float> table = in(kVocab * d, 1), position_table = in(kPositions * d, 2);
          std::vector<float> y = blank<float>(tokens * d);
          t.embedding({tokens, d, ids.data(), table.data(), positions ? at.data() : nullptr,
                       positions ? position_table.data() : nullptr, y.data()},
                      threads);
          return Outputs<float>{y};
        });
        const std::vector<float> table = Source<float>{}(kVocab * d, 1), position_table = Source<float>{}(kPositions * d, 2);
        std::vector<float> expected;
        for (int64_t t = 0; t < tokens; ++t)
          for (int64_t j = 0; j < d; ++j)
            expected.push_back(table[ids[t] * d + j] + (positions ? position_table[at[t] * d + j] : 0.0f));
        CHECK(same_bits(mine[0], expected), tokens, d, positions);
      }
}

TEST(the_gradient_is_one_chain_a_row_over_its_tokens_in_order) {
  for (int64_t tokens : {0, 1, 17, 64})
    for (int64_t d : {1, 8, 16, 21, 100}) {
      const std::vector<int32_t> ids = ids_of(tokens, kVocab);
      const std::vector<float> dy = Source<float>{}(tokens * d, 1);
      const Outputs<float> mine = same_everywhere([&](const KernelTable& t, int threads, const Source<float>& in) {
        std::vector<float> dtable = in(kVocab * d, 2);
        t.embedding_backward({tokens, d, ids.data(), in(tokens * d, 1).data(), dtable.data()}, threads);
        return Outputs<float>{dtable};
      });
      std::vector<float> expected = Source<float>{}(kVocab * d, 2), reversed = expected, cut = expected;
      for (int64_t t = 0; t < tokens; ++t)
        for (int64_t j = 0; j < d; ++j) {
          expected[ids[t] * d + j] += dy[t * d + j];
          const int64_t last = tokens - 1 - t;
          reversed[ids[last] * d + j] += dy[last * d + j];
        }
      CHECK(same_bits(mine[0], expected), tokens, d);
      for (int64_t begin = 0, end = 0; begin < tokens; begin = end) {  // in pieces of 1, 3, 5, ... tokens
        end = std::min(tokens, 2 * begin + 1);
        scalar_table()->embedding_backward({end - begin, d, ids.data() + begin, dy.data() + begin * d, cut.data()}, 2);
      }
      CHECK(same_bits(cut, expected), tokens, d);
      if (tokens == 64 && d > 8) CHECK(!same_bits(reversed, expected), "control: the order shows", d);
    }
}

TEST(float64_and_nan) {
  const int32_t ids[] = {2, 0, 2};
  const std::vector<double> table = Source<double>{}(3 * 5, 1), dy = Source<double>{}(3 * 5, 2);
  std::vector<double> y = blank<double>(15), dtable(15, 0.0);
  float64_table()->embedding({3, 5, ids, table.data(), nullptr, nullptr, y.data()}, 2);
  float64_table()->embedding_backward({3, 5, ids, dy.data(), dtable.data()}, 2);
  for (int j = 0; j < 5; ++j) {
    CHECK(y[j] == table[10 + j] && y[5 + j] == table[j] && y[10 + j] == table[10 + j], j);
    CHECK(dtable[j] == dy[5 + j] && dtable[5 + j] == 0 && dtable[10 + j] == dy[j] + dy[10 + j], j);
  }
  std::vector<float> gradient(15, 0.0f), slopes(15, 1.0f);
  slopes[3] = kNan<float>;  // token 0, id 2
  scalar_table()->embedding_backward({3, 5, ids, slopes.data(), gradient.data()}, 1);
  for (int i = 0; i < 15; ++i) CHECK(std::isnan(gradient[i]) == (i == 13), i);
}
