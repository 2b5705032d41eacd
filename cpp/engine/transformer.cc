#include "engine/transformer.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "core/error.h"
#include "core/parallel.h"
#include "core/tensor.h"

namespace tutelage {

// The gradients that flow down while a backward runs.
struct Transformer::Stack {
  void *dx, *d_norm, *normed, *d_pre, *activated, *d_o, *d_qkv, *d_qk;
};

namespace {
Config with_head(Config config, Head head) {
  config.head = head;
  return config;
}
}  // namespace

Transformer::Transformer(const Config& config, const KernelTable& table)
    : config_(config), layout_(config), table_(table), owed_zero_(trainable().size(), false) {
  if (layout_.tied) slot_of_.assign(static_cast<std::size_t>(config.vocab_size), -1);
}

Transformer::Transformer(const Config& config, const KernelTable& table, Head base_head, const AdapterOptions& adapters)
    : config_(config),
      layout_(with_head(config, base_head)),
      table_(table),
      adapters_(std::in_place, config, layout_, adapters),
      owed_zero_(trainable().size(), false) {}

// ---- forward

void Transformer::check(const Batch& batch) const {
  require_cu_seqlens(batch.cu_seqlens, batch.sequences, batch.tokens);
  for (std::int64_t s = 0; s < batch.sequences; ++s) {
    const std::int64_t length = batch.cu_seqlens[s + 1] - batch.cu_seqlens[s];
    if (length == 0) throw ArgumentError("sequence " + std::to_string(s) + " is empty; drop it before packing");
    if (length > config_.max_position_embeddings)
      throw ArgumentError("sequence " + std::to_string(s) + " has " + std::to_string(length) +
                          " tokens, more than max_position_embeddings = " + std::to_string(config_.max_position_embeddings) +
                          "; truncate or drop it");
  }
  require_token_ids("tokens", batch.ids, batch.tokens, config_.vocab_size, batch.cu_seqlens, batch.sequences);
}

AttentionShape Transformer::attention_shape(const Graph& g, std::size_t index) const {
  return {g.sequences_,
          g.cu_seqlens_.data(),
          config_.num_attention_heads,
          config_.num_key_value_heads,
          config_.head_dim,
          true,
          config_.window(index),
          1 / std::sqrt(static_cast<double>(config_.head_dim)),
          g.tokens_,
          g.longest_};
}

// Every array of a graph, in the order of use. With a plan that has no memory: how many bytes that is.
void Transformer::lay_out(Graph& g, Plan& plan) const {
  const std::int64_t n = g.tokens_, d = config_.hidden_size;
  const bool layernorm = config_.norm == Norm::layernorm, keep = g.options_.keep;
  const std::size_t blocks = static_cast<std::size_t>(config_.num_hidden_layers);
  g.blocks_.assign(blocks, {});
  BlockActivations shared;
  for (std::size_t i = 0; i < blocks; ++i) {
    BlockActivations& a = g.blocks_[i];
    const bool first = i == 0;
    // Nothing kept: two residual streams, taken in turn. Recompute: every block's input, the rest shared.
    a.x = keep || i < 2 ? plan.take(n * d) : g.blocks_[i - 2].x;
    if (first || (keep && !g.options_.recompute)) {
      shared.mean1 = layernorm ? plan.take_state(n) : nullptr;
      shared.rstd1 = plan.take_state(n);
      shared.qkv = plan.take(n * config_.qkv_width());
      shared.qk = config_.qk_norm ? plan.take(n * (config_.query_width() + config_.key_width())) : nullptr;
      shared.qk_rstd =
          config_.qk_norm ? plan.take_state(n * (config_.num_attention_heads + config_.num_key_value_heads)) : nullptr;
      shared.o = plan.take(n * config_.query_width());
      shared.lse = plan.take_state(n * config_.num_attention_heads);
      shared.x1 = plan.take(n * d);
      shared.mean2 = layernorm ? plan.take_state(n) : nullptr;
      shared.rstd2 = plan.take_state(n);
      shared.pre = plan.take(n * config_.pre_width());
    }
    void* x = a.x;
    a = shared;
    a.x = x;
  }
  g.x_out_ = keep || blocks == 1 ? plan.take(n * d) : g.blocks_[blocks - 2].x;
  const std::int64_t rows = config_.head == Head::lm ? g.rows_ : n;
  g.mean_ = layernorm ? plan.take_state(rows) : nullptr;
  g.rstd_ = plan.take_state(rows);
  g.hidden_ = plan.take(rows * d);
  if (config_.head == Head::lm) {
    g.lse_ = plan.take_state(rows);
    g.entropy_ = plan.take_state(n);
    const bool fits = rows <= g.options_.logits_budget / plan.state_element / config_.vocab_size;
    g.z_ = keep && fits ? plan.take_state(rows * config_.vocab_size) : nullptr;
  }
  g.scratch_norm_ = plan.take(n * wide(d));
  g.scratch_mlp_ = plan.take(n * wide(config_.intermediate_size));
}

std::int64_t Transformer::activation_bytes(std::int64_t tokens, std::int64_t sequences, const Options& options) const {
  Graph g;
  g.tokens_ = tokens, g.sequences_ = sequences, g.rows_ = tokens - sequences;
  g.options_ = options;
  Plan plan(table_);
  lay_out(g, plan);
  return static_cast<std::int64_t>(plan.used);
}

namespace {
template <class T>
auto* at(T* base, std::int64_t index, std::int64_t element) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return static_cast<T*>(static_cast<Byte*>(base) + index * element);
}
}  // namespace

