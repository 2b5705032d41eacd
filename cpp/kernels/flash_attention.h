// Causal attention over packed sequences, tile by tile, without the [T, T] matrix.
//
// Shapes   q, o [N, heads, d], k, v [N, kv_heads, d], each with its own token pitch; lse [N, heads]. Sequence s holds tokens
//          cu_seqlens[s] .. cu_seqlens[s + 1]. Query head h reads kv head h / (heads / kv_heads). d: any multiple of 8.
// Formula  o_i = sum_j p_ij v_j, p_ij = exp(scale q_i.k_j - lse_i), over j <= i (causal) and j > i - window (window > 0).
//          Dao 2023, arXiv 2307.08691.
//          backward: dv_j = sum_i p_ij do_i;  ds_ij = p_ij (do_i.v_j - do_i.o_i);  dq_i = scale sum_j ds_ij k_j;
//          dk_j = scale sum_i ds_ij q_i
// Order    q.k: one chain over d. Keys are walked in tiles of kKeyTile counted from position 0 of the sequence; within a tile
//          the sum of p is taken in 16 lanes and a fixed tree, p v in one chain over ascending keys; between tiles both are
//          rescaled by exp(old maximum - new maximum). A row depends on its own position and its own sequence only: not on the
//          query tile it was in, not on the rows beside it, so one query at a time (decoding) gives the same bits. Masked keys
//          enter as exactly 0; nothing of another sequence is ever read.
//          dk, dv: one chain over (query head of the group, query); dq: one chain over keys. The backward goes once over
//          the tiles where (sequence, kv head) tasks are >= 4 a thread, in two passes (dk and dv; dq) where they are fewer:
//          the same chains, the same bits.
// Work     forward 2 T^2 heads d flops a causal sequence; backward 5 products (7 in two passes) for the forward's 2.
//          Packs k and v (backward: also q and do) into panels: that much scratch.
// Test     tests/cpp/test_flash_attention.cc, tests/python/test_kernels.py.   Benchmark  bench/kernels.py (flash_attention).
#pragma once

#include <cstdint>

namespace tutelage {

struct AttentionShape {
  std::int64_t sequences = 0;
  const std::int32_t* cu_seqlens = nullptr;  // [sequences + 1]
  std::int64_t heads = 0, kv_heads = 0, head_dim = 0;
  bool causal = true;
  std::int64_t window = 0;  // 0: all earlier keys
  double scale = 1.0;
  // What a device cannot read from cu_seqlens before it launches (the CPU's kernels do not look): all tokens, and those of the
  // longest sequence.
  std::int64_t tokens = 0, longest = 0;
};

struct Attention {
  AttentionShape shape;
  const void *q = nullptr, *k = nullptr, *v = nullptr;
  std::int64_t q_row = 0, k_row = 0, v_row = 0;
  void* o = nullptr;
  std::int64_t o_row = 0;
  void* lse = nullptr;
};

struct AttentionBackward {
  AttentionShape shape;
  const void *q = nullptr, *k = nullptr, *v = nullptr;
  std::int64_t q_row = 0, k_row = 0, v_row = 0;
  const void *o = nullptr, *lse = nullptr, *d_o = nullptr;
  std::int64_t o_row = 0, d_o_row = 0;
  void *dq = nullptr, *dk = nullptr, *dv = nullptr;
  std::int64_t dq_row = 0, dk_row = 0, dv_row = 0;
};

}  // namespace tutelage
