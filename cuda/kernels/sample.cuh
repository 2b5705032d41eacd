// The next token of every row and its log-prob from scaled logits, as cpp/kernels/sample.h states it: the same draws as the
// CPU's.
//
// Shapes   z [rows, vocab] float, statistics [rows, tiles] of it (from linear_logprob's tile pass, or tile_statistics_of here),
//          settings [rows] in device memory; tokens int32 [rows], -1 where none could be drawn; logprob, support_logprob float
//          [rows].
// Order    maxima, sums and the log-prob: the CPU's, bit for bit, given the same z. The one difference: the sums that decide
//          where top_p cuts are taken in another order (fixed by vocab alone), so a token whose rank by probability is within
//          a rounding of the cut may fall on the other side of it than on the CPU.
// How      a block a row. The cuts (top_k, top_p) are found by search over the floats' order: a pass over z counts for seven
//          thresholds at once, 11 passes decide all 32 bits; no sorting, no memory beyond z.
// Work     reads z once (4 bytes a token of the vocabulary); with cuts up to 23 times, from cache.
// Test     tests/simt/test_sample.cc.
#pragma once

#include <cstdint>

#include "cuda/kernels/arguments.h"
#include "cuda/kernels/philox.cuh"
#include "cuda/kernels/vocab_tiles.cuh"
#include "kernels/sample.h"