void Transformer::norm(const void* params, std::int64_t weight, std::int64_t bias, const void* x, const std::int32_t* gather,
                       std::int64_t rows, void* y, void* mean, void* rstd, int threads) const {
  const std::int64_t d = config_.hidden_size, e = table_.activation_size;
  if (config_.norm == Norm::rmsnorm) {
    RmsNorm n;
    n.tokens = rows, n.d = d, n.x = x, n.x_row = d, n.gather = gather, n.weight = at(params, weight, e);
    n.eps = config_.norm_eps, n.y = y, n.y_row = d, n.rstd = rstd;
    table_.rms_norm(n, threads);
  } else {
    LayerNorm n;
    n.tokens = rows, n.d = d, n.x = x, n.x_row = d, n.gather = gather, n.weight = at(params, weight, e);
    n.bias = at(params, bias, e), n.eps = config_.norm_eps, n.y = y, n.y_row = d, n.mean = mean, n.rstd = rstd;
    table_.layer_norm(n, threads);
  }
}

// Where an adapter's t lies: in the scratch that does not hold x. (The MLP's may be written by the product that follows.)
void* Transformer::t_beside(const Graph& g, const void* x) { return x == g.scratch_mlp_ ? g.scratch_norm_ : g.scratch_mlp_; }

// y = x W^T + bias, with whatever else `fused` asks for (c, residual, activation ...); c has no gaps between its rows. An
// adapter writes its share first, and the product goes on from there.
void Transformer::linear(const Graph& g, const void* params, std::int64_t weight, std::int64_t bias, std::int64_t in,
                         std::int64_t out, const void* x, std::int64_t x_row, Matmul fused, int threads) const {
  const std::int64_t e = table_.activation_size;
  fused.m = g.tokens_, fused.n = out, fused.k = in;
  fused.a = x, fused.a_row = x_row, fused.a_col = 1;
  fused.b = at(params, weight, e);
  fused.b_row = layout_.transposed ? out : 1, fused.b_col = layout_.transposed ? 1 : in;
  if (g.packed_ != nullptr) fused.packed = g.packed_->at(weight), fused.packed_half = g.packed_->half();
  fused.bias = bias == kAbsent ? nullptr : at(params, bias, e);
  if (const Adapters::Group* adapter = group(weight)) {
    void* t = t_beside(g, x);
    adapters_->project(table_, *adapter, g.adapter_, g.packed_adapter_, g.tokens_, x, t, threads);
    adapters_->begin_output(table_, *adapter, g.adapter_, g.packed_adapter_, g.tokens_, t, fused.c, threads);
    fused.accumulate = true;
  }
  table_.matmul(fused, threads);
}

namespace {
Activation forward_activation(Mlp mlp) {
  return mlp == Mlp::swiglu ? Activation::swiglu : mlp == Mlp::gelu ? Activation::gelu : Activation::gelu_erf;
}
Activation backward_activation(Mlp mlp) {
  return mlp == Mlp::swiglu ? Activation::swiglu_backward
         : mlp == Mlp::gelu ? Activation::gelu_backward
                            : Activation::gelu_erf_backward;
}
}  // namespace

void Transformer::forward_block(const Graph& g, std::size_t index, const void* params, const BlockActivations& a, void* x_next,
                                int threads) const {
  const Config& c = config_;
  const LayerOffsets& w = layout_.layers[index];
  const std::int64_t e = table_.activation_size, d = c.hidden_size, qkv = c.qkv_width(), q = c.query_width(),
                     kv = c.key_width();
  const std::int64_t qk_heads = c.num_attention_heads + c.num_key_value_heads;

  norm(params, w.norm1, w.norm1_bias, a.x, nullptr, g.tokens_, g.scratch_norm_, a.mean1, a.rstd1, threads);
  Matmul into_qkv;
  into_qkv.c = a.qkv, into_qkv.c_row = qkv;
  linear(g, params, w.qkv, w.qkv_bias, d, qkv, g.scratch_norm_, d, into_qkv, threads);

  void* queries = a.qkv;
  std::int64_t qk_row = qkv;
  if (c.qk_norm) {  // the raw projections stay for the backward; normed and rotated copies beside them
    queries = a.qk, qk_row = q + kv;
    RmsNorm n;
    n.tokens = g.tokens_, n.d = c.head_dim, n.x_row = qkv, n.y_row = qk_row, n.eps = c.norm_eps;
    n.groups = c.num_attention_heads, n.x = a.qkv, n.weight = at(params, w.q_norm, e), n.y = a.qk, n.rstd = a.qk_rstd;
    table_.rms_norm(n, threads);
    n.groups = c.num_key_value_heads, n.x = at(a.qkv, q, e), n.weight = at(params, w.k_norm, e), n.y = at(a.qk, q, e);
    n.rstd = at(a.qk_rstd, g.tokens_ * c.num_attention_heads, table_.state_size);
    table_.rms_norm(n, threads);
  }
  if (c.rotates(index))
    table_.rope({g.tokens_, qk_heads, c.head_dim, queries, qk_row, queries, qk_row, g.positions_.data(), g.rotary_->cos.data(),
                 g.rotary_->sin.data(), false},
                threads);

  attend(g, index, queries, qk_row, a, threads);

  Matmul into_x1;
  into_x1.c = a.x1, into_x1.c_row = d, into_x1.residual = a.x, into_x1.residual_row = d;
  linear(g, params, w.out, w.out_bias, q, d, a.o, q, into_x1, threads);

  norm(params, w.norm2, w.norm2_bias, a.x1, nullptr, g.tokens_, g.scratch_norm_, a.mean2, a.rstd2, threads);
  Matmul into_pre;
  into_pre.c = a.pre, into_pre.c_row = c.pre_width(), into_pre.activation = forward_activation(c.mlp);
  into_pre.activated = g.scratch_mlp_, into_pre.activated_row = c.intermediate_size;
  linear(g, params, w.up, w.up_bias, d, c.pre_width(), g.scratch_norm_, d, into_pre, threads);
  if (x_next == nullptr) return;  // a recomputed block: its output is known
  Matmul into_next;
  into_next.c = x_next, into_next.c_row = d, into_next.residual = a.x1, into_next.residual_row = d;
  linear(g, params, w.down, w.down_bias, c.intermediate_size, d, g.scratch_mlp_, c.intermediate_size, into_next, threads);
}

