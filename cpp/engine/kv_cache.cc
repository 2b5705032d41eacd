#include "engine/kv_cache.h"

namespace tutelage {

KvCache::Block* KvCache::take() {
  if (free_.empty()) {
    free_.reserve(blocks_.size() + 1);  // so that release() never needs memory
    auto block = std::make_unique<Block>();
    block->memory = Buffer(table_, static_cast<std::size_t>(block_size_));
    blocks_.push_back(std::move(block));
    free_.push_back(blocks_.back().get());
  }
  Block* block = free_.back();
  free_.pop_back();
  block->references = 1;
  --promised_, ++live_;
  return block;
}

void KvCache::release(Block* block) noexcept {
  if (--block->references > 0) return;
  free_.push_back(block);
  --live_;
}

}  // namespace tutelage
