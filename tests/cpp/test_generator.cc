// The scheduler without Python, so that the sanitizers see it: budgets, shared prefixes, stopping; the same bits throughout.
#include "engine/generator.h"

#include <algorithm>

#include "core/error.h"
#include "core/memory.h"
#include "engine/tables.h"
#include "support.h"

using namespace test;

namespace {

Config small_config() {
  Config c;
  c.vocab_size = 301, c.hidden_size = 24, c.intermediate_size = 40, c.num_hidden_layers = 2, c.num_attention_heads = 3;
  c.num_key_value_heads = 1, c.head_dim = 8, c.max_position_embeddings = 300;
  return c;
}

struct Small {
  Transformer model;
  std::vector<float> params, adapter;
  Packed packed;
  Small() : model(small_config(), *float_tables().back()) { fill(); }
  explicit Small(const AdapterOptions& options) : model(small_config(), *float_tables().back(), Head::lm, options) {
    adapter.resize(static_cast<std::size_t>(model.size()));
    initialise(model.config(), model.trainable(), 2, 1, adapter.data(), 1);
    for (std::size_t i = 0; i < adapter.size(); ++i) adapter[i] += static_cast<float>(i % 7) * 0.01f;  // B too
    fill();
  }
  Weights weights() const { return {params.data(), adapter.empty() ? nullptr : adapter.data()}; }

 private:
  void fill() {
    params.resize(static_cast<std::size_t>(model.layout().size));
    initialise(model.config(), model.layout().parameters, 1, 0, params.data(), 1);
    packed.params = Transformer(small_config(), model.table()).pack(params.data(), false, 2, nullptr);
    if (!adapter.empty()) packed.adapter = model.pack(adapter.data(), false, 2, nullptr);
  }
};

std::vector<Request> requests() {
  std::vector<Request> all;
  for (int i = 0; i < 14; ++i) {
    Request r;
    const int length = i % 5 == 4 ? 299 : 1 + i * 17;
    for (int j = 0; j < length; ++j) r.prompt.push_back((i % 3 + j * j) % 301);  // every third begins alike
    r.max_new_tokens = 1 + i % 4 * 3;
    r.settings.key = sample_key(7, r.prompt, 0), r.settings.top_k = i % 2 == 1 ? 20 : 0;
    all.push_back(std::move(r));
  }
  return all;
}

Outputs<double> generate(Small& s, GeneratorOptions options, const std::vector<Request>& all) {
  Generator g(s.model, s.weights(), s.packed, options, {});
  for (const Request& r : all) g.add(r);
  while (g.step())
    for (std::size_t row : g.advanced()) CHECK(!g.completion(row).tokens.empty());
  Outputs<double> out;
  for (std::size_t i = 0; i < g.size(); ++i) {
    CHECK(g.completion(i).reason != FinishReason::running, i);
    out.emplace_back(g.completion(i).tokens.begin(), g.completion(i).tokens.end());
    out.push_back(g.completion(i).logprobs);
  }
  return out;
}

std::int64_t block(const Small& s) { return KvCache::block_bytes(s.model.config(), s.model.table()); }

}  // namespace

TEST(budgets_chunks_threads_and_shared_prefixes_change_no_bit) {
  Small s;
  const std::size_t before = memory_use().in_use;
  const Outputs<double> expected = generate(s, {.kv_cache_bytes = 100 * block(s), .share_prefixes = false}, requests());
  for (std::int64_t blocks : {3, 5, 40})
    for (std::int64_t chunk : {1, 37, 1000})
      for (bool share : {false, true}) {
        const GeneratorOptions options{blocks * block(s), chunk, blocks == 5 ? 2 : 256, share, blocks == 40 ? 3 : 1, nullptr};
        CHECK(same_bits(generate(s, options, requests()), expected), blocks, chunk, share);
      }
  CHECK(memory_use().in_use <= before + 65536, "only rotary tables stay", memory_use().in_use, before);
}