// The lists that the cache's attention reads, where kernels find them.
void Transformer::place_cache_rows(Graph& g) const {
  const GenerationRows& rows = *g.rows_due_;
  g.sources_.host = rows.sources, g.cache_cu_rows_.host = rows.cu_rows, g.cache_first_.host = rows.first_position;
  for (Placed<std::int32_t>* indices : {&g.sources_, &g.cache_cu_rows_, &g.cache_first_}) indices->place(table_);
  g.cache_lists_.host = rows.blocks;
  for (std::size_t i = 0; i < rows.blocks.size(); ++i) {
    const std::int64_t due = rows.cu_rows[i + 1] - rows.cu_rows[i];
    g.most_cache_rows_ = std::max(g.most_cache_rows_, due);
    g.most_cache_positions_ = std::max(g.most_cache_positions_, rows.first_position[i] + due);
  }
  if (table_.upload == nullptr) return;
  std::vector<std::size_t> begins;
  for (std::size_t i = 0; i < rows.blocks.size(); ++i) {
    const std::int64_t positions = rows.first_position[i] + rows.cu_rows[i + 1] - rows.cu_rows[i];
    begins.push_back(g.cache_blocks_.host.size());
    g.cache_blocks_.host.insert(g.cache_blocks_.host.end(), rows.blocks[i], rows.blocks[i] + KvCache::blocks_for(positions));
  }
  g.cache_blocks_.place(table_);
  for (std::size_t i = 0; i < begins.size(); ++i) g.cache_lists_.host[i] = g.cache_blocks_.data() + begins[i];
  g.cache_lists_.place(table_);
}

// Over the batch itself, or over the cache.
void Transformer::attend(const Graph& g, std::size_t index, const void* queries, std::int64_t qk_row, const BlockActivations& a,
                         int threads) const {
  const std::int64_t e = table_.activation_size, q = config_.query_width(), kv = config_.key_width();
  const void *keys = at(queries, q, e), *values = at(static_cast<const void*>(a.qkv), q + kv, e);
  const AttentionShape shape = attention_shape(g, index);
  if (g.rows_due_ == nullptr) {
    table_.flash_attention({shape, queries, keys, values, qk_row, qk_row, config_.qkv_width(), a.o, q, a.lse}, threads);
    return;
  }
  CachedAttention c;
  c.heads = shape.heads, c.kv_heads = shape.kv_heads, c.head_dim = shape.head_dim, c.window = shape.window;
  c.scale = shape.scale, c.segments = g.sequences_;
  c.cu_rows = g.cache_cu_rows_.data(), c.first_position = g.cache_first_.data(), c.blocks = g.cache_lists_.data();
  c.offset = static_cast<std::int64_t>(index) * cached_attention_elements(c.kv_heads, c.head_dim);
  c.q = queries, c.k = keys, c.v = values, c.q_row = c.k_row = qk_row, c.v_row = config_.qkv_width();
  c.o = a.o, c.o_row = q;
  c.most_rows = g.most_cache_rows_, c.most_positions = g.most_cache_positions_;
  table_.cached_attention(c, threads);
}

std::shared_ptr<const RotaryCache> Transformer::rotary(std::int64_t longest, int threads) {
  std::lock_guard lock(rotary_mutex_);
  if (rotary_ == nullptr || rotary_->positions < longest) {
    const std::int64_t half = config_.head_dim / 2, positions = std::min(2 * longest, config_.max_position_embeddings);
    const std::size_t bytes = static_cast<std::size_t>(positions * half * table_.state_size);
    const RopeTables tables = rope_tables(config_, positions, threads);
    auto grown = std::make_shared<RotaryCache>();
    grown->positions = positions, grown->cos = Buffer(table_, bytes), grown->sin = Buffer(table_, bytes);
    table_.from_float(grown->cos.data(), tables.cos.data(), positions * half);
    table_.from_float(grown->sin.data(), tables.sin.data(), positions * half);
    rotary_ = std::move(grown);
  }
  return rotary_;
}

namespace {
// matmul.h's k_steps of the tokens [first, last) of a sequence.
void cut_into_steps(std::int32_t first, std::int32_t last, std::vector<std::int32_t>& steps) {
  constexpr std::int32_t kStep = 16;
  for (; first < last; first += kStep) {
    steps.push_back(first);
    steps.push_back(std::min(kStep, last - first));
  }
}
std::int64_t step_count(const Placed<std::int32_t>& steps) { return static_cast<std::int64_t>(steps.host.size()) / 2; }
const std::int32_t* steps_of(const Placed<std::int32_t>& steps) { return steps.host.empty() ? nullptr : steps.data(); }
}  // namespace

