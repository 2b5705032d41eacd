// Continuous batching: requests wait, enter when the cache can hold all that they may become, and leave when they are done; at
// every step the tokens that are due (one of every decoding sequence, a chunk of the prompts that are not yet read) go through
// the model together.
//
// What a request becomes depends on its weights, prompt, settings and key alone (P3): every row's bits are its own (P1).
// A prompt that begins like a resident sequence does not compute that beginning again: whole blocks are shared, the rest of the
// last one is copied, when the resident one has come that far.
//
// step() may throw (Ctrl-C, out of memory): nothing is lost then, and the next step() does the same work again.
// Test: tests/cpp/test_generator.cc, tests/python/test_rollouts.py.   Benchmark: bench/rollout.py.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "engine/kv_cache.h"
#include "engine/transformer.h"

namespace tutelage {

struct Request {
  std::vector<std::int32_t> prompt;
  std::int64_t max_new_tokens = 0;  // cut to what the positions leave
  SampleSettings settings;          // its position is set by the generator
  std::vector<std::int32_t> stop_token_ids;
  std::vector<std::string> stop_strings;  // bytes
};

enum class FinishReason : std::uint8_t { running, stop, length, string };

struct Completion {
  std::vector<std::int32_t> tokens;
  std::vector<double> logprobs, support_logprobs;
  FinishReason reason = FinishReason::running;
};

struct GeneratorOptions {
  std::int64_t kv_cache_bytes = 0;
  std::int64_t prefill_chunk = 512;  // rows of prompts in one step
  std::int64_t max_sequences = 256;  // resident at a time: twice what makes a step arithmetic instead of memory
  bool share_prefixes = true;
  int threads = 1;
  void (*poll)() = nullptr;
};

class Generator {
 public:
  // token_bytes[id]: what the id spells, where stop strings are asked for; else empty.
  Generator(Transformer& model, const Weights& weights, Packed packed, GeneratorOptions options,
            std::vector<std::string> token_bytes);
  ~Generator();

  void add(Request request);  // its number is the order of adding
  bool step();                // false: nothing was left to do
  const Completion& completion(std::size_t request) const { return completions_[request]; }
  std::size_t size() const { return completions_.size(); }
  // Requests that got a token in the last step.
  const std::vector<std::size_t>& advanced() const { return advanced_; }
  std::int64_t prefilled() const { return prefilled_; }  // rows of prompts computed so far
  std::int64_t steps() const { return steps_; }

 private:
  struct Sequence;
  void admit();
  void fork_waiting();
  std::int64_t room(const Request& request) const;
  bool ends_with_stop_string(const Request& request, const Sequence& sequence) const;
  void retire() noexcept;

  Transformer& model_;
  const Weights weights_;
  const Packed packed_;
  const GeneratorOptions options_;
  const std::vector<std::string> token_bytes_;
  KvCache cache_;
  std::vector<Request> requests_;
  std::vector<Completion> completions_;
  std::deque<std::size_t> waiting_;
  std::vector<std::unique_ptr<Sequence>> resident_;
  std::vector<std::size_t> advanced_;
  std::int64_t prefilled_ = 0, steps_ = 0;
};

// The noise key of a sample (P3): a hash of the seed, the prompt's ids and the sample's index.
std::uint64_t sample_key(std::uint64_t seed, const std::vector<std::int32_t>& prompt, std::uint64_t sample);

}  // namespace tutelage
