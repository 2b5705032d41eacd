// Which levels there are, and that the self-check catches a kernel that is wrong in one bit.
#include <cstdlib>

#include "core/error.h"
#include "support.h"

using namespace test;

namespace {

void flip(void* x) {  // the lowest bit of the first element
  std::uint32_t bits;
  std::memcpy(&bits, x, sizeof bits);
  bits ^= 1;
  std::memcpy(x, &bits, sizeof bits);
}

struct Wrong {
  const char* expected;  // the name that self_check must give
  void (*break_it)(KernelTable&);
};
#define WRONG(expected, kernel, Arguments, output)    \
  {expected, [](KernelTable& t) {                     \
     t.kernel = [](const Arguments& g, int threads) { \
       scalar_table()->kernel(g, threads);            \
       flip(g.output);                                \
     };                                               \
   }}
const Wrong kWrong[] = {
    WRONG("matmul", matmul, Matmul, c),
    {"matmul + swiglu backward",
     [](KernelTable& t) {  // one epilogue only
       t.matmul = [](const Matmul& g, int threads) {
         scalar_table()->matmul(g, threads);
         if (g.activation == Activation::swiglu_backward) flip(g.activated);
       };
     }},
    WRONG("flash_attention", flash_attention, Attention, lse),
    WRONG("flash_attention", flash_attention_backward, AttentionBackward, dk),
    WRONG("rms_norm, layer_norm, column_sum", rms_norm, RmsNorm, y),
    WRONG("rms_norm, layer_norm, column_sum", rms_norm_backward, RmsNormBackward, dweight),
    WRONG("rms_norm, layer_norm, column_sum", layer_norm, LayerNorm, rstd),
    WRONG("rms_norm, layer_norm, column_sum", layer_norm_backward, LayerNormBackward, dx),
    WRONG("rms_norm, layer_norm, column_sum", column_sum, ColumnSum, out),
    WRONG("element-wise kernels", gelu, Gelu, y),
    WRONG("element-wise kernels", gelu_backward, GeluBackward, dx),
    WRONG("element-wise kernels", swiglu, Swiglu, y),
    WRONG("element-wise kernels", swiglu_backward, SwigluBackward, d_up),
    WRONG("element-wise kernels", rope, Rope, y),
    WRONG("element-wise kernels", embedding, Embedding, y),
    WRONG("element-wise kernels", embedding_backward, EmbeddingBackward, dtable),
    WRONG("element-wise kernels", adamw, AdamW, v),
    WRONG("element-wise kernels", total, Total, out),
    WRONG("cached_attention", cached_attention, CachedAttention, o),
    WRONG("linear_logprob", linear_logprob, LinearLogprob, entropy),
    WRONG("linear_logprob", linear_logprob_backward, LinearLogprobBackward, dweight),
    WRONG("sample", sample, Sample, logprob),
};

}  // namespace

TEST(every_supported_level_passes_the_self_check) {
  for (const KernelTable* t : float_tables()) CHECK(self_check(*t).empty(), t->name, self_check(*t));
  KernelTable copy = *scalar_table();
  CHECK(self_check(copy).empty(), self_check(copy));
}

TEST(control_a_kernel_that_is_wrong_in_one_bit_is_caught_and_named) {
  for (const Wrong& wrong : kWrong) {
    KernelTable table = *scalar_table();
    wrong.break_it(table);
    CHECK(self_check(table) == wrong.expected, "expected", wrong.expected, "got", self_check(table));
  }
}

TEST(the_best_level_comes_first_and_scalar_last) {
  const std::vector<Level> all = levels();
  CHECK(all.back().table == scalar_table() && all.back().supported);
#if defined(TUTELAGE_X86)
  CHECK(all.size() == 3 && all[0].table == avx512_table() && all[1].table == avx2_table(), all.size());
#elif defined(TUTELAGE_NEON)
  CHECK(all.size() == 2 && all[0].table == neon_table() && all[0].supported, all.size());
#endif
  for (const Level& level : all) CHECK(level.table->activation_size == 4, level.table->name);
  CHECK(float64_table()->activation_size == 8);
}

TEST(levels_are_found_by_name) {
  CHECK(&find_table("scalar") == scalar_table() && &find_table("float64") == float64_table());
#if defined(TUTELAGE_X86)
  CHECK_THROWS(ArgumentError, "unknown ISA level 'sse9'; this build has avx512, avx2, scalar", find_table("sse9"));
  for (const Level& level : levels()) {
    if (level.supported)
      CHECK(&find_table(level.table->name) == level.table, level.table->name);
    else
      CHECK_THROWS(ArgumentError, "ISA level '" + std::string(level.table->name) + "' cannot run on this CPU",
                   find_table(level.table->name));
  }
#endif
}

TEST(the_environment_chooses_the_level_of_the_process) {  // read once, at the first call: here
  setenv("TUTELAGE_ISA", "scalar", 1);
  CHECK(&active_table() == scalar_table(), active_table().name);
  setenv("TUTELAGE_ISA", "sse9", 1);
  CHECK(&active_table() == scalar_table(), "later changes of the environment change nothing");
  unsetenv("TUTELAGE_ISA");
}