std::unique_ptr<Graph> Transformer::forward(const Batch& batch, const Weights& weights, const Options& options) {
  check(batch);
  auto graph = std::make_unique<Graph>();
  Graph& g = *graph;
  g.tokens_ = batch.tokens, g.sequences_ = batch.sequences, g.options_ = options;
  g.adapter_ = weights.adapter;
  g.ids_.host.assign(batch.ids, batch.ids + batch.tokens);
  g.cu_seqlens_.host.assign(batch.cu_seqlens, batch.cu_seqlens + batch.sequences + 1);
  g.positions_.host.reserve(g.ids_.host.size());
  std::int64_t longest = 0;
  for (std::int64_t s = 0; s < batch.sequences; ++s) {
    const std::int32_t first = batch.cu_seqlens[s], last = batch.cu_seqlens[s + 1];
    longest = std::max<std::int64_t>(longest, last - first);
    const std::size_t rows_before = g.sources_.host.size();
    for (std::int32_t i = first; i < last; ++i) {
      g.positions_.host.push_back(i - first);
      if (i == first || (batch.mask != nullptr && !batch.mask[i])) continue;  // nothing before it predicts it, or not wanted
      g.sources_.host.push_back(i - 1);
      g.outputs_.host.push_back(i);
      g.targets_.host.push_back(batch.ids[i]);
    }
    if (table_.upload == nullptr) continue;
    cut_into_steps(first, last, g.steps_.host);
    cut_into_steps(static_cast<std::int32_t>(rows_before), static_cast<std::int32_t>(g.sources_.host.size()),
                   g.row_steps_.host);
  }
  g.longest_ = longest, g.rows_ = static_cast<std::int64_t>(g.sources_.host.size());
  for (Placed<std::int32_t>* indices : {&g.cu_seqlens_, &g.sources_, &g.outputs_, &g.targets_, &g.steps_, &g.row_steps_})
    indices->place(table_);
  if (!config_.learned_positions) g.rotary_ = rotary(longest, options.threads);
  run_blocks(g, weights.params, options);
  return graph;
}

// Memory for the graph, the look-up and every block.
void Transformer::run_blocks(Graph& g, const void* params, const Options& options) {
  g.ids_.place(table_);
  g.positions_.place(table_);
  Plan counting(table_);
  lay_out(g, counting);
  g.memory_ = Buffer(table_, counting.used);
  Plan plan(table_, g.memory_.data());
  lay_out(g, plan);

  Embedding look_up;
  look_up.tokens = g.tokens_, look_up.d = config_.hidden_size, look_up.ids = g.ids_.data();
  look_up.table = at(params, layout_.embedding, table_.activation_size), look_up.y = g.blocks_[0].x;
  if (config_.learned_positions) {
    look_up.positions = g.positions_.data();
    look_up.position_table = at(params, layout_.positions, table_.activation_size);
  }
  table_.embedding(look_up, options.threads);
  for (std::size_t i = 0; i < g.blocks_.size(); ++i) {
    if (options.poll != nullptr) options.poll();
    forward_block(g, i, params, g.blocks_[i], i + 1 < g.blocks_.size() ? g.blocks_[i + 1].x : g.x_out_, options.threads);
  }
  if (options.poll != nullptr) options.poll();
}

std::unique_ptr<Graph> Transformer::score(const Batch& batch, const Weights& weights, const Options& options, void* logprobs,
                                          void* entropy) {
  std::unique_ptr<Graph> graph = forward(batch, weights, options);
  const void* params = weights.params;
  Graph& g = *graph;
  const std::size_t bytes = static_cast<std::size_t>(g.tokens_ * table_.state_size);
  table_.zero(logprobs, bytes);
  table_.zero(entropy, bytes);
  if (g.rows_ > 0) {
    norm(params, layout_.norm, layout_.norm_bias, g.x_out_, g.sources_.data(), g.rows_, g.hidden_, g.mean_, g.rstd_,
         options.threads);
    LinearLogprob head;
    head.rows = g.rows_, head.hidden = config_.hidden_size, head.vocab = config_.vocab_size;
    head.x = g.hidden_, head.weight = at(params, layout_.head, table_.activation_size);
    head.targets = g.targets_.data(), head.index = g.outputs_.data(), head.temperature = options.temperature;
    head.z = g.z_, head.logprob = logprobs, head.entropy = entropy, head.lse = g.lse_;
    table_.linear_logprob(head, options.threads);
  }
  if (!options.keep) return nullptr;
  table_.copy(g.entropy_, entropy, bytes);
  return graph;
}

std::unique_ptr<Graph> Transformer::values(const Batch& batch, const Weights& weights, const Options& options, void* values) {
  std::unique_ptr<Graph> graph = forward(batch, weights, options);
  const void* params = weights.params;
  Graph& g = *graph;
  norm(params, layout_.norm, layout_.norm_bias, g.x_out_, nullptr, g.tokens_, g.hidden_, g.mean_, g.rstd_, options.threads);
  Matmul product;
  product.m = g.tokens_, product.n = 1, product.k = config_.hidden_size;
  product.a = g.hidden_, product.a_row = config_.hidden_size;
  product.b = head(g, params), product.b_row = 1, product.b_col = config_.hidden_size;
  product.c = values, product.c_row = 1, product.c_state = true;
  table_.matmul(product, options.threads);
  return options.keep ? std::move(graph) : nullptr;
}

// The scalar head of a model with adapters is beside them.
const void* Transformer::head(const Graph& g, const void* params) const {
  const bool own = adapters_ && adapters_->head() != kAbsent;
  return own ? at(g.adapter_, adapters_->head(), table_.activation_size) : at(params, layout_.head, table_.activation_size);
}

// ---- generation

std::shared_ptr<const PackedWeights> Transformer::pack(const void* params, bool half, int threads, void (*poll)()) const {
  const Config& c = config_;
  const std::int64_t d = c.hidden_size;
  if (adapters_) return std::make_shared<const PackedWeights>(table_, adapters_->matrices(), params, half, threads, poll);
  std::vector<PackedWeights::Matrix> matrices;
  for (const LayerOffsets& w : layout_.layers) {
    matrices.push_back({w.qkv, c.qkv_width(), d, layout_.transposed, false});
    matrices.push_back({w.out, d, c.query_width(), layout_.transposed, false});
    matrices.push_back({w.up, c.pre_width(), d, layout_.transposed, c.mlp == Mlp::swiglu});
    matrices.push_back({w.down, d, c.intermediate_size, layout_.transposed, false});
  }
  matrices.push_back({layout_.head, c.vocab_size, d, false, false});
  return std::make_shared<const PackedWeights>(table_, matrices, params, half, threads, poll);
}

