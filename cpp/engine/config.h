// What a model is: the options that cover Llama, Mistral, Qwen2, Qwen3, SmolLM, SmolLM3 and GPT-2.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace tutelage {

enum class Norm : std::uint8_t { rmsnorm, layernorm };
enum class Mlp : std::uint8_t { swiglu, gelu, gelu_erf };
enum class Head : std::uint8_t { lm, scalar };

// Rotary frequencies divided by `factor`: all of them (linear), or the long wavelengths only, blended in between (llama3,
// yarn). yarn also multiplies every cosine and sine: by attention_factor, or what follows from factor and the two mscales (0:
// not given).
struct RopeScaling {
  enum class Kind : std::uint8_t { none, linear, llama3, yarn } kind = Kind::none;
  double factor = 1, low_freq_factor = 1, high_freq_factor = 4;
  std::int64_t original_max_position_embeddings = 8192;
  double beta_fast = 32, beta_slow = 1, attention_factor = 0, mscale = 0, mscale_all_dim = 0;
  bool truncate = true;
};

struct Config {
  std::int64_t vocab_size = 0, hidden_size = 0, intermediate_size = 0, num_hidden_layers = 0, num_attention_heads = 0;
  std::int64_t num_key_value_heads = 0, head_dim = 0, max_position_embeddings = 0, sliding_window = 0;  // window 0: none
  bool tie_word_embeddings = false;
  Norm norm = Norm::rmsnorm;
  double norm_eps = 1e-5;
  bool learned_positions = false;  // GPT-2: its parameter names and [in, out] matrices too; else RoPE
  double rope_theta = 1e4;
  RopeScaling rope_scaling;
  Mlp mlp = Mlp::swiglu;
  bool attention_bias = false, attention_out_bias = false, mlp_bias = false, qk_norm = false;
  Head head = Head::lm;
  std::vector<bool> rope_layers, window_layers;  // by block: whether it has RoPE, the window; empty: as all have

  bool rotates(std::size_t block) const { return !learned_positions && (rope_layers.empty() || rope_layers[block]); }
  std::int64_t window(std::size_t block) const { return window_layers.empty() || window_layers[block] ? sliding_window : 0; }
  std::int64_t query_width() const { return num_attention_heads * head_dim; }
  std::int64_t key_width() const { return num_key_value_heads * head_dim; }
  std::int64_t qkv_width() const { return query_width() + 2 * key_width(); }
  std::int64_t pre_width() const { return mlp == Mlp::swiglu ? 2 * intermediate_size : intermediate_size; }
};

}  // namespace tutelage
