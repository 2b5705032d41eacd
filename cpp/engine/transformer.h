// The transformer: one forward and one backward, written once against the kernel table.
//
//   x = embedding;  per block:  x += attention(norm(x));  x += mlp(norm(x));  then the head:
//   lm      log-prob and entropy of every token but each sequence's first, from the hidden state before it
//   scalar  a value after every token
//
// With adapters (engine/adapters.h) these are what learns: the parameters stay, and only the hidden states' gradients pass
// them.
//
// Parameters and gradients are the caller's flat buffers. A Graph is what one forward keeps for its backward; several may be
// alive.
// For rollouts the same blocks run over the rows that are due (generate_step): the attention reads a cache, the products read
// packed weights. The kernels are those of the forward, so the bits are too (P2).
//
// The same bits whatever the batch, the threads, the level (P1); and gradients that do not depend on how a batch was cut into
// consecutive micro-batches (P4): every weight gradient is one chain over tokens that continues in the gradient buffer. A tied
// embedding is used twice, so it has two chains: the look-up's is kept apart, for the rows that occur, until
// finish_gradients().
//
// Test: tests/python/test_model.py, test_promises.py, test_lora.py, test_memory.py.   Benchmark: bench/train.py.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "engine/adapters.h"
#include "engine/buffer.h"
#include "engine/config.h"
#include "engine/kv_cache.h"
#include "engine/layout.h"
#include "engine/packed_weights.h"
#include "engine/tables.h"
#include "kernels/table.h"

namespace tutelage {

// Packed sequences, checked: token ids inside the vocabulary, no sequence longer than the positions, none empty.
struct Batch {
  std::int64_t tokens = 0, sequences = 0;
  const std::int32_t *ids = nullptr, *cu_seqlens = nullptr;
  const bool* mask = nullptr;  // for score: the tokens whose log-prob is wanted (null: all); the head works for no other
};

// What a model computes with: its parameters, and an adapter's beside them where the model has one.
struct Weights {
  const void *params = nullptr, *adapter = nullptr;
};

// The same in streaming order.
struct Packed {
  std::shared_ptr<const PackedWeights> params, adapter;
};

struct Options {
  int threads = 1;
  bool keep = true;                                      // for a backward
  bool recompute = false;                                // keep each block's input only and run the block again in the backward
  std::int64_t logits_budget = std::int64_t{256} << 20;  // bytes of logits kept between forward and backward
  double temperature = 1.0;
  void (*poll)() = nullptr;  // called between blocks; may throw (Ctrl-C)
};

// Cosines and sines for positions [0, positions), in the table's element type. Grown when a longer sequence comes; a graph
// holds the one it was made with, so growing never pulls a table from under another thread.
struct RotaryCache {
  std::int64_t positions = 0;
  Buffer cos, sin;
};

// What one block keeps. One set a block, or one for all where nothing is kept.
struct BlockActivations {
  void *x = nullptr, *mean1 = nullptr, *rstd1 = nullptr, *qkv = nullptr, *qk = nullptr, *qk_rstd = nullptr;
  void *o = nullptr, *lse = nullptr, *x1 = nullptr, *mean2 = nullptr, *rstd2 = nullptr, *pre = nullptr;
};

// One step of generation: new tokens of some sequences, and which of them are followed by a draw.
struct GenerationRows {
  std::vector<std::int32_t> ids, positions;
  std::vector<std::int32_t> cu_rows{0}, first_position;  // the rows of each sequence (segment), its first row's position
  std::vector<void* const*> blocks;                      // of each segment: the cache blocks of its sequence
  std::vector<std::int32_t> sources;                     // rows whose next token is drawn ...
  std::vector<SampleSettings> settings;                  // ... and how
};
struct Draws {
  std::vector<std::int32_t> tokens;  // -1: the logits were not finite
  std::vector<double> logprobs, support_logprobs;
};

class Graph {
 public:
  std::int64_t tokens() const { return tokens_; }
  std::int64_t bytes() const { return static_cast<std::int64_t>(memory_.bytes()); }
  bool used() const { return used_; }