void Transformer::generate_step(const GenerationRows& rows, const Weights& weights, const Packed& packed, int threads,
                                void (*poll)(), Draws& draws) {
  const void* params = weights.params;
  Graph g;
  g.adapter_ = weights.adapter;
  g.tokens_ = static_cast<std::int64_t>(rows.ids.size());
  g.sequences_ = static_cast<std::int64_t>(rows.blocks.size());
  g.rows_ = static_cast<std::int64_t>(rows.sources.size());
  g.ids_.host = rows.ids, g.positions_.host = rows.positions, g.rows_due_ = &rows;
  place_cache_rows(g);
  g.packed_ = packed.params.get(), g.packed_adapter_ = packed.adapter.get();
  Options options;
  options.threads = threads, options.keep = false, options.poll = poll;
  g.options_ = options;
  if (!config_.learned_positions)
    g.rotary_ = rotary(*std::max_element(rows.positions.begin(), rows.positions.end()) + 1, threads);
  run_blocks(g, params, options);
  draws.tokens.assign(rows.sources.size(), -1);
  draws.logprobs.assign(rows.sources.size(), 0.0);
  draws.support_logprobs.assign(rows.sources.size(), 0.0);
  if (g.rows_ == 0) return;
  norm(params, layout_.norm, layout_.norm_bias, g.x_out_, g.sources_.data(), g.rows_, g.hidden_, g.mean_, g.rstd_, threads);
  Plan counting(table_);
  auto lay_out_draws = [&](Plan& plan) {
    Sample s;
    s.z = plan.take_state(g.rows_ * config_.vocab_size);
    s.logprob = plan.take_state(g.rows_), s.support_logprob = plan.take_state(g.rows_);
    s.tokens = static_cast<std::int32_t*>(plan.take_bytes(static_cast<std::size_t>(g.rows_) * sizeof(std::int32_t)));
    return s;
  };
  lay_out_draws(counting);
  Buffer memory(table_, counting.used);
  Plan plan(table_, memory.data());
  Sample s = lay_out_draws(plan);
  s.rows = g.rows_, s.hidden = config_.hidden_size, s.vocab = config_.vocab_size, s.x = g.hidden_;
  s.weight = at(params, layout_.head, table_.activation_size);
  s.packed = packed.params->at(layout_.head), s.packed_half = packed.params->half();
  Placed<SampleSettings> settings;
  settings.host = rows.settings;
  settings.place(table_);
  s.settings = settings.data();
  if (table_.download == nullptr) s.tokens = draws.tokens.data();
  table_.sample(s, threads);
  if (table_.download != nullptr) table_.download(draws.tokens.data(), s.tokens, draws.tokens.size() * sizeof(std::int32_t));
  table_.to_double(draws.logprobs.data(), s.logprob, g.rows_);
  table_.to_double(draws.support_logprobs.data(), s.support_logprob, g.rows_);
}

// ---- gradients that are owed

void Transformer::forget_gradients() {
  owed_zero_.assign(owed_zero_.size(), true);
  for (std::int32_t id : slot_ids_) slot_of_[static_cast<std::size_t>(id)] = -1;
  slot_ids_.clear();
  partial_ = false;
}

void Transformer::require_whole_gradients() const {
  if (partial_)
    throw std::runtime_error("a backward ended in the middle, so the gradients hold only part of it; call zero_grad() first");
}

// Before the parameters at `offset` (several named ones, where the engine sees one matrix) receive a gradient: true when their
// stretch still counts as zero and the kernel overwrites it; else the zeros are written here.
bool Transformer::settle(void* grads, std::int64_t offset, bool overwritten) {
  const auto& parameters = trainable();
  const auto found = std::lower_bound(parameters.begin(), parameters.end(), offset,
                                      [](const Parameter& p, std::int64_t o) { return p.offset < o; });
  const auto index = static_cast<std::size_t>(found - parameters.begin());
  if (!owed_zero_[index]) return false;
  owed_zero_[index] = false;
  if (!overwritten)
    table_.zero(at(grads, found->offset, table_.state_size), static_cast<std::size_t>(found->size * table_.state_size));
  return true;
}

// The gradient of a norm, for a kernel that adds to it; null beside adapters, where it does not learn.
void* Transformer::own_gradient(void* grads, std::int64_t offset) {
  if (adapters_) return nullptr;
  settle(grads, offset, false);
  return at(grads, offset, table_.state_size);
}

void Transformer::finish_gradients(void* grads, int threads) {
  require_whole_gradients();
  for (const Parameter& parameter : trainable()) settle(grads, parameter.offset, false);
  if (slot_ids_.empty()) return;
  Placed<std::int32_t> ids;
  ids.host = slot_ids_;
  ids.place(table_);
  table_.embedding_backward({static_cast<std::int64_t>(slot_ids_.size()), config_.hidden_size, ids.data(), lookup_.data(),
                             at(grads, layout_.head, table_.state_size), true},
                            threads);
  for (std::int32_t id : slot_ids_) slot_of_[static_cast<std::size_t>(id)] = -1;
  slot_ids_.clear();
}

// ---- backward

Transformer::Stack Transformer::lay_out_stack(const Graph& g, Plan& plan) const {
  const Config& c = config_;
  const std::int64_t n = g.tokens_;
  Stack s;
  s.dx = plan.take(n * c.hidden_size), s.d_norm = plan.take(n * wide(c.hidden_size));
  s.d_pre = plan.take(n * c.pre_width()), s.d_o = plan.take(n * wide(c.query_width()));
  s.d_qkv = plan.take(n * c.qkv_width());
  s.d_qk = c.qk_norm ? plan.take(n * (c.query_width() + c.key_width())) : nullptr;
  s.normed = g.scratch_norm_, s.activated = g.scratch_mlp_;
  return s;
}

