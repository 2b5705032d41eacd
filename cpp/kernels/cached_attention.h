// Causal attention of new tokens over the keys and values that a cache holds; appends the new ones first. Rollouts: decoding is
// one row a sequence, prefill a chunk of them.
//
// Shapes   q, o [N, heads, d], k, v [N, kv_heads, d], each with its own token pitch: the new tokens of `segments` sequences,
//          one after the other, segment s in rows cu_rows[s] .. cu_rows[s + 1] at positions first_position[s] ... of it.
//          blocks[s][p / kCacheBlock] holds position p. In a block, from element `offset` on and for each kv head in turn:
//          the keys as panels [kCacheBlock / 16][d][16], the values as panels [d / 16][kCacheBlock][16]: what the tiles of
//          flash_attention read. cached_attention_elements() in all. A CUDA device has the keys as rows [kCacheBlock][d]
//          there, then the values likewise: nobody else reads a block than who filled it.
// Formula  o as flash_attention's, of the whole sequence so far.
// Order    flash_attention's: the same tiles of the same keys by the same code, so the same bits as scoring the sequence in
//          one piece, however it was cut into chunks. Slots not yet written are never read by an arithmetic that counts.
// Work     4 T heads d flops a row; reads T kv_heads 2 d elements of the cache once for a group of heads (decoding).
// Test     tests/cpp/test_cached_attention.cc.   Benchmark  bench/rollout.py.
#pragma once

#include <cstdint>

namespace tutelage {

constexpr std::int64_t kCacheBlock = 128;  // positions a block: one tile of keys, whose size is part of every bit

struct CachedAttention {
  std::int64_t heads = 0, kv_heads = 0, head_dim = 0, window = 0;  // window 0: all earlier keys
  double scale = 1.0;
  std::int64_t segments = 0;
  const std::int32_t *cu_rows = nullptr, *first_position = nullptr;
  void* const* const* blocks = nullptr;
  std::int64_t offset = 0;
  const void *q = nullptr, *k = nullptr, *v = nullptr;
  std::int64_t q_row = 0, k_row = 0, v_row = 0;
  void* o = nullptr;
  std::int64_t o_row = 0;
  // What a device cannot read from the lists before it launches (the CPU's kernels do not look): the most rows of a segment,
  // and the most positions of a sequence, its new rows included.
  std::int64_t most_rows = 0, most_positions = 0;
};

// Elements of one layer in a block.
constexpr std::int64_t cached_attention_elements(std::int64_t kv_heads, std::int64_t head_dim) {
  return kv_heads * kCacheBlock * (head_dim + (head_dim + 15) / 16 * 16);
}

}  // namespace tutelage