 private:
  friend class Transformer;
  std::int64_t tokens_ = 0, sequences_ = 0, longest_ = 0, rows_ = 0;  // longest_: tokens of the longest sequence
  Placed<std::int32_t> ids_, cu_seqlens_, positions_, sources_, outputs_, targets_;
  Placed<std::int32_t> steps_,
      row_steps_;  // matmul.h's k_steps of the tokens and of the rows; where the table computes on a device
  Placed<std::int32_t> cache_cu_rows_, cache_first_;  // generation only, as what follows
  Placed<void*> cache_blocks_;
  Placed<void* const*> cache_lists_;
  std::int64_t most_cache_rows_ = 0, most_cache_positions_ = 0;
  Options options_;
  Buffer memory_;
  std::shared_ptr<const RotaryCache> rotary_;
  const void* adapter_ = nullptr;
  const PackedWeights *packed_ = nullptr, *packed_adapter_ = nullptr;  // generation only: weights in streaming order ...
  const GenerationRows* rows_due_ = nullptr;                           // ... and the cache that the attention reads
  std::vector<BlockActivations> blocks_;
  void *x_out_ = nullptr, *mean_ = nullptr, *rstd_ = nullptr, *hidden_ = nullptr, *lse_ = nullptr, *entropy_ = nullptr;
  void *z_ = nullptr, *scratch_norm_ = nullptr, *scratch_mlp_ = nullptr;
  bool used_ = false;
};

class Transformer {
 public:
  Transformer(const Config& config, const KernelTable& table);
  // With adapters beside the parameters of a model with `base_head`.
  Transformer(const Config& config, const KernelTable& table, Head base_head, const AdapterOptions& adapters);

  const Config& config() const { return config_; }
  const Layout& layout() const { return layout_; }  // of Weights::params
  // What learns, in a flat buffer of `size` elements: the parameters themselves, or the adapters.
  const std::vector<Parameter>& trainable() const { return adapters_ ? adapters_->parameters() : layout_.parameters; }
  std::int64_t size() const { return adapters_ ? adapters_->size() : layout_.size; }
  bool adapted() const { return adapters_.has_value(); }
  const KernelTable& table() const { return table_; }

  // lm head. logprobs, entropy [tokens]: zero at each sequence's first token and outside the mask. Null when nothing was kept.
  std::unique_ptr<Graph> score(const Batch& batch, const Weights& weights, const Options& options, void* logprobs,
                               void* entropy);
  // scalar head. values [tokens].
  std::unique_ptr<Graph> values(const Batch& batch, const Weights& weights, const Options& options, void* values);

  // Every matrix of what learns in streaming order, for generate_step. With half: as bfloat16, exact where params were rounded
  // to it.
  std::shared_ptr<const PackedWeights> pack(const void* params, bool half, int threads, void (*poll)()) const;
  // lm head. Runs the rows through all blocks, appends their keys and values to the cache and draws.
  void generate_step(const GenerationRows& rows, const Weights& weights, const Packed& packed, int threads, void (*poll)(),
                     Draws& draws);

  // Adds d loss / d (what learns) to grads. Once a graph; the weights must be those of the forward. finished, where there is
  // one, is called with each block's index, the last block's first: of it and of all that lies behind it in grads this
  // backward has written everything (or, where kernels run on by themselves, has launched it).
  using Finished = std::function<void(std::int64_t block)>;
  void backward_score(Graph& graph, const Weights& weights, void* grads, const void* d_logprobs, const void* d_entropy,
                      int threads, void (*poll)(), const Finished& finished = {});
  void backward_values(Graph& graph, const Weights& weights, void* grads, const void* d_values, int threads, void (*poll)(),
                       const Finished& finished = {});