void Transformer::norm_backward(const void* params, void* grads, std::int64_t weight, std::int64_t bias, const void* x,
                                const std::int32_t* gather, std::int64_t rows, const void* mean, const void* rstd,
                                const void* dy, void* dx, bool accumulate, int threads) {
  const std::int64_t d = config_.hidden_size, e = table_.activation_size;
  if (config_.norm == Norm::rmsnorm) {
    RmsNormBackward n;
    n.tokens = rows, n.d = d, n.x = x, n.x_row = d, n.gather = gather, n.weight = at(params, weight, e), n.rstd = rstd;
    n.dy = dy, n.dy_row = d, n.dx = dx, n.dx_row = d, n.accumulate = accumulate;
    n.dweight = own_gradient(grads, weight);
    table_.rms_norm_backward(n, threads);
  } else {
    LayerNormBackward n;
    n.tokens = rows, n.d = d, n.x = x, n.x_row = d, n.gather = gather, n.weight = at(params, weight, e);
    n.mean = mean, n.rstd = rstd, n.dy = dy, n.dy_row = d, n.dx = dx, n.dx_row = d, n.accumulate = accumulate;
    n.dweight = own_gradient(grads, weight), n.dbias = own_gradient(grads, bias);
    table_.layer_norm_backward(n, threads);
  }
}

// dW += dy^T x and dbias += column sums of dy. The engine's one matrix may be several named parameters: all their stretches are
// settled together, because one product writes them all. Of a frozen matrix: the gradients of its adapter.
void Transformer::weight_gradient(const Graph& g, void* grads, std::int64_t weight, std::int64_t bias, std::int64_t in,
                                  std::int64_t out, const void* x, const void* dy, const void* d_t, int threads) {
  const std::int64_t e = table_.state_size;
  if (adapters_) {
    const Adapters::Group* adapter = adapters_->of(weight);
    if (adapter == nullptr) return;
    void* t = t_beside(g, x);
    adapters_->project(table_, *adapter, g.adapter_, g.packed_adapter_, g.tokens_, x, t, threads);
    auto fresh_at = [&](std::int64_t offset) { return settle(grads, offset, true); };
    Matmul over_tokens;
    over_tokens.k = g.tokens_, over_tokens.k_steps = steps_of(g.steps_), over_tokens.k_step_count = step_count(g.steps_);
    adapters_->gradients(table_, *adapter, grads, over_tokens, x, t, dy, d_t, fresh_at, threads);
    return;
  }
  bool fresh = false;
  const auto& parameters = layout_.parameters;
  for (std::size_t i = 0; i < parameters.size(); ++i)
    if (parameters[i].offset >= weight && parameters[i].offset < weight + in * out)
      fresh = settle(grads, parameters[i].offset, true);
  Matmul dw;
  dw.k = g.tokens_, dw.k_steps = steps_of(g.steps_), dw.k_step_count = step_count(g.steps_);
  dw.accumulate = !fresh, dw.c = at(grads, weight, e), dw.c_state = true;
  dw.m = layout_.transposed ? in : out, dw.n = layout_.transposed ? out : in;
  dw.a = layout_.transposed ? x : dy, dw.a_row = 1, dw.a_col = dw.m;
  dw.b = layout_.transposed ? dy : x, dw.b_row = dw.n, dw.b_col = 1;
  dw.c_row = dw.n;
  table_.matmul(dw, threads);
  if (bias == kAbsent) return;
  for (std::size_t i = 0; i < parameters.size(); ++i)
    if (parameters[i].offset >= bias && parameters[i].offset < bias + out) settle(grads, parameters[i].offset, false);
  table_.column_sum({g.tokens_, out, dy, out, at(grads, bias, e)}, threads);
}

void Transformer::linear_backward(const Graph& g, const void* params, void* grads, std::int64_t weight, std::int64_t bias,
                                  std::int64_t in, std::int64_t out, const void* x, const void* dy, void* dx, const Stack& s,
                                  int threads) {
  const Adapters::Group* adapter = group(weight);
  void* d_t = dx == s.d_norm ? s.d_o : s.d_norm;  // whichever is free
  if (adapter != nullptr) adapters_->project_back(table_, *adapter, g.adapter_, g.tokens_, dy, d_t, threads);
  weight_gradient(g, grads, weight, bias, in, out, x, dy, d_t, threads);
  if (dx == nullptr) return;
  Matmul back;  // dx = dy W, or goes on from what came through the adapter
  if (adapter != nullptr) adapters_->begin_input(table_, *adapter, g.adapter_, g.tokens_, d_t, dx, threads);
  back.accumulate = adapter != nullptr;
  back.m = g.tokens_, back.n = in, back.k = out;
  back.a = dy, back.a_row = out, back.a_col = 1;
  back.b = at(params, weight, table_.activation_size);
  back.b_row = layout_.transposed ? 1 : in, back.b_col = layout_.transposed ? out : 1;
  back.c = dx, back.c_row = in;
  table_.matmul(back, threads);
}

