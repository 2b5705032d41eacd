#include "engine/generator.h"

#include <algorithm>
#include <utility>

#include "core/error.h"
#include "core/tensor.h"

namespace tutelage {

// A request that is being worked on.
struct Generator::Sequence {
  std::size_t request;
  std::vector<std::int32_t> tokens;  // prompt and completion
  std::int64_t computed = 0;         // positions whose keys and values are in the cache
  std::int64_t promised = 0;         // blocks it may still take
  std::vector<KvCache::Block*> blocks;
  std::vector<void*> places;  // of the blocks, as the kernels want them
  const Sequence* donor = nullptr;
  std::int64_t shared = 0;  // positions to take over from the donor, once it has computed them
  std::string tail;         // bytes at the end of the completion in which a stop string may begin

  std::int64_t length() const { return static_cast<std::int64_t>(tokens.size()); }
};

namespace {
// Shorter common beginnings are computed again: copying a block is not free either.
constexpr std::int64_t kLeastShared = 8;

std::int64_t common_prefix(const std::vector<std::int32_t>& x, const std::vector<std::int32_t>& y) {
  const auto n = static_cast<std::ptrdiff_t>(std::min(x.size(), y.size()));
  return std::mismatch(x.begin(), x.begin() + n, y.begin()).first - x.begin();
}
}  // namespace

std::uint64_t sample_key(std::uint64_t seed, const std::vector<std::int32_t>& prompt, std::uint64_t sample) {
  // SplitMix64's finisher over a running state: every input bit reaches every output bit (Steele et al. 2014).
  std::uint64_t state = 0x9E3779B97F4A7C15ull;
  auto mix = [&](std::uint64_t value) {
    state = (state ^ value) + 0x9E3779B97F4A7C15ull;
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9ull;
    state = (state ^ (state >> 27)) * 0x94D049BB133111EBull;
    state ^= state >> 31;
  };
  mix(seed);
  mix(prompt.size());
  for (std::int32_t id : prompt) mix(static_cast<std::uint32_t>(id));
  mix(sample);
  return state;
}

Generator::Generator(Transformer& model, const Weights& weights, Packed packed, GeneratorOptions options,
                     std::vector<std::string> token_bytes)
    : model_(model),
      weights_(weights),
      packed_(std::move(packed)),
      options_(options),
      token_bytes_(std::move(token_bytes)),
      cache_(model.config(), model.table(), options.kv_cache_bytes) {}

Generator::~Generator() = default;

std::int64_t Generator::room(const Request& request) const {
  return std::min(request.max_new_tokens,
                  model_.config().max_position_embeddings - static_cast<std::int64_t>(request.prompt.size()));
}

void Generator::add(Request request) {
  const std::string name = "prompt " + std::to_string(requests_.size());
  const auto length = static_cast<std::int64_t>(request.prompt.size());
  if (length == 0) throw ArgumentError(name + " is empty; give it at least one token (a beginning-of-text token, say)");
  if (length > model_.config().max_position_embeddings)
    throw ArgumentError(name + " has " + std::to_string(length) + " tokens, more than max_position_embeddings = " +
                        std::to_string(model_.config().max_position_embeddings) + "; cut it");
  for (std::size_t i = 0; i < request.prompt.size(); ++i)
    if (request.prompt[i] < 0 || request.prompt[i] >= model_.config().vocab_size)
      throw ArgumentError(name + " holds token id " + std::to_string(request.prompt[i]) + " at position " + std::to_string(i) +
                          ", but the vocabulary has " + std::to_string(model_.config().vocab_size) + " ids");
  const std::int64_t blocks = KvCache::blocks_for(length + room(request));
  if (blocks > cache_.total()) {
    const std::int64_t block = KvCache::block_bytes(model_.config(), model_.table());
    throw ArgumentError(name + " and its new tokens (" + std::to_string(length) + " + " + std::to_string(room(request)) +
                        ") need " + std::to_string(blocks * block) + " bytes of cache, but kv_cache_bytes is " +
                        std::to_string(options_.kv_cache_bytes));
  }
  requests_.push_back(std::move(request));
  completions_.emplace_back();
  waiting_.push_back(requests_.size() - 1);
}

void Generator::admit() {
  while (!waiting_.empty() && static_cast<std::int64_t>(resident_.size()) < options_.max_sequences) {
    const std::size_t number = waiting_.front();
    const Request& request = requests_[number];
    if (room(request) <= 0) {  // the prompt fills the context
      completions_[number].reason = FinishReason::length;
      waiting_.pop_front();
      continue;
    }
    auto sequence = std::make_unique<Sequence>();
    sequence->request = number;
    sequence->tokens = request.prompt;
    // At least the last token is computed, for the draw that follows it.
    const std::int64_t useful = sequence->length() - 1;
    for (const auto& other : resident_) {
      if (!options_.share_prefixes || sequence->shared == useful) break;
      const std::int64_t common = std::min(common_prefix(sequence->tokens, other->tokens), useful);
      if (common >= kLeastShared && common > sequence->shared) sequence->shared = common, sequence->donor = other.get();
    }
    const std::int64_t needed = KvCache::blocks_for(sequence->length() + room(request)) - sequence->shared / kCacheBlock;
    if (needed > cache_.available()) return;  // first come, first served: it waits, and so do those behind it
    sequence->promised = needed;
    resident_.push_back(std::move(sequence));
    cache_.promise(needed);
    waiting_.pop_front();
  }
}

// Sequences whose donor has come far enough take over what they share.
void Generator::fork_waiting() {
  for (auto& sequence : resident_) {
    if (sequence->donor == nullptr || sequence->donor->computed < sequence->shared) continue;
    const Sequence& donor = *sequence->donor;
    const auto whole = static_cast<std::size_t>(sequence->shared / kCacheBlock);
    const bool part = sequence->shared % kCacheBlock != 0;
    std::vector<KvCache::Block*> blocks;
    std::vector<void*> places;
    blocks.reserve(whole + 1), places.reserve(whole + 1);
    KvCache::Block* own = part ? cache_.take() : nullptr;  // the only thing that may fail
    for (std::size_t i = 0; i < whole; ++i) blocks.push_back(KvCache::share(donor.blocks[i]));
    if (part) {
      cache_.copy(own, donor.blocks[whole]);
      blocks.push_back(own);
      --sequence->promised;
    }
    for (KvCache::Block* block : blocks) places.push_back(block->memory.data());
    sequence->blocks = std::move(blocks), sequence->places = std::move(places);
    sequence->computed = sequence->shared;
    sequence->donor = nullptr;
  }
}

bool Generator::ends_with_stop_string(const Request& request, const Sequence& sequence) const {
  return std::any_of(request.stop_strings.begin(), request.stop_strings.end(),
                     [&](const std::string& s) { return sequence.tail.find(s) != std::string::npos; });
}

// Those that are finished leave; whoever waits for what they hold has taken it over before.
void Generator::retire() noexcept {
  for (auto& sequence : resident_) {
    if (completions_[sequence->request].reason == FinishReason::running) continue;
    for (KvCache::Block* block : sequence->blocks) cache_.release(block);
    cache_.withdraw(sequence->promised);
    sequence.reset();
  }
  std::erase(resident_, nullptr);
}

bool Generator::step() {
  advanced_.clear();
  fork_waiting();
  retire();
  admit();
  fork_waiting();
  if (resident_.empty()) return false;

  GenerationRows rows;
  struct Due {
    Sequence* sequence;
    std::int64_t count;
  };
  std::vector<Due> due;
  std::int64_t prefill_left = options_.prefill_chunk, prefill_rows = 0;
  for (auto& sequence : resident_) {
    if (sequence->donor != nullptr || completions_[sequence->request].reason != FinishReason::running) continue;
    std::int64_t count = sequence->length() - sequence->computed;
    const bool decoding =
        count == 1 && sequence->computed >= static_cast<std::int64_t>(requests_[sequence->request].prompt.size());
    if (!decoding) {
      count = std::min(count, prefill_left);
      if (count == 0) continue;
      prefill_left -= count, prefill_rows += count;
    }
    while (static_cast<std::int64_t>(sequence->blocks.size()) < KvCache::blocks_for(sequence->computed + count)) {
      sequence->blocks.reserve(sequence->blocks.size() + 1), sequence->places.reserve(sequence->blocks.size() + 1);
      sequence->blocks.push_back(cache_.take());
      sequence->places.push_back(sequence->blocks.back()->memory.data());
      --sequence->promised;
    }
    due.push_back({sequence.get(), count});
  }
  for (const Due& d : due) {
    const Sequence& s = *d.sequence;
    for (std::int64_t i = 0; i < d.count; ++i) {
      rows.ids.push_back(s.tokens[static_cast<std::size_t>(s.computed + i)]);
      rows.positions.push_back(static_cast<std::int32_t>(s.computed + i));
    }
    rows.cu_rows.push_back(static_cast<std::int32_t>(rows.ids.size()));
    rows.first_position.push_back(static_cast<std::int32_t>(s.computed));
    rows.blocks.push_back(s.places.data());
    if (s.computed + d.count < s.length()) continue;
    rows.sources.push_back(static_cast<std::int32_t>(rows.ids.size()) - 1);
    SampleSettings settings = requests_[s.request].settings;
    settings.position = static_cast<std::uint32_t>(s.length());
    rows.settings.push_back(settings);
  }
  Draws draws;
  model_.generate_step(rows, weights_, packed_, options_.threads, options_.poll, draws);

  std::size_t draw = 0;
  for (const Due& d : due) {
    const Sequence& s = *d.sequence;
    if (s.computed + d.count == s.length() && draws.tokens[draw++] < 0)
      throw std::runtime_error("the logits after position " + std::to_string(s.length() - 1) + " of prompt " +
                               std::to_string(s.request) + " are not finite; the weights hold NaN or are too large");
  }

  // From here on nothing is computed: what the step found out becomes the state.
  draw = 0;
  prefilled_ += prefill_rows, ++steps_;
  for (const Due& d : due) {
    Sequence& s = *d.sequence;
    s.computed += d.count;
    if (s.computed < s.length()) continue;
    const std::size_t i = draw++;
    const Request& request = requests_[s.request];
    Completion& completion = completions_[s.request];
    const std::int32_t token = draws.tokens[i];
    s.tokens.push_back(token);
    completion.tokens.push_back(token);
    completion.logprobs.push_back(draws.logprobs[i]);
    completion.support_logprobs.push_back(draws.support_logprobs[i]);
    advanced_.push_back(s.request);
    if (!request.stop_strings.empty()) {
      std::size_t longest = 0;
      for (const std::string& stop : request.stop_strings) longest = std::max(longest, stop.size());
      if (s.tail.size() >= longest) s.tail.erase(0, s.tail.size() - (longest - 1));
      s.tail += token_bytes_[static_cast<std::size_t>(token)];
    }
    if (std::find(request.stop_token_ids.begin(), request.stop_token_ids.end(), token) != request.stop_token_ids.end())
      completion.reason = FinishReason::stop;
    else if (ends_with_stop_string(request, s))
      completion.reason = FinishReason::string;
    else if (static_cast<std::int64_t>(completion.tokens.size()) >= room(request))
      completion.reason = FinishReason::length;
  }
  return true;
}

}  // namespace tutelage
