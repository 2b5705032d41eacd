// Keys and values of the sequences that are being generated, in blocks of kCacheBlock positions (all layers of a position lie
// in one block), within a budget of bytes. A sequence reserves every block that it may come to need before it starts, so none
// is ever preempted; blocks are shared by reference count. Test: tests/cpp/test_generator.cc.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "engine/buffer.h"
#include "engine/config.h"

namespace tutelage {

class KvCache {
 public:
  struct Block {
    Buffer memory;
    std::int64_t references = 0;
  };

  KvCache(const Config& config, const KernelTable& table, std::int64_t budget_bytes)
      : table_(table), block_size_(block_bytes(config, table)), total_(budget_bytes / block_size_) {}

  static std::int64_t block_bytes(const Config& config, const KernelTable& table) {
    return config.num_hidden_layers * cached_attention_elements(config.num_key_value_heads, config.head_dim) *
           table.activation_size;
  }
  static std::int64_t blocks_for(std::int64_t positions) { return (positions + kCacheBlock - 1) / kCacheBlock; }

  std::int64_t total() const { return total_; }
  std::int64_t live() const { return live_; }
  std::int64_t available() const { return total_ - live_ - promised_; }  // neither in use nor promised

  void promise(std::int64_t blocks) { promised_ += blocks; }  // at most available()
  void withdraw(std::int64_t blocks) { promised_ -= blocks; }
  Block* take();  // one that was promised, with one reference
  static Block* share(Block* block) {
    ++block->references;
    return block;
  }
  void release(Block* block) noexcept;
  void copy(Block* to, const Block* from) const {
    table_.copy(to->memory.data(), from->memory.data(), static_cast<std::size_t>(block_size_));
  }

 private:
  const KernelTable& table_;
  const std::int64_t block_size_, total_;
  std::int64_t live_ = 0, promised_ = 0;
  std::vector<std::unique_ptr<Block>> blocks_;
  std::vector<Block*> free_;
};

}  // namespace tutelage