// s.dx holds d loss / d (the block's output) and leaves with d loss / d (its input), where anything below learns.
void Transformer::backward_block(const Graph& g, std::size_t index, const void* params, void* grads, const BlockActivations& a,
                                 const Stack& s, int threads) {
  const Config& c = config_;
  const LayerOffsets& w = layout_.layers[index];
  const std::int64_t e = table_.activation_size, n = g.tokens_, d = c.hidden_size, f = c.intermediate_size;
  const std::int64_t qkv = c.qkv_width(), q = c.query_width(), kv = c.key_width();
  const bool lowest = adapters_ && index == 0, below_out = !lowest || learns(w.qkv), below_up = below_out || learns(w.out);

  // MLP. d(activated) becomes d(pre) in the product's own finish, which makes the activated values again on the way.
  Matmul through_down;
  through_down.m = n, through_down.n = f, through_down.k = d;
  through_down.a = s.dx, through_down.a_row = d;
  through_down.b = at(params, w.down, e);
  through_down.b_row = layout_.transposed ? 1 : f, through_down.b_col = layout_.transposed ? d : 1;
  through_down.c = s.d_pre, through_down.c_row = c.pre_width();
  through_down.activation = backward_activation(c.mlp);
  through_down.activated = s.activated, through_down.activated_row = f;
  through_down.pre = a.pre, through_down.pre_row = c.pre_width();
  if (const Adapters::Group* adapter = group(w.down)) {
    adapters_->project_back(table_, *adapter, g.adapter_, n, s.dx, s.d_norm, threads);
    adapters_->begin_input(table_, *adapter, g.adapter_, n, s.d_norm, s.activated, threads);
    through_down.residual = s.activated, through_down.residual_row = f;
  }
  table_.matmul(through_down, threads);
  weight_gradient(g, grads, w.down, w.down_bias, f, d, s.activated, s.dx, s.d_norm, threads);
  if (learns(w.up)) norm(params, w.norm2, w.norm2_bias, a.x1, nullptr, n, s.normed, a.mean2, a.rstd2, threads);
  linear_backward(g, params, grads, w.up, w.up_bias, d, c.pre_width(), s.normed, s.d_pre, below_up ? s.d_norm : nullptr, s,
                  threads);
  if (!below_up) return;
  norm_backward(params, grads, w.norm2, w.norm2_bias, a.x1, nullptr, n, a.mean2, a.rstd2, s.d_norm, s.dx, true, threads);

  // attention
  linear_backward(g, params, grads, w.out, w.out_bias, q, d, a.o, s.dx, below_out ? s.d_o : nullptr, s, threads);
  if (!below_out) return;
  AttentionBackward attention;
  attention.shape = attention_shape(g, index);
  const void* queries = c.qk_norm ? a.qk : a.qkv;
  const std::int64_t qk_row = c.qk_norm ? q + kv : qkv;
  void* d_queries = c.qk_norm ? s.d_qk : s.d_qkv;
  attention.q = queries, attention.q_row = qk_row;
  attention.k = at(queries, q, e), attention.k_row = qk_row;
  attention.v = at(a.qkv, q + kv, e), attention.v_row = qkv;
  attention.o = a.o, attention.o_row = q, attention.lse = a.lse, attention.d_o = s.d_o, attention.d_o_row = q;
  attention.dq = d_queries, attention.dq_row = qk_row;
  attention.dk = at(d_queries, q, e), attention.dk_row = qk_row;
  attention.dv = at(s.d_qkv, q + kv, e), attention.dv_row = qkv;
  table_.flash_attention_backward(attention, threads);
  if (c.rotates(index))
    table_.rope({n, c.num_attention_heads + c.num_key_value_heads, c.head_dim, d_queries, qk_row, d_queries, qk_row,
                 g.positions_.data(), g.rotary_->cos.data(), g.rotary_->sin.data(), true},
                threads);
  if (c.qk_norm) {
    RmsNormBackward b;
    b.tokens = n, b.d = c.head_dim, b.x_row = qkv, b.dy_row = qk_row, b.dx_row = qkv;
    b.groups = c.num_attention_heads, b.x = a.qkv, b.weight = at(params, w.q_norm, e), b.rstd = a.qk_rstd;
    b.dy = s.d_qk, b.dx = s.d_qkv, b.dweight = own_gradient(grads, w.q_norm);
    table_.rms_norm_backward(b, threads);
    b.groups = c.num_key_value_heads, b.x = at(static_cast<const void*>(a.qkv), q, e), b.weight = at(params, w.k_norm, e);
    b.rstd = at(static_cast<const void*>(a.qk_rstd), n * c.num_attention_heads, table_.state_size);
    b.dy = at(static_cast<const void*>(s.d_qk), q, e), b.dx = at(s.d_qkv, q, e);
    b.dweight = own_gradient(grads, w.k_norm);
    table_.rms_norm_backward(b, threads);
  }
  if (learns(w.qkv)) norm(params, w.norm1, w.norm1_bias, a.x, nullptr, n, s.normed, a.mean1, a.rstd1, threads);
  linear_backward(g, params, grads, w.qkv, w.qkv_bias, d, qkv, s.normed, s.d_qkv, lowest ? nullptr : s.d_norm, s, threads);
  if (lowest) return;
  norm_backward(params, grads, w.norm1, w.norm1_bias, a.x, nullptr, n, a.mean1, a.rstd1, s.d_norm, s.dx, true, threads);
}

void Transformer::backward_body(Graph& g, const void* params, void* grads, const Stack& s, int threads, void (*poll)(),
                                const Finished& finished) {
  for (std::size_t i = g.blocks_.size(); i-- > 0;) {
    if (poll != nullptr) poll();
    if (g.options_.recompute) forward_block(g, i, params, g.blocks_[i], nullptr, threads);
    backward_block(g, i, params, grads, g.blocks_[i], s, threads);
    if (finished) finished(static_cast<std::int64_t>(i));
  }
  if (adapters_) return;  // the embedding does not learn
  const std::int64_t e = table_.state_size, d = config_.hidden_size;
  if (config_.learned_positions) {
    settle(grads, layout_.positions, false);
    table_.embedding_backward({g.tokens_, d, g.positions_.data(), s.dx, at(grads, layout_.positions, e)}, threads);
  }
  if (!layout_.tied) {
    settle(grads, layout_.embedding, false);
    table_.embedding_backward({g.tokens_, d, g.ids_.data(), s.dx, at(grads, layout_.embedding, e)}, threads);
    return;
  }
  // The tied look-up: rows of its own, one for each token id that has occurred, grown by doubling.
  Placed<std::int32_t> slots;
  slots.host.resize(g.ids_.host.size());
  const std::size_t before = slot_ids_.size(), row = static_cast<std::size_t>(d * e);
  for (std::size_t i = 0; i < slots.host.size(); ++i) {
    std::int32_t& slot = slot_of_[static_cast<std::size_t>(g.ids_.host[i])];
    if (slot < 0) {
      slot = static_cast<std::int32_t>(slot_ids_.size());
      slot_ids_.push_back(g.ids_.host[i]);
    }
    slots.host[i] = slot;
  }
  const std::size_t rows = slot_ids_.size();
  if (lookup_.bytes() < rows * row) {
    const std::size_t room = std::min<std::size_t>(2 * rows, static_cast<std::size_t>(config_.vocab_size));
    Buffer grown(table_, room * row);
    if (before > 0) table_.copy(grown.data(), lookup_.data(), before * row);
    lookup_ = std::move(grown);
  }
  if (rows > before) table_.zero(at(lookup_.data(), static_cast<std::int64_t>(before) * d, e), (rows - before) * row);
  slots.place(table_);
  table_.embedding_backward({g.tokens_, d, slots.data(), s.dx, lookup_.data()}, threads);
}