TEST(adapters_keep_that) {
  for (const std::vector<std::string>& targets : {std::vector<std::string>{}, {"v_proj", "mlp.up_proj", "down_proj"}}) {
    Small s({.rank = 3, .scale = 0.5, .target_modules = targets});
    const Outputs<double> expected = generate(s, {.kv_cache_bytes = 100 * block(s), .share_prefixes = false}, requests());
    for (std::int64_t chunk : {1, 37})
      CHECK(
          same_bits(generate(s, {.kv_cache_bytes = 5 * block(s), .prefill_chunk = chunk, .threads = 2}, requests()), expected),
          chunk);
    s.packed.adapter = nullptr;
    CHECK(same_bits(generate(s, {.kv_cache_bytes = 5 * block(s)}, requests()), expected), "from the plain matrices");
    Small bare;
    CHECK(!same_bits(generate(bare, {.kv_cache_bytes = 100 * block(s)}, requests()), expected), "control: they do something");
  }
  CHECK_THROWS(ArgumentError,
               "target_modules names 'lm_head', which is no linear layer of this model's blocks; there are down_proj, "
               "gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj",
               Small({.rank = 3, .target_modules = {"q_proj", "lm_head"}}));
}

TEST(any_allocation_of_a_step_may_fail_and_the_step_is_done_again) {
  Small s;
  const GeneratorOptions options{.kv_cache_bytes = 9 * block(s)};
  const Outputs<double> expected = generate(s, options, requests());
  Generator g(s.model, s.weights(), s.packed, options, {});
  for (const Request& r : requests()) g.add(r);
  int failures = 0;
  for (std::uint64_t k = 1;; k += 23) {  // further and further into a step, until it is through
    fail_allocation(k);
    try {
      if (!g.step()) break;
      k = 1;
    } catch (const std::bad_alloc&) {
      ++failures;
    }
  }
  fail_allocation(0);
  CHECK(failures > 10, failures);
  Outputs<double> out;
  for (std::size_t i = 0; i < g.size(); ++i) {
    out.emplace_back(g.completion(i).tokens.begin(), g.completion(i).tokens.end());
    out.push_back(g.completion(i).logprobs);
  }
  CHECK(same_bits(out, expected));
}

TEST(what_can_never_fit_is_refused_with_the_number_needed) {
  Small s;
  Generator g(s.model, s.weights(), s.packed, {.kv_cache_bytes = 2 * block(s)}, {});
  Request r;
  r.prompt.assign(250, 1), r.max_new_tokens = 6;
  g.add(r);  // 256 positions: two blocks
  r.max_new_tokens = 7;
  CHECK_THROWS(ArgumentError,
               "prompt 1 and its new tokens (250 + 7) need " + std::to_string(3 * block(s)) +
                   " bytes of cache, but kv_cache_bytes is " + std::to_string(2 * block(s)),
               g.add(r));
}

TEST(a_stop_string_is_found_across_tokens) {
  Small s;
  std::vector<std::string> spelling(301);
  for (std::size_t i = 0; i < spelling.size(); ++i) spelling[i] = i % 2 == 0 ? "ab" : "c";
  Request r;
  r.prompt = {5, 6}, r.max_new_tokens = 200;
  auto run = [&](std::vector<std::string> stops) {
    Generator g(s.model, s.weights(), s.packed, {.kv_cache_bytes = 3 * block(s)}, spelling);
    Request with = r;
    with.stop_strings = std::move(stops);
    g.add(with);
    while (g.step()) {
    }
    return g.completion(0);
  };
  auto spelled = [&](const Completion& c, std::size_t tokens) {
    std::string text;
    for (std::size_t i = 0; i < tokens; ++i) text += spelling[static_cast<std::size_t>(c.tokens[i])];
    return text;
  };
  for (const std::string& stop : {std::string("babc"), std::string("cab"), std::string("cc")}) {
    const Completion c = run({"never", stop});
    CHECK(c.reason == FinishReason::string, stop);
    CHECK(spelled(c, c.tokens.size()).find(stop) != std::string::npos, stop);
    CHECK(spelled(c, c.tokens.size() - 1).find(stop) == std::string::npos, stop);
  }
  CHECK(run({"never"}).reason == FinishReason::length);
}
