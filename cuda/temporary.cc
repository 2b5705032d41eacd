// TEMPORARY, on this branch only: plain loops behind the signatures of kernels that other branches bring.
#include <cmath>
#include <vector>

#include "cuda/backend.h"

namespace tutelage::device {
namespace {
using cuda::bf16;
using cuda::to_bf16;
using cuda::to_float;
using std::int64_t;
float at(const void* p, int64_t i, bool state) { return state ? static_cast<const float*>(p)[i] : to_float(static_cast<const bf16*>(p)[i]); }
void put(void* p, int64_t i, bool state, float x) {
  if (state) static_cast<float*>(p)[i] = x; else static_cast<bf16*>(p)[i] = to_bf16(x);
}
float silu(float g) { return g / (1 + std::exp(-g)); }
}  // namespace

void matmul(const Matmul& g, cudaStream_t stream) {
  const bool swiglu = g.activation == Activation::swiglu, back = g.activation >= Activation::gelu_backward;
  std::vector<float> row(static_cast<std::size_t>(g.n));
  for (int64_t i = 0; i < g.m; ++i) {
    for (int64_t j = 0; j < g.n; ++j) {
      float sum = g.accumulate ? at(g.c, i * g.c_row + j, g.c_state) : 0;
      for (int64_t p = 0; p < g.k; ++p) sum = std::fma(at(g.a, i * g.a_row + p * g.a_col, g.a_state), at(g.b, p * g.b_row + j * g.b_col, false), sum);
      if (g.scale != 1) sum *= static_cast<float>(g.scale);
      if (g.bias) sum += at(g.bias, j, false);
      if (g.residual) sum += at(g.residual, i * g.residual_row + j, false);
      row[static_cast<std::size_t>(j)] = sum;
      if (!back) put(g.c, i * g.c_row + j, g.c_state, sum);
      if (g.activation == Activation::gelu || g.activation == Activation::gelu_erf) put(g.activated, i * g.activated_row + j, false, sum);
    }
    if (g.activation == Activation::gelu || g.activation == Activation::gelu_erf) {
      bf16* y = static_cast<bf16*>(g.activated) + i * g.activated_row;
      gelu({g.n, y, y, g.activation == Activation::gelu_erf}, stream);
    }
    const int64_t f = g.n / 2;
    if (swiglu) for (int64_t j = 0; j < f; ++j) put(g.activated, i * g.activated_row + j, false, silu(row[static_cast<std::size_t>(j)]) * row[static_cast<std::size_t>(f + j)]);
    if (!back) continue;
    if (g.activation == Activation::swiglu_backward) {
      for (int64_t j = 0; j < g.n; ++j) {
        const float gate = at(g.pre, i * g.pre_row + j, false), up = at(g.pre, i * g.pre_row + g.n + j, false), d = row[static_cast<std::size_t>(j)];
        const float s = 1 / (1 + std::exp(-gate));
        put(g.c, i * g.c_row + j, false, d * up * s * (1 + gate * (1 - s)));
        put(g.c, i * g.c_row + g.n + j, false, d * gate * s);
        put(g.activated, i * g.activated_row + j, false, gate * s * up);
      }
    } else {
      const bool erf = g.activation == Activation::gelu_erf_backward;
      std::vector<bf16> d(static_cast<std::size_t>(g.n));
      for (int64_t j = 0; j < g.n; ++j) d[static_cast<std::size_t>(j)] = to_bf16(row[static_cast<std::size_t>(j)]);
      const bf16* pre = static_cast<const bf16*>(g.pre) + i * g.pre_row;
      gelu({g.n, pre, static_cast<bf16*>(g.activated) + i * g.activated_row, erf}, stream);
      gelu_backward({g.n, pre, d.data(), static_cast<bf16*>(g.c) + i * g.c_row, erf}, stream);
    }
  }
}

namespace {
void row_attention(int64_t n, int64_t first, int64_t d, float scale, const bf16* q, auto key, auto value, bf16* o, float* lse) {
  std::vector<float> s(static_cast<std::size_t>(n), 0.0f);
  float top = -INFINITY, sum = 0;
  for (int64_t j = first; j < n; ++j) {
    float x = 0;
    for (int64_t e = 0; e < d; ++e) x = std::fma(to_float(q[e]), to_float(key(j)[e]), x);
    s[static_cast<std::size_t>(j)] = x * scale;
    top = std::max(top, x * scale);
  }
  for (int64_t j = first; j < n; ++j) sum += (s[static_cast<std::size_t>(j)] = std::exp(s[static_cast<std::size_t>(j)] - top));
  for (int64_t e = 0; e < d; ++e) {
    float x = 0;
    for (int64_t j = first; j < n; ++j) x = std::fma(s[static_cast<std::size_t>(j)], to_float(value(j)[e]), x);
    o[e] = to_bf16(x / sum);
  }
  if (lse) *lse = top + std::log(sum);
}
}  // namespace

void flash_attention(const Attention& g, cudaStream_t) {
  const AttentionShape& c = g.shape;
  for (int64_t s = 0; s < c.sequences; ++s)
    for (int64_t i = c.cu_seqlens[s]; i < c.cu_seqlens[s + 1]; ++i)
      for (int64_t h = 0; h < c.heads; ++h) {
        const int64_t kv = h / (c.heads / c.kv_heads), first = c.cu_seqlens[s], n = i - first + 1;
        const auto* k = static_cast<const bf16*>(g.k) + first * g.k_row + kv * c.head_dim;
        const auto* v = static_cast<const bf16*>(g.v) + first * g.v_row + kv * c.head_dim;
        row_attention(n, c.window > 0 ? std::max<int64_t>(0, n - c.window) : 0, c.head_dim, static_cast<float>(c.scale), static_cast<const bf16*>(g.q) + i * g.q_row + h * c.head_dim,
                      [&](int64_t j) { return k + j * g.k_row; }, [&](int64_t j) { return v + j * g.v_row; }, static_cast<bf16*>(g.o) + i * g.o_row + h * c.head_dim, static_cast<float*>(g.lse) + i * c.heads + h);
      }
}

void flash_attention_backward(const AttentionBackward& g, cudaStream_t) {
  const AttentionShape& c = g.shape;
  const int64_t d = c.head_dim, total = c.cu_seqlens[c.sequences];
  std::vector<float> dk(static_cast<std::size_t>(total * c.kv_heads * d), 0.0f), dv(dk);
  for (int64_t s = 0; s < c.sequences; ++s)
    for (int64_t i = c.cu_seqlens[s]; i < c.cu_seqlens[s + 1]; ++i)
      for (int64_t h = 0; h < c.heads; ++h) {
        const int64_t kv = h / (c.heads / c.kv_heads), first = c.cu_seqlens[s];
        auto row = [&](const void* p, int64_t r, int64_t pitch, int64_t head) { return static_cast<const bf16*>(p) + r * pitch + head * d; };
        const bf16 *q = row(g.q, i, g.q_row, h), *o = row(g.o, i, g.o_row, h), *d_o = row(g.d_o, i, g.d_o_row, h);
        const float lse = static_cast<const float*>(g.lse)[i * c.heads + h], scale = static_cast<float>(c.scale);
        float delta = 0;
        for (int64_t e = 0; e < d; ++e) delta += to_float(o[e]) * to_float(d_o[e]);
        std::vector<float> dq(static_cast<std::size_t>(d), 0.0f);
        for (int64_t j = c.window > 0 ? std::max(first, i + 1 - c.window) : first; j <= i; ++j) {
          const bf16 *k = row(g.k, j, g.k_row, kv), *v = row(g.v, j, g.v_row, kv);
          float x = 0, dp = 0;
          for (int64_t e = 0; e < d; ++e) x += to_float(q[e]) * to_float(k[e]), dp += to_float(d_o[e]) * to_float(v[e]);
          const float p = std::exp(x * scale - lse), ds = p * (dp - delta) * scale;
          for (int64_t e = 0; e < d; ++e) {
            const auto at_kv = static_cast<std::size_t>((j * c.kv_heads + kv) * d + e);
            dq[static_cast<std::size_t>(e)] += ds * to_float(k[e]);
            dk[at_kv] += ds * to_float(q[e]);
            dv[at_kv] += p * to_float(d_o[e]);
          }
        }
        for (int64_t e = 0; e < d; ++e) (static_cast<bf16*>(g.dq) + i * g.dq_row + h * d)[e] = to_bf16(dq[static_cast<std::size_t>(e)]);
      }
  for (int64_t j = 0; j < total; ++j)
    for (int64_t e = 0; e < c.kv_heads * d; ++e) {
      (static_cast<bf16*>(g.dk) + j * g.dk_row)[e] = to_bf16(dk[static_cast<std::size_t>(j * c.kv_heads * d + e)]);
      (static_cast<bf16*>(g.dv) + j * g.dv_row)[e] = to_bf16(dv[static_cast<std::size_t>(j * c.kv_heads * d + e)]);
    }
}

void cached_attention(const CachedAttention& g, cudaStream_t) {
  const int64_t d = g.head_dim, width = kCacheBlock * d;
  for (int64_t s = 0; s < g.segments; ++s) {
    auto place = [&](int64_t p, int64_t kv) { return static_cast<bf16*>(g.blocks[s][p / kCacheBlock]) + g.offset + kv * 2 * width + p % kCacheBlock * d; };
    for (int64_t r = g.cu_rows[s]; r < g.cu_rows[s + 1]; ++r)
      for (int64_t kv = 0; kv < g.kv_heads; ++kv)
        for (int64_t e = 0; e < d; ++e) {
          bf16* to = place(g.first_position[s] + r - g.cu_rows[s], kv);
          to[e] = (static_cast<const bf16*>(g.k) + r * g.k_row + kv * d)[e], to[width + e] = (static_cast<const bf16*>(g.v) + r * g.v_row + kv * d)[e];
        }
    for (int64_t r = g.cu_rows[s]; r < g.cu_rows[s + 1]; ++r)
      for (int64_t h = 0; h < g.heads; ++h) {
        const int64_t n = g.first_position[s] + r - g.cu_rows[s] + 1, kv = h / (g.heads / g.kv_heads);
        row_attention(n, g.window > 0 ? std::max<int64_t>(0, n - g.window) : 0, d, static_cast<float>(g.scale), static_cast<const bf16*>(g.q) + r * g.q_row + h * d,
                      [&](int64_t j) { return place(j, kv); }, [&](int64_t j) { return place(j, kv) + width; }, static_cast<bf16*>(g.o) + r * g.o_row + h * d, nullptr);
      }
  }
}

namespace {
Matmul logits_of(int64_t rows, int64_t hidden, int64_t vocab, const void* x, const void* w, float* z) {
  Matmul m;
  m.m = rows, m.n = vocab, m.k = hidden, m.a = x, m.a_row = hidden, m.b = w, m.b_row = 1, m.b_col = hidden, m.c = z, m.c_row = vocab, m.c_state = true;
  return m;
}
}  // namespace

void linear_logprob(const LinearLogprob& g, cudaStream_t stream) {
  std::vector<float> own(static_cast<std::size_t>(g.rows * g.vocab));
  float* z = g.z ? static_cast<float*>(g.z) : own.data();
  matmul(logits_of(g.rows, g.hidden, g.vocab, g.x, g.weight, z), stream);
  const int64_t tiles = (g.vocab + 255) / 256;
  if (g.temperature != 1) for (int64_t i = 0; i < g.rows * g.vocab; ++i) z[i] *= static_cast<float>(1 / g.temperature);
  std::vector<cuda::TileStatistics> t(static_cast<std::size_t>(g.rows * tiles));
  tile_statistics(z, g.rows, g.vocab, t.data(), stream);
  // the same end as sample's: a draw from settings that change nothing gives merge_tiles' numbers
  for (int64_t r = 0; r < g.rows; ++r) {
    float lse_top = -INFINITY;
    for (int64_t i = 0; i < tiles; ++i) lse_top = std::max(lse_top, t[static_cast<std::size_t>(r * tiles + i)].top);
    std::vector<SampleSettings> settings(1);
    settings[0].temperature = 0;
    std::int32_t token;
    float lp, sp;
    cuda::Draw draw;
    draw.rows = 1, draw.vocab = g.vocab, draw.z = z + r * g.vocab, draw.statistics = t.data() + r * tiles, draw.settings = settings.data();
    draw.tokens = &token, draw.logprob = &lp, draw.support_logprob = &sp;
    sample(draw, stream);
    const float log_sum = -lp;
    double sum = 0, weighted = 0;
    for (int64_t j = 0; j < g.vocab; ++j) {
      const double x = z[r * g.vocab + j] - lse_top, e = std::exp(x);
      sum += e, weighted += e * x;
    }
    const int64_t out = g.index ? g.index[r] : r;
    static_cast<float*>(g.logprob)[out] = (z[r * g.vocab + g.targets[r]] - lse_top) - log_sum;
    static_cast<float*>(g.entropy)[out] = static_cast<float>(std::log(sum) - weighted / sum);
    static_cast<float*>(g.lse)[r] = lse_top + log_sum;
  }
}

void linear_logprob_backward(const LinearLogprobBackward& g, cudaStream_t stream) {
  std::vector<float> own(static_cast<std::size_t>(g.rows * g.vocab));
  float* z = g.z ? static_cast<float*>(g.z) : own.data();
  const float inverse = static_cast<float>(1 / g.temperature);
  if (!g.z) {
    matmul(logits_of(g.rows, g.hidden, g.vocab, g.x, g.weight, z), stream);
    if (g.temperature != 1) for (float& x : own) x *= inverse;
  }
  std::vector<bf16> dz(static_cast<std::size_t>(g.rows * g.vocab));
  for (int64_t r = 0; r < g.rows; ++r) {
    const int64_t in = g.index ? g.index[r] : r;
    const float lse = static_cast<const float*>(g.lse)[r], h = static_cast<const float*>(g.entropy)[in];
    const float dl = static_cast<const float*>(g.d_logprob)[in] * inverse, de = static_cast<const float*>(g.d_entropy)[in] * inverse;
    for (int64_t j = 0; j < g.vocab; ++j) {
      const float x = z[r * g.vocab + j] - lse;
      dz[static_cast<std::size_t>(r * g.vocab + j)] = to_bf16((j == g.targets[r] ? dl : 0) - std::exp(x) * std::fma(de, x + h, dl));
    }
  }
  Matmul dx;
  dx.m = g.rows, dx.n = g.hidden, dx.k = g.vocab, dx.a = dz.data(), dx.a_row = g.vocab, dx.b = g.weight, dx.b_row = g.hidden, dx.b_col = 1, dx.c = g.dx, dx.c_row = g.hidden;
  if (g.dx) matmul(dx, stream);
  Matmul dw;
  dw.m = g.vocab, dw.n = g.hidden, dw.k = g.rows, dw.a = dz.data(), dw.a_row = 1, dw.a_col = g.vocab, dw.b = g.x, dw.b_row = g.hidden, dw.b_col = 1, dw.c = g.dweight, dw.c_row = g.hidden, dw.c_state = true, dw.accumulate = g.accumulate;
  if (g.dweight) matmul(dw, stream);
}

}  // namespace tutelage::device