void Transformer::backward_score(Graph& g, const Weights& weights, void* grads, const void* d_logprobs, const void* d_entropy,
                                 int threads, void (*poll)(), const Finished& finished) {
  if (g.used_) throw ArgumentError("this graph's backward has already run; score the batch again for another one");
  require_whole_gradients();
  const void* params = weights.params;
  g.adapter_ = weights.adapter;
  if (g.rows_ == 0) {  // nothing was predicted, so nothing has a gradient
    g.used_ = true;
    g.memory_.reset();
    return;
  }
  const std::int64_t e = table_.activation_size, n = g.tokens_, d = config_.hidden_size;
  const Config& c = config_;
  Plan counting(table_);
  lay_out_stack(g, counting);
  Buffer memory(table_, counting.used);
  Plan plan(table_, memory.data());
  const Stack s = lay_out_stack(g, plan);

  g.used_ = partial_ = true;  // from here on the kept logits are overwritten and grads written
  const bool fresh = !adapters_ && settle(grads, layout_.head, true);
  LinearLogprobBackward head;
  head.rows = g.rows_, head.hidden = d, head.vocab = c.vocab_size;
  head.x = g.hidden_, head.weight = at(params, layout_.head, e), head.targets = g.targets_.data();
  head.index = g.outputs_.data(), head.temperature = g.options_.temperature;
  // Logits computed again: as many rows at a time as fit the budget, and 96 MiB (a tenth of 2048 x 50257 in float32 and
  // change).
  constexpr std::int64_t most = std::int64_t{96} << 20;
  head.z = g.z_,
  head.block_rows = std::max<std::int64_t>(1, std::min(g.options_.logits_budget, most) / table_.state_size / c.vocab_size);
  head.entropy = g.entropy_, head.lse = g.lse_, head.d_logprob = d_logprobs, head.d_entropy = d_entropy;
  head.dx = s.d_norm, head.dweight = adapters_ ? nullptr : at(grads, layout_.head, table_.state_size), head.accumulate = !fresh;
  head.row_steps = steps_of(g.row_steps_), head.row_steps_host = g.row_steps_.host.data();
  head.row_step_count = step_count(g.row_steps_);
  table_.linear_logprob_backward(head, threads);
  table_.zero(s.dx, static_cast<std::size_t>(n * d * e));  // a sequence's last token predicts nothing, others nothing wanted
  norm_backward(params, grads, layout_.norm, layout_.norm_bias, g.x_out_, g.sources_.data(), g.rows_, g.mean_, g.rstd_,
                s.d_norm, s.dx, false, threads);
  backward_body(g, params, grads, s, threads, poll, finished);
  partial_ = false;
  g.memory_.reset();
}

void Transformer::backward_values(Graph& g, const Weights& weights, void* grads, const void* d_values, int threads,
                                  void (*poll)(), const Finished& finished) {
  if (g.used_) throw ArgumentError("this graph's backward has already run; compute the values again for another one");
  require_whole_gradients();
  const void* params = weights.params;
  g.adapter_ = weights.adapter;
  const std::int64_t n = g.tokens_, d = config_.hidden_size;
  Plan counting(table_);
  lay_out_stack(g, counting);
  Buffer memory(table_, counting.used);
  Plan plan(table_, memory.data());
  const Stack s = lay_out_stack(g, plan);
  g.used_ = partial_ = true;
  Matmul dw;  // dweight [1, d] += dvalues^T hidden
  const std::int64_t head_at = adapters_ ? adapters_->head() : layout_.head;
  dw.accumulate = !settle(grads, head_at, true);
  dw.m = 1, dw.n = d, dw.k = n, dw.a = d_values, dw.a_row = 1, dw.a_col = 1, dw.b = g.hidden_, dw.b_row = d, dw.b_col = 1;
  dw.c = at(grads, head_at, table_.state_size), dw.c_row = d, dw.a_state = dw.c_state = true;
  table_.matmul(dw, threads);
  Matmul back;  // dhidden [n, d] = dvalues weight
  back.m = n, back.n = d, back.k = 1, back.a = d_values, back.a_row = 1, back.a_col = 1, back.a_state = true;
  back.b = head(g, params), back.b_row = d, back.b_col = 1, back.c = s.d_norm, back.c_row = d;
  table_.matmul(back, threads);
  norm_backward(params, grads, layout_.norm, layout_.norm_bias, g.x_out_, nullptr, n, g.mean_, g.rstd_, s.d_norm, s.dx, false,
                threads);
  backward_body(g, params, grads, s, threads, poll, finished);
  partial_ = false;
  g.memory_.reset();
}

}  // namespace tutelage
