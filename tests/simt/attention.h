// What the tests of attention share: a batch of sequences, its attention in double and as an eager bf16 computation has it.
#pragma once

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "device.h"
#include "kernels/cached_attention.h"
#include "kernels/flash_attention.h"

namespace test {

struct AttentionCase {
  std::vector<int32_t> lengths;
  int64_t heads, kv_heads, d, window = 0;
  bool causal = true;
  std::string name() const {
    std::string list;
    for (int32_t length : lengths) list += std::to_string(length) + ",";
    return text("lengths", list, "heads", heads, "/", kv_heads, "d", d, "window", window, causal ? "" : "not causal");
  }
  double scale() const { return 1 / std::sqrt(static_cast<double>(d)); }
  int64_t longest() const { return *std::max_element(lengths.begin(), lengths.end()); }
};

// q, k, v as the engine has them, side by side in one row; `salt` tells sequences apart that are to differ. T: bf16, or float
// with the same values.
template <class T>
struct AttentionOperands {
  std::vector<int32_t> offsets{0};
  Memory<int32_t> cu_seqlens;
  int64_t tokens, row, o_row;
  Memory<T> qkv, d_o;

  explicit AttentionOperands(const AttentionCase& c, const std::vector<std::uint64_t>& salts = {}) {
    for (int32_t length : c.lengths) offsets.push_back(offsets.back() + length);
    cu_seqlens = copy_of(offsets);
    tokens = offsets.back(), row = (c.heads + 2 * c.kv_heads) * c.d, o_row = c.heads * c.d;
    qkv = Memory<T>(tokens * row), d_o = Memory<T>(tokens * o_row);
    for (std::size_t s = 0; s < c.lengths.size(); ++s) {
      const std::uint64_t salt = salts.empty() ? s : salts[s];
      // queries large enough that weights are far from uniform
      for (int64_t i = 0; i < c.lengths[s] * row; ++i)
        qkv[offsets[s] * row + i] = number((i % row < c.heads * c.d ? 4 : 1) * uniform(100 + salt, i));
      for (int64_t i = 0; i < c.lengths[s] * o_row; ++i) d_o[offsets[s] * o_row + i] = number(uniform(200 + salt, i));
    }
  }
  static T number(double v) {
    const bf16 b = to_bf16(static_cast<float>(v));
    if constexpr (sizeof(T) == 2)
      return b;
    else
      return to_float(b);
  }
  const T* q() const { return qkv.data(); }
  const T* k(const AttentionCase& c) const { return qkv.data() + c.heads * c.d; }
  const T* v(const AttentionCase& c) const { return qkv.data() + (c.heads + c.kv_heads) * c.d; }
  tutelage::AttentionShape shape(const AttentionCase& c) const {
    return {static_cast<int64_t>(c.lengths.size()),
            cu_seqlens.data(),
            c.heads,
            c.kv_heads,
            c.d,
            c.causal,
            c.window,
            c.scale(),
            tokens,
            c.longest()};
  }
};

struct AttentionResult {
  std::vector<double> o, lse, dqkv;  // [tokens, heads * d], [tokens, heads], [tokens, (heads + 2 kv_heads) * d]
};

// The formula in double; with `eager`, what torch makes of it in bf16: products sum exactly, and every tensor that one
// operation hands to the next (scores, probabilities, results, in the backward their gradients) is rounded.
inline AttentionResult attention_formula(const AttentionCase& c, const AttentionOperands<float>& x, bool eager) {
  auto r = [&](double v) { return eager ? value(Rounded(v)) : v; };
  AttentionResult out;
  out.o.assign(static_cast<std::size_t>(x.tokens * x.o_row), 0);
  out.lse.assign(static_cast<std::size_t>(x.tokens * c.heads), 0);
  out.dqkv.assign(static_cast<std::size_t>(x.tokens * x.row), 0);
  const int64_t d = c.d, group = c.heads / c.kv_heads;
  for (std::size_t s = 0; s < c.lengths.size(); ++s)
    for (int64_t head = 0; head < c.heads; ++head) {
      const int64_t length = c.lengths[s], first = x.offsets[s], kv = head / group;
      const float *q = x.q() + first * x.row + head * d, *k = x.k(c) + first * x.row + kv * d,
                  *v = x.v(c) + first * x.row + kv * d, *d_o = x.d_o.data() + first * x.o_row + head * d;
      double *o = out.o.data() + first * x.o_row + head * d, *dq = out.dqkv.data() + first * x.row + head * d,
             *dk = out.dqkv.data() + first * x.row + (c.heads + kv) * d,
             *dv = out.dqkv.data() + first * x.row + (c.heads + c.kv_heads + kv) * d;
      for (int64_t i = 0; i < length; ++i) {
        const int64_t begin = c.window > 0 ? std::max<int64_t>(0, i + 1 - c.window) : 0, end = c.causal ? i + 1 : length;
        std::vector<double> p(static_cast<std::size_t>(end - begin)), dp(p.size());
        double top = -std::numeric_limits<double>::infinity(), sum = 0, weighted = 0;
        for (int64_t j = begin; j < end; ++j) {
          double dot = 0;
          for (int64_t f = 0; f < d; ++f) dot += double(q[i * x.row + f]) * k[j * x.row + f];
          double& z = p[static_cast<std::size_t>(j - begin)];
          z = r(r(dot) * r(c.scale()));
          top = std::max(top, z);
        }
        for (double z : p) sum += std::exp(z - top);
        out.lse[static_cast<std::size_t>((first + i) * c.heads + head)] = r(top + std::log(sum));
        for (double& z : p) z = r(std::exp(z - top) / sum);
        for (int64_t f = 0; f < d; ++f) {
          double dot = 0;
          for (int64_t j = begin; j < end; ++j) dot += p[static_cast<std::size_t>(j - begin)] * v[j * x.row + f];
          o[i * x.o_row + f] = r(dot);
        }
        for (int64_t j = begin; j < end; ++j) {
          double dot = 0;
          for (int64_t f = 0; f < d; ++f) dot += double(d_o[i * x.o_row + f]) * v[j * x.row + f];
          const std::size_t at = static_cast<std::size_t>(j - begin);
          dp[at] = r(dot);
          weighted += p[at] * dp[at];
        }
        for (int64_t j = begin; j < end; ++j) {
          const std::size_t at = static_cast<std::size_t>(j - begin);
          const double ds = r(r(p[at] * (dp[at] - weighted)) * r(c.scale()));
          for (int64_t f = 0; f < d; ++f) {
            dq[i * x.row + f] += ds * k[j * x.row + f];
            dk[j * x.row + f] += ds * q[i * x.row + f];
            dv[j * x.row + f] += p[at] * d_o[i * x.o_row + f];
          }
        }
      }
    }
  for (double& e : out.dqkv) e = r(e);
  return out;
}

}  // namespace test