  // Gradients count as zero from here on; the buffer itself is written when the first gradient arrives, or by finish_gradients.
  void forget_gradients();
  // Writes what is still owed to grads: zeros not yet written, the tied look-up's rows. After a backward that ended in the
  // middle (out of memory, Ctrl-C) this and every further backward throw until forget_gradients(): grads hold part of it.
  void finish_gradients(void* grads, int threads);

  // Bytes that a forward keeps (or needs while it runs, when keep is false), for `sequences` sequences of `tokens` in all.
  std::int64_t activation_bytes(std::int64_t tokens, std::int64_t sequences, const Options& options) const;

 private:
  struct Stack;
  void check(const Batch& batch) const;
  void lay_out(Graph& graph, Plan& plan) const;
  std::unique_ptr<Graph> forward(const Batch& batch, const Weights& weights, const Options& options);
  void run_blocks(Graph& graph, const void* params, const Options& options);
  void place_cache_rows(Graph& g) const;
  void attend(const Graph& g, std::size_t index, const void* queries, std::int64_t qk_row, const BlockActivations& a,
              int threads) const;
  void forward_block(const Graph& g, std::size_t index, const void* params, const BlockActivations& a, void* x_next,
                     int threads) const;
  void backward_block(const Graph& g, std::size_t index, const void* params, void* grads, const BlockActivations& a,
                      const Stack& s, int threads);
  void backward_body(Graph& graph, const void* params, void* grads, const Stack& s, int threads, void (*poll)(),
                     const Finished& finished);
  std::shared_ptr<const RotaryCache> rotary(std::int64_t longest, int threads);
  Stack lay_out_stack(const Graph& graph, Plan& plan) const;
  void norm(const void* params, std::int64_t weight, std::int64_t bias, const void* x, const std::int32_t* gather,
            std::int64_t rows, void* y, void* mean, void* rstd, int threads) const;
  void norm_backward(const void* params, void* grads, std::int64_t weight, std::int64_t bias, const void* x,
                     const std::int32_t* gather, std::int64_t rows, const void* mean, const void* rstd, const void* dy,
                     void* dx, bool accumulate, int threads);
  void linear(const Graph& g, const void* params, std::int64_t weight, std::int64_t bias, std::int64_t in, std::int64_t out,
              const void* x, std::int64_t x_row, Matmul fused, int threads) const;
  AttentionShape attention_shape(const Graph& g, std::size_t index) const;
  const void* head(const Graph& g, const void* params) const;
  static void* t_beside(const Graph& g, const void* x);
  const Adapters::Group* group(std::int64_t weight) const { return adapters_ ? adapters_->of(weight) : nullptr; }
  std::int64_t wide(std::int64_t width) const { return adapters_ ? std::max(width, adapters_->widest()) : width; }
  bool learns(std::int64_t weight) const { return !adapters_ || adapters_->of(weight) != nullptr; }
  void linear_backward(const Graph& g, const void* params, void* grads, std::int64_t weight, std::int64_t bias, std::int64_t in,
                       std::int64_t out, const void* x, const void* dy, void* dx, const Stack& s, int threads);
  void weight_gradient(const Graph& g, void* grads, std::int64_t weight, std::int64_t bias, std::int64_t in, std::int64_t out,
                       const void* x, const void* dy, const void* d_t, int threads);
  bool settle(void* grads, std::int64_t offset, bool overwritten);
  void* own_gradient(void* grads, std::int64_t offset);
  void require_whole_gradients() const;

  const Config config_;
  const Layout layout_;
  const KernelTable& table_;
  const std::optional<Adapters> adapters_;
  std::mutex rotary_mutex_;
  std::shared_ptr<const RotaryCache> rotary_;
  std::vector<bool> owed_zero_;                   // by parameter: its stretch of grads counts as zero but was not written
  std::vector<std::int32_t> slot_of_, slot_ids_;  // the tied look-up's rows: slot of a token id (or -1), id of a slot
  Buffer lookup_;
  bool partial_ = false;  // a backward ended in the middle
};

}  // namespace tutelage