namespace tutelage::cuda {

constexpr int kSampleThreads = 512, kSampleWarps = kSampleThreads / 32;
constexpr int kThresholds = 7;  // of a pass: 3 bits of 32

constexpr float kMinusInfinity = -__builtin_inff();

// Element `element` of a row's stream of Gumbel variates.
__device__ __forceinline__ float gumbel(std::uint64_t key, std::uint32_t position, std::uint32_t stream,
                                        std::uint32_t element) {
  const PhiloxWords draw = philox(key, {{position, element / 4, stream, 0}});
  const std::uint32_t word = element % 4 == 0 ? draw[0] : element % 4 == 1 ? draw[1] : element % 4 == 2 ? draw[2] : draw[3];
  const float u = (static_cast<float>(word) + 0.5f) * 0x1p-32f;
  const float v = smaller(u, 1.0f - 0x1p-24f), rest = 1.0f - v, lost = 1.0f - rest;
  const float exact = 0.0f < lost ? (0.0f - logarithm(rest)) * v / lost : v;  // log1p, however small v is
  return 0.0f - logarithm(exact);
}

struct Candidate {
  float value;
  int32_t index;  // -1: none
};
__device__ __forceinline__ Candidate better(const Candidate& a, const Candidate& b) {  // of equals the smaller index
  if (b.index < 0) return a;
  if (a.index < 0) return b;
  return b.value > a.value || (b.value == a.value && b.index < a.index) ? b : a;
}
// Of the whole block; every thread gets it. shared: kSampleWarps candidates.
__device__ __forceinline__ Candidate block_best(Candidate c, Candidate* shared) {
  SIMT_UNROLL
  for (unsigned mask = 16; mask > 0; mask /= 2) c = better(c, {shfl_xor(c.value, mask), shfl_xor(c.index, mask)});
  __syncthreads();
  if (lane_id() == 0) st_shared(shared + threadIdx.x / 32, c);
  __syncthreads();
  c = ld_shared(shared);
  for (int i = 1; i < kSampleWarps; ++i) c = better(c, ld_shared(shared + i));
  return c;
}

// The block's sums of kThresholds numbers a thread; every thread gets them.
__device__ __forceinline__ void block_sums(float (&x)[kThresholds], float* shared) {
  SIMT_UNROLL
  for (int i = 0; i < kThresholds; ++i) {
    SIMT_UNROLL
    for (unsigned mask = 16; mask > 0; mask /= 2) x[i] = x[i] + shfl_xor(x[i], mask);
  }
  __syncthreads();
  SIMT_UNROLL
  for (int i = 0; i < kThresholds; ++i)
    if (lane_id() == 0) st_shared(shared + i * kSampleWarps + threadIdx.x / 32, x[i]);
  __syncthreads();
  SIMT_UNROLL
  for (int i = 0; i < kThresholds; ++i) {
    x[i] = 0;
    for (int w = 0; w < kSampleWarps; ++w) x[i] = x[i] + ld_shared(shared + i * kSampleWarps + w);
  }
}

// Floats as whole numbers in the same order.
__device__ __forceinline__ int64_t rank_of(float x) {
  const auto bits = static_cast<std::int32_t>(as_bits(x));
  return bits < 0 ? -int64_t(static_cast<std::uint32_t>(bits) & 0x7FFFFFFFu) : bits;
}
__device__ __forceinline__ float float_at(int64_t rank) {
  return as_float(rank < 0 ? 0x80000000u | static_cast<std::uint32_t>(-rank) : static_cast<std::uint32_t>(rank));
}

// The largest float f at which summands(f), added over the row, reach `enough`; they do at `low`, and the sum falls as f rises.
// term(j, z_j): what element j adds where z_j >= f.
template <class Term>
__device__ __forceinline__ float last_float(const float* z, int64_t vocab, float low, float high, float enough, Term term,
                                            float* shared) {
  int64_t from = rank_of(low), to = rank_of(high) + 1;  // the sum at `from` is enough, at `to` not
  while (to - from > 1) {
    int64_t middle[kThresholds];
    float threshold[kThresholds], sums[kThresholds] = {};
    SIMT_UNROLL
    for (int i = 0; i < kThresholds; ++i) {
      middle[i] = from + (to - from) * (i + 1) / (kThresholds + 1);
      threshold[i] = float_at(middle[i]);
    }
    for (int64_t j = threadIdx.x; j < vocab; j += kSampleThreads) {
      const float x = ld_global(z + j), own = term(x);
      SIMT_UNROLL
      for (int i = 0; i < kThresholds; ++i) sums[i] = sums[i] + (x >= threshold[i] ? own : 0.0f);
    }
    block_sums(sums, shared);
    int64_t next = to;
    SIMT_UNROLL
    for (int i = 0; i < kThresholds; ++i) {
      if (sums[i] >= enough)
        from = middle[i] > from ? middle[i] : from;
      else
        next = middle[i] < next ? middle[i] : next;
    }
    to = next;
  }
  return float_at(from);
}

static __global__ void __launch_bounds__(kSampleThreads, 1) sample_kernel(const Draw g) {
  const int64_t tiles = (g.vocab + kVocabTile - 1) / kVocabTile;
  const int64_t row = blockIdx.x;
  // shared memory: [0, 8) numbers of the row · sums of a search · candidates · sums and maxima of the tiles
  float* numbers = dyn_smem<float>();
  float* partial = numbers + 8;
  auto* candidates = reinterpret_cast<Candidate*>(partial + kThresholds * kSampleWarps);
  float *sums = reinterpret_cast<float*>(candidates + kSampleWarps), *tops = sums + tiles;
  const float none = kMinusInfinity;
  const float* z = g.z + row * g.vocab;
  const TileStatistics* own = g.statistics + row * tiles;
  const SampleSettings* s = g.settings + row;

  if (threadIdx.x == 0) {
    float top, log_sum, entropy;
    merge_tiles(own, tiles, &top, &log_sum, &entropy);
    st_shared(numbers, top), st_shared(numbers + 1, log_sum);
  }
  __syncthreads();
  const float top = ld_shared(numbers), log_sum = ld_shared(numbers + 1);
  const double temperature = ld_global(&s->temperature), top_p = ld_global(&s->top_p), min_p = ld_global(&s->min_p);
  const int64_t top_k = ld_global(&s->top_k);
  const std::uint64_t key = ld_global(&s->key);
  const std::uint32_t position = ld_global(&s->position);

  int32_t token = -1;
  float support_sum = log_sum;
  if (!(top - top == 0.0f && log_sum - log_sum == 0.0f)) {
    // no logit of a row with a NaN is drawn; all threads agree
  } else if (temperature <= 0) {
    Candidate best{0, -1};  // the smallest index at the row's maximum
    for (int64_t j = threadIdx.x; j < g.vocab; j += kSampleThreads)
      if (ld_global(z + j) == top) best = better(best, {top, static_cast<int32_t>(j)});
    token = block_best(best, candidates).index;
  } else {
    const bool cut = top_k > 0 || top_p < 1.0 || min_p > 0.0;
    float floor = none;
    if (cut) {
      // minus the smallest logit, as the largest of their negatives
      Candidate most{0, -1};
      for (int64_t j = threadIdx.x; j < g.vocab; j += kSampleThreads)
        most = better(most, {0.0f - ld_global(z + j), static_cast<int32_t>(j)});
      const float lowest = ld_global(z + block_best(most, candidates).index);
      if (top_k > 0 && top_k < g.vocab)
        floor = last_float(z, g.vocab, lowest, top, static_cast<float>(top_k), [](float) { return 1.0f; }, partial);
      if (top_p < 1.0) {
        auto probability = [top](float x) { return exponential(x - top); };
        const float kept = floor > lowest ? floor : lowest;
        float all[kThresholds] = {};
        for (int64_t j = threadIdx.x; j < g.vocab; j += kSampleThreads) {
          const float x = ld_global(z + j);
          all[0] = all[0] + (x >= kept ? probability(x) : 0.0f);
        }
        block_sums(all, partial);
        floor = last_float(z, g.vocab, kept, top, static_cast<float>(top_p) * all[0], probability, partial);
      }
      if (min_p > 0.0) {
        const float least = top + logarithm(static_cast<float>(min_p));
        floor = least > floor ? least : floor;
      }
    }
    // The support's share of each tile: half a warp a tile, as tile_statistics adds.
    constexpr int kTogether = kSampleThreads / kTileLanes;
    const int half = static_cast<int>(threadIdx.x) / kTileLanes, lane = static_cast<int>(threadIdx.x) % kTileLanes;
    for (int64_t t0 = 0; t0 < tiles; t0 += kTogether) {
      const int64_t t = t0 + half;
      float sum = t < tiles ? ld_global(&own[t].sum) : 0, peak = t < tiles ? ld_global(&own[t].top) : 0;
      if (cut) {
        float part = 0;
        for (int i = 0; i < kTileLinks; ++i) {
          const int64_t j = t * kVocabTile + i * kTileLanes + lane;
          if (t < tiles && j < g.vocab) {
            const float x = ld_global(z + j);
            part = part + (x < floor ? 0.0f : exponential(x - peak));
          }
        }
        sum = half_warp_sum(part);
        if (peak < floor) sum = 1, peak = none;  // log 1 + minus infinity: never the largest
      }
      if (lane == 0 && t < tiles) st_shared(sums + t, sum), st_shared(tops + t, peak);
    }
    __syncthreads();
    if (cut) {
      if (threadIdx.x == 0) {
        float cut_sum = 0;
        for (int64_t t = 0; t < tiles; ++t)
          if (ld_shared(tops + t) > none) cut_sum = fma(ld_shared(sums + t), exponential(ld_shared(tops + t) - top), cut_sum);
        st_shared(numbers + 2, logarithm(cut_sum));
      }
      __syncthreads();
      support_sum = ld_shared(numbers + 2);
    }
    // Gumbel-max over the tiles, then within the tile.
    Candidate best{0, -1};
    for (int64_t t = threadIdx.x; t < tiles; t += kSampleThreads) {
      const float noisy =
          (logarithm(ld_shared(sums + t)) + ld_shared(tops + t)) + gumbel(key, position, 0, static_cast<std::uint32_t>(t));
      if (noisy > none) best = better(best, {noisy, static_cast<int32_t>(t)});
    }
    const int32_t tile = block_best(best, candidates).index;
    if (tile >= 0) {
      best = {0, -1};
      const int64_t j = int64_t(tile) * kVocabTile + threadIdx.x;
      if (threadIdx.x < kVocabTile && j < g.vocab) {
        const float x = ld_global(z + j);
        const float noisy = (x < floor ? none : x) + gumbel(key, position, static_cast<std::uint32_t>(1 + tile), threadIdx.x);
        if (noisy > none) best = {noisy, static_cast<int32_t>(j)};
      }
      token = block_best(best, candidates).index;
    }
  }
  if (threadIdx.x == 0) {
    const float logit = token < 0 ? 0.0f : ld_global(z + token);
    st_global(g.tokens + row, token);
    st_global(g.logprob + row, token < 0 ? none : (logit - top) - log_sum);
    st_global(g.support_logprob + row, token < 0 ? none : (logit - top) - support_sum);
  }
}

// z [rows, vocab] divided by each row's temperature, as linear_logprob divides: by a factor rounded once. Rows at 1 and greedy
// ones (which are drawn at 1) stay.
static __global__ void __launch_bounds__(256) scale_logits_kernel(float* z, int64_t vocab, const SampleSettings* settings) {
  const double temperature = ld_global(&settings[blockIdx.y].temperature);
  if (!(temperature > 0) || temperature == 1) return;  // the whole block
  const float inverse = static_cast<float>(1 / temperature);
  const int64_t j = int64_t(blockIdx.x) * 256 + threadIdx.x;
  float* at = z + int64_t(blockIdx.y) * vocab + j;
  if (j < vocab) st_global(at, ld_global(at) * inverse);
}

inline void scale_logits(float* z, int64_t rows, int64_t vocab, const SampleSettings* settings, cudaStream_t stream) {
  launch(scale_logits_kernel, dim3(static_cast<unsigned>((vocab + 255) / 256), static_cast<unsigned>(rows)), dim3(256), 0,
         stream, z, vocab, settings);
}

// Throws std::invalid_argument for a vocabulary whose tiles do not fit shared memory (3.2 million tokens).
inline void sample(const Draw& g, cudaStream_t stream) {
  const std::size_t bytes = (8 + kThresholds * kSampleWarps) * sizeof(float) + kSampleWarps * sizeof(Candidate) +
                            2 * static_cast<std::size_t>(vocab_tiles(g.vocab)) * sizeof(float);
  if (bytes > 99 * 1024) throw std::invalid_argument("sample: the vocabulary of " + std::to_string(g.vocab) + " is too large");
  launch(sample_kernel, dim3(static_cast<unsigned>(g.rows)), dim3(kSampleThreads), bytes, stream, g);
}

}  // namespace tutelage::cuda
