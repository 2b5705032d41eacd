#include "engine/layout.h"

#include <utility>

namespace tutelage {
namespace {

using Init = Parameter::Init;

class Builder {
 public:
  explicit Builder(Layout& layout) : layout_(layout) {}

  std::int64_t add(std::string name, std::vector<std::int64_t> shape, Init init) {
    std::int64_t size = 1;
    for (std::int64_t extent : shape) size *= extent;
    const bool decay = shape.size() > 1;
    const std::int64_t offset = layout_.size;
    layout_.parameters.push_back({std::move(name), std::move(shape), offset, size, decay, init});
    layout_.size += size;
    return offset;
  }
  // A matrix from `in` to `out` features, in the layout's orientation.
  std::int64_t matrix(std::string name, std::int64_t out, std::int64_t in, Init init = Init::normal) {
    return layout_.transposed ? add(std::move(name), {in, out}, init) : add(std::move(name), {out, in}, init);
  }
  std::int64_t vector(std::string name, std::int64_t n, Init init) { return add(std::move(name), {n}, init); }
  // weight (and bias) of a norm
  void norm(const std::string& name, std::int64_t n, bool bias, std::int64_t* weight_at, std::int64_t* bias_at) {
    *weight_at = vector(name + ".weight", n, Init::ones);
    if (bias) *bias_at = vector(name + ".bias", n, Init::zeros);
  }

 private:
  Layout& layout_;
};

void gpt2_layer(Builder& b, const Config& c, const std::string& p, LayerOffsets& at) {
  const std::int64_t d = c.hidden_size;
  b.norm(p + "ln_1", d, true, &at.norm1, &at.norm1_bias);
  at.qkv = b.matrix(p + "attn.c_attn.weight", c.qkv_width(), d);
  at.qkv_bias = b.vector(p + "attn.c_attn.bias", c.qkv_width(), Init::zeros);
  at.out = b.matrix(p + "attn.c_proj.weight", d, c.query_width(), Init::residual);
  at.out_bias = b.vector(p + "attn.c_proj.bias", d, Init::zeros);
  b.norm(p + "ln_2", d, true, &at.norm2, &at.norm2_bias);
  at.up = b.matrix(p + "mlp.c_fc.weight", c.intermediate_size, d);
  at.up_bias = b.vector(p + "mlp.c_fc.bias", c.intermediate_size, Init::zeros);
  at.down = b.matrix(p + "mlp.c_proj.weight", d, c.intermediate_size, Init::residual);
  at.down_bias = b.vector(p + "mlp.c_proj.bias", d, Init::zeros);
}

void llama_layer(Builder& b, const Config& c, const std::string& p, LayerOffsets& at) {
  const std::int64_t d = c.hidden_size, q = c.query_width(), kv = c.key_width(), f = c.intermediate_size;
  const bool norm_bias = c.norm == Norm::layernorm;
  const std::string attention = p + "self_attn.", mlp = p + "mlp.";
  b.norm(p + "input_layernorm", d, norm_bias, &at.norm1, &at.norm1_bias);
  at.qkv = b.matrix(attention + "q_proj.weight", q, d);
  b.matrix(attention + "k_proj.weight", kv, d);
  b.matrix(attention + "v_proj.weight", kv, d);
  if (c.attention_bias) {
    at.qkv_bias = b.vector(attention + "q_proj.bias", q, Init::zeros);
    b.vector(attention + "k_proj.bias", kv, Init::zeros);
    b.vector(attention + "v_proj.bias", kv, Init::zeros);
  }
  if (c.qk_norm) {
    at.q_norm = b.vector(attention + "q_norm.weight", c.head_dim, Init::ones);
    at.k_norm = b.vector(attention + "k_norm.weight", c.head_dim, Init::ones);
  }
  at.out = b.matrix(attention + "o_proj.weight", d, q, Init::residual);
  if (c.attention_out_bias) at.out_bias = b.vector(attention + "o_proj.bias", d, Init::zeros);
  b.norm(p + "post_attention_layernorm", d, norm_bias, &at.norm2, &at.norm2_bias);
  if (c.mlp == Mlp::swiglu) {
    at.up = b.matrix(mlp + "gate_proj.weight", f, d);
    b.matrix(mlp + "up_proj.weight", f, d);
    if (c.mlp_bias) {
      at.up_bias = b.vector(mlp + "gate_proj.bias", f, Init::zeros);
      b.vector(mlp + "up_proj.bias", f, Init::zeros);
    }
  } else {
    at.up = b.matrix(mlp + "up_proj.weight", f, d);
    if (c.mlp_bias) at.up_bias = b.vector(mlp + "up_proj.bias", f, Init::zeros);
  }
  at.down = b.matrix(mlp + "down_proj.weight", d, f, Init::residual);
  if (c.mlp_bias) at.down_bias = b.vector(mlp + "down_proj.bias", d, Init::zeros);
}

}  // namespace

Layout::Layout(const Config& c) {
  Builder b(*this);
  const bool gpt2 = c.learned_positions;
  const std::string root = gpt2 ? "transformer." : "model.";
  embedding = b.add(root + (gpt2 ? "wte.weight" : "embed_tokens.weight"), {c.vocab_size, c.hidden_size}, Init::normal);
  if (gpt2) positions = b.add(root + "wpe.weight", {c.max_position_embeddings, c.hidden_size}, Init::normal);
  transposed = gpt2;
  layers.resize(static_cast<std::size_t>(c.num_hidden_layers));
  for (std::size_t i = 0; i < layers.size(); ++i) {
    if (gpt2)
      gpt2_layer(b, c, root + "h." + std::to_string(i) + ".", layers[i]);
    else
      llama_layer(b, c, root + "layers." + std::to_string(i) + ".", layers[i]);
  }
  b.norm(root + (gpt2 ? "ln_f" : "norm"), c.hidden_size, c.norm == Norm::layernorm, &norm, &norm_bias);
  if (c.head == Head::scalar) {
    head = b.add("score.weight", {1, c.hidden_size}, Init::scalar_head);
  } else if (c.tie_word_embeddings) {
    tied = true;
    head = embedding;
  } else {
    head = b.add("lm_head.weight", {c.vocab_size, c.hidden_size}, Init::normal);
  }
}

}  // namespace tutelage
