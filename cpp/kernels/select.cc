#include "kernels/select.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "core/error.h"

namespace tutelage {
namespace {

// Inputs of the self-check: small, odd, never a multiple of a tile, with a tail in every direction.
constexpr std::int64_t kTokens = 19, kWidth = 21, kDepth = 13, kHeads = 2, kHeadDim = 24, kVocab = 275;

std::vector<float> numbers(std::int64_t n, std::uint32_t seed) {
  std::vector<float> x(static_cast<std::size_t>(n));
  for (float& v : x) {
    seed = seed * 1664525u + 1013904223u;
    v = static_cast<float>(static_cast<std::int32_t>(seed)) * 0x1p-31f;
  }
  return x;
}

using Output = std::vector<std::vector<float>>;

Output run_matmul(const KernelTable& t, Activation activation) {
  const std::vector<float> a = numbers(kTokens * kDepth, 1), b = numbers(2 * kWidth * kDepth, 2), bias = numbers(2 * kWidth, 3);
  const std::vector<float> pre = numbers(kTokens * 2 * kWidth, 4);
  Output out{numbers(kTokens * 2 * kWidth, 5), numbers(kTokens * 2 * kWidth, 6)};
  Matmul g;
  g.m = kTokens, g.n = activation == Activation::swiglu ? 2 * kWidth : kWidth, g.k = kDepth;
  g.a = a.data(), g.a_row = kDepth, g.a_col = 1;
  g.b = b.data(), g.b_row = 1, g.b_col = kDepth;
  g.c = out[0].data(), g.c_row = 2 * kWidth;
  g.activation = activation, g.activated = out[1].data(), g.activated_row = 2 * kWidth;
  g.pre = pre.data(), g.pre_row = 2 * kWidth;
  if (activation == Activation::none || activation == Activation::gelu || activation == Activation::swiglu)
    g.bias = bias.data();
  t.matmul(g, 1);
  return out;
}

Output run_matmul_transposed(const KernelTable& t) {  // dW = dY^T X: continues from what is there
  const std::vector<float> dy = numbers(kTokens * kWidth, 1), x = numbers(kTokens * kDepth, 2);
  Output out{numbers(kWidth * kDepth, 3)};
  Matmul g;
  g.m = kWidth, g.n = kDepth, g.k = kTokens;
  g.a = dy.data(), g.a_row = 1, g.a_col = kWidth;
  g.b = x.data(), g.b_row = kDepth, g.b_col = 1;
  g.c = out[0].data(), g.c_row = kDepth, g.accumulate = true;
  t.matmul(g, 1);
  return out;
}

Output run_matmul_packed(const KernelTable& t) {  // of few rows and of more than a tile, from float and bfloat16 panels
  const std::vector<float> a = numbers(kTokens * kDepth, 1), b = numbers(kWidth * kDepth, 2);
  Output out;
  for (bool half : {false, true})
    for (std::int64_t rows : {std::int64_t{3}, kTokens}) {
      std::vector<float> panels(static_cast<std::size_t>(packed_weight_elements(kWidth, kDepth, false)));
      t.pack_weight({kWidth, kDepth, b.data(), 1, kDepth, false, half, panels.data()}, 1);
      out.emplace_back(static_cast<std::size_t>(rows * kWidth));
      Matmul g;
      g.m = rows, g.n = kWidth, g.k = kDepth, g.a = a.data(), g.a_row = kDepth, g.c = out.back().data(), g.c_row = kWidth;
      g.packed = panels.data(), g.packed_half = half;
      t.matmul(g, 1);
    }
  return out;
}

Output run_cached_attention(const KernelTable& t) {  // a chunk, then a token
  const std::int64_t row = kHeads * kHeadDim, n = kTokens * row;
  const std::vector<float> q = numbers(n, 1), k = numbers(n, 2), v = numbers(n, 3);
  std::vector<float> block(static_cast<std::size_t>(cached_attention_elements(kHeads / 2, kHeadDim)));
  Output out{std::vector<float>(static_cast<std::size_t>(n))};
  void* places[] = {block.data()};
  void* const* blocks[] = {places};
  const std::int32_t last = static_cast<std::int32_t>(kTokens - 1), chunk[] = {0, last}, token[] = {0, 1}, start = 0;
  CachedAttention c{kHeads, kHeads / 2, kHeadDim, 0,        0.2, 1,   chunk, &start,        blocks,
                    0,      q.data(),   k.data(), v.data(), row, row, row,   out[0].data(), row};
  t.cached_attention(c, 1);
  c.cu_rows = token, c.first_position = &last;
  c.q = q.data() + last * row, c.k = k.data() + last * row, c.v = v.data() + last * row, c.o = out[0].data() + last * row;
  t.cached_attention(c, 1);
  return out;
}

Output run_sample(const KernelTable& t) {
  const std::vector<float> x = numbers(kTokens * kDepth, 1), w = numbers(kVocab * kDepth, 2);
  SampleSettings settings[kTokens];
  for (std::uint32_t i = 0; i < kTokens; ++i) {
    settings[i].temperature = i == 0 ? 0.0 : 0.7, settings[i].top_k = i % 3 == 1 ? 5 : 0, settings[i].key = i;
    settings[i].top_p = i % 3 == 2 ? 0.5 : 1.0;
  }
  std::int32_t tokens[kTokens];
  Output out(3, std::vector<float>(static_cast<std::size_t>(kTokens)));
  std::vector<float> z(static_cast<std::size_t>(kTokens * kVocab));
  Sample s;
  s.rows = kTokens, s.hidden = kDepth, s.vocab = kVocab, s.x = x.data(), s.weight = w.data(), s.settings = settings;
  s.z = z.data(), s.tokens = tokens, s.logprob = out[0].data(), s.support_logprob = out[1].data();
  t.sample(s, 1);
  for (std::int64_t i = 0; i < kTokens; ++i) out[2][static_cast<std::size_t>(i)] = static_cast<float>(tokens[i]);
  return out;
}

Output run_attention(const KernelTable& t) {
  const std::int32_t cu_seqlens[] = {0, 5, kTokens};
  const std::int64_t row = kHeads * kHeadDim, n = kTokens * row;
  const std::vector<float> q = numbers(n, 1), k = numbers(n, 2), v = numbers(n, 3), d_o = numbers(n, 4);
  Output out(5, std::vector<float>(static_cast<std::size_t>(n)));
  out.emplace_back(static_cast<std::size_t>(kTokens * kHeads));
  const AttentionShape shape{2, cu_seqlens, kHeads, kHeads / 2, kHeadDim, true, 0, 0.2};
  Attention f{shape, q.data(), k.data(), v.data(), row, row, row, out[0].data(), row, out[5].data()};
  t.flash_attention(f, 1);
  AttentionBackward b{shape,         q.data(),      k.data(),      v.data(),   row, row,
                      row,           out[0].data(), out[5].data(), d_o.data(), row, row,
                      out[1].data(), out[2].data(), out[3].data(), row,        row, row};
  t.flash_attention_backward(b, 1);
  return out;
}

Output run_norms(const KernelTable& t) {
  const std::vector<float> x = numbers(kTokens * kWidth, 1), w = numbers(kWidth, 2), bias = numbers(kWidth, 3);
  const std::vector<float> dy = numbers(kTokens * kWidth, 4);
  Output out(4, std::vector<float>(static_cast<std::size_t>(kTokens * kWidth)));
  for (int i = 0; i < 3; ++i) out.emplace_back(static_cast<std::size_t>(kTokens));
  for (int i = 0; i < 3; ++i) out.emplace_back(static_cast<std::size_t>(kWidth));
  RmsNorm rms;
  rms.tokens = kTokens, rms.d = kWidth, rms.x = x.data(), rms.x_row = kWidth, rms.weight = w.data(), rms.eps = 1e-5;
  rms.y = out[0].data(), rms.y_row = kWidth, rms.rstd = out[4].data();
  t.rms_norm(rms, 1);
  RmsNormBackward rms_b;
  rms_b.tokens = kTokens, rms_b.d = kWidth, rms_b.x = x.data(), rms_b.x_row = kWidth, rms_b.weight = w.data();
  rms_b.rstd = out[4].data(), rms_b.dy = dy.data(), rms_b.dy_row = kWidth, rms_b.dx = out[1].data(), rms_b.dx_row = kWidth;
  rms_b.dweight = out[7].data();
  t.rms_norm_backward(rms_b, 1);
  LayerNorm ln;
  ln.tokens = kTokens, ln.d = kWidth, ln.x = x.data(), ln.x_row = kWidth, ln.weight = w.data(), ln.bias = bias.data();
  ln.eps = 1e-5, ln.y = out[2].data(), ln.y_row = kWidth, ln.mean = out[5].data(), ln.rstd = out[6].data();
  t.layer_norm(ln, 1);
  LayerNormBackward ln_b;
  ln_b.tokens = kTokens, ln_b.d = kWidth, ln_b.x = x.data(), ln_b.x_row = kWidth, ln_b.weight = w.data();
  ln_b.mean = out[5].data(), ln_b.rstd = out[6].data(), ln_b.dy = dy.data(), ln_b.dy_row = kWidth;
  ln_b.dx = out[3].data(), ln_b.dx_row = kWidth, ln_b.dweight = out[8].data(), ln_b.dbias = out[9].data();
  t.layer_norm_backward(ln_b, 1);
  t.column_sum({kTokens, kWidth, x.data(), kWidth, out[9].data()}, 1);
  return out;
}

Output run_elementwise(const KernelTable& t) {
  const std::int64_t n = kTokens * kWidth;
  const std::vector<float> x = numbers(n, 1), y = numbers(n, 2), dy = numbers(n, 3), table = numbers(n, 4);
  Output out(12, std::vector<float>(static_cast<std::size_t>(n)));
  for (bool erf : {false, true}) {
    t.gelu({n, x.data(), out[erf].data(), erf}, 1);
    t.gelu_backward({n, x.data(), dy.data(), out[2 + erf].data(), erf}, 1);
  }
  t.swiglu({kTokens, kWidth, x.data(), y.data(), kWidth, out[4].data(), kWidth}, 1);
  t.swiglu_backward({kTokens, kWidth, x.data(), y.data(), kWidth, dy.data(), kWidth, out[5].data(), out[6].data(), kWidth}, 1);
  std::int32_t ids[kTokens];
  for (std::int32_t i = 0; i < kTokens; ++i) ids[i] = i * 7 % 11;
  t.embedding({kTokens, kWidth, ids, table.data(), ids, y.data(), out[7].data()}, 1);
  t.embedding_backward({kTokens, kWidth, ids, dy.data(), out[8].data()}, 1);
  Rope rope;  // heads of 6 in rows of 21: x as [19, 3, 6]
  rope.tokens = kTokens, rope.heads = 3, rope.d = 6, rope.x = x.data(), rope.x_row = kWidth, rope.y = out[9].data();
  rope.y_row = kWidth, rope.positions = ids, rope.cos = table.data(), rope.sin = y.data();
  t.rope(rope, 1);
  out[10] = x, out[11] = y;
  std::vector<float> v = numbers(n, 9);
  for (float& s : v) s *= s;
  AdamW adam{n, out[10].data(), dy.data(), out[11].data(), v.data(), 1e-2, 0.9, 0.95, 1e-8, 0.1, 0.1, 0.05, 0.5};
  t.adamw(adam, 1);
  out.push_back(v);
  out.emplace_back(2);
  t.total({n, x.data(), nullptr, 1, nullptr, out.back().data()}, 1);
  double squares = 0;
  t.sum_of_squares({n, x.data(), &squares}, 1);
  out.back()[1] = static_cast<float>(squares);
  return out;
}

Output run_linear_logprob(const KernelTable& t) {
  const std::vector<float> x = numbers(kTokens * kDepth, 1), w = numbers(kVocab * kDepth, 2), g = numbers(2 * kTokens, 3);
  std::int32_t targets[kTokens];
  for (std::int32_t i = 0; i < kTokens; ++i) targets[i] = i * 14;
  Output out(3, std::vector<float>(static_cast<std::size_t>(kTokens)));
  out.emplace_back(static_cast<std::size_t>(kTokens * kDepth));
  out.emplace_back(static_cast<std::size_t>(kVocab * kDepth));
  LinearLogprob f;
  f.rows = kTokens, f.hidden = kDepth, f.vocab = kVocab, f.x = x.data(), f.weight = w.data(), f.targets = targets;
  f.temperature = 0.7, f.logprob = out[0].data(), f.entropy = out[1].data(), f.lse = out[2].data();
  t.linear_logprob(f, 1);
  LinearLogprobBackward b;
  b.rows = kTokens, b.hidden = kDepth, b.vocab = kVocab, b.x = x.data(), b.weight = w.data(), b.targets = targets;
  b.temperature = 0.7, b.block_rows = 8, b.entropy = out[1].data(), b.lse = out[2].data();
  b.d_logprob = g.data(), b.d_entropy = g.data() + kTokens, b.dx = out[3].data(), b.dweight = out[4].data();
  t.linear_logprob_backward(b, 1);
  return out;
}

struct Check {
  const char* name;
  Output (*run)(const KernelTable&);
};
template <Activation activation>
Output run_fused(const KernelTable& t) {
  return run_matmul(t, activation);
}
constexpr Check kChecks[] = {{"matmul", run_fused<Activation::none>},
                             {"matmul + gelu", run_fused<Activation::gelu>},
                             {"matmul + swiglu", run_fused<Activation::swiglu>},
                             {"matmul + gelu backward", run_fused<Activation::gelu_backward>},
                             {"matmul + swiglu backward", run_fused<Activation::swiglu_backward>},
                             {"matmul, transposed", run_matmul_transposed},
                             {"matmul, packed", run_matmul_packed},
                             {"flash_attention", run_attention},
                             {"cached_attention", run_cached_attention},
                             {"rms_norm, layer_norm, column_sum", run_norms},
                             {"element-wise kernels", run_elementwise},
                             {"linear_logprob", run_linear_logprob},
                             {"sample", run_sample}};

#if defined(TUTELAGE_X86)
bool cpu_has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool cpu_has_avx512() { return __builtin_cpu_supports("avx512f") && cpu_has_avx2(); }
#endif

const KernelTable* choose() {
  if (const char* wanted = std::getenv("TUTELAGE_ISA"); wanted != nullptr && *wanted != '\0') return &find_table(wanted);
  for (const Level& level : levels()) {
    if (!level.supported) continue;
    const std::string wrong = self_check(*level.table);
    if (wrong.empty()) return level.table;
    std::fprintf(stderr,
                 "tutelage: the %s kernels failed their self-check (%s differs from scalar); using the next level down\n",
                 level.table->name, wrong.c_str());
  }
  return scalar_table();
}

}  // namespace

std::vector<Level> levels() {
  std::vector<Level> all;
#if defined(TUTELAGE_X86)
  all.push_back({avx512_table(), cpu_has_avx512()});
  all.push_back({avx2_table(), cpu_has_avx2()});
#elif defined(TUTELAGE_NEON)
  all.push_back({neon_table(), true});
#endif
  all.push_back({scalar_table(), true});
  return all;
}

const KernelTable& active_table() {
  static const KernelTable* chosen = choose();
  return *chosen;
}

const KernelTable& find_table(const std::string& name) {
  if (name == float64_table()->name) return *float64_table();
  std::string known;
  for (const Level& level : levels()) {
    known += (known.empty() ? "" : ", ") + std::string(level.table->name);
    if (name != level.table->name) continue;
    if (!level.supported) throw ArgumentError("ISA level '" + name + "' cannot run on this CPU");
    return *level.table;
  }
  throw ArgumentError("unknown ISA level '" + name + "'; this build has " + known);
}

std::string self_check(const KernelTable& table) {
  if (&table == scalar_table()) return "";
  for (const Check& check : kChecks) {
    const Output mine = check.run(table), reference = check.run(*scalar_table());
    for (std::size_t i = 0; i < mine.size(); ++i)
      if (std::memcmp(mine[i].data(), reference[i].data(), mine[i].size() * sizeof(float)) != 0) return check.name;
  }
  return "";
}

}  // namespace tutelage
