// Values between the lanes of a warp. All 32 lanes take part, always.
//
// PTX      shfl.sync.{bfly, idx, up, down}.b32, vote.sync.ballot.b32 (PTX ISA 6.0) with the full mask. None of them orders
//          accesses to memory: for that there is __syncwarp().
// Test     tests/simt/test_ptx.cc.
#pragma once

#include <cstdint>

#include "cuda/ptx/bf16.h"

namespace tutelage::cuda {

#if !defined(__CUDACC__)
namespace emulated {
struct Shuffle {
  std::uint32_t value, result;
  unsigned source;
};
__attribute__((no_sanitize_thread)) inline void shuffle(void* const* operands) {
  for (unsigned lane = 0; lane < 32; ++lane) {
    Shuffle* s = static_cast<Shuffle*>(operands[lane]);
    s->result = static_cast<const Shuffle*>(operands[s->source & 31])->value;
  }
}
struct Ballot {
  bool vote;
  std::uint32_t result;
};
__attribute__((no_sanitize_thread)) inline void ballot(void* const* operands) {
  std::uint32_t votes = 0;
  for (unsigned lane = 0; lane < 32; ++lane)
    votes |= static_cast<std::uint32_t>(static_cast<const Ballot*>(operands[lane])->vote) << lane;
  for (unsigned lane = 0; lane < 32; ++lane) static_cast<Ballot*>(operands[lane])->result = votes;
}
template <class T>
T shuffled(T x, unsigned source, ::simt::Place place) {
  static_assert(sizeof(T) == 4);
  Shuffle s{0, 0, source};
  __builtin_memcpy(&s.value, &x, 4);
  ::simt::collective(shuffle, &s, place);
  T r;
  __builtin_memcpy(&r, &s.result, 4);
  return r;
}
}  // namespace emulated
#endif

__device__ __forceinline__ unsigned lane_id() {
#if defined(__CUDA_ARCH__)
  return threadIdx.x & 31;  // blocks are one-dimensional or whole warps in x
#elif !defined(__CUDACC__)
  return ::simt::lane_index();
#else
  return 0;
#endif
}

// The value of lane (own ^ mask).
template <class T>
__device__ __forceinline__ T shfl_xor(T x, unsigned mask SIMT_AT) {
#if defined(__CUDA_ARCH__)
  return __shfl_xor_sync(0xFFFFFFFFu, x, static_cast<int>(mask));
#elif !defined(__CUDACC__)
  return emulated::shuffled(x, ::simt::lane_index() ^ mask, place);
#else
  return x;
#endif
}
// The value of lane `source`.
template <class T>
__device__ __forceinline__ T shfl(T x, unsigned source SIMT_AT) {
#if defined(__CUDA_ARCH__)
  return __shfl_sync(0xFFFFFFFFu, x, static_cast<int>(source));
#elif !defined(__CUDACC__)
  return emulated::shuffled(x, source, place);
#else
  return x;
#endif
}
// The value of lane own - delta; its own where there is none.
template <class T>
__device__ __forceinline__ T shfl_up(T x, unsigned delta SIMT_AT) {
#if defined(__CUDA_ARCH__)
  return __shfl_up_sync(0xFFFFFFFFu, x, delta);
#elif !defined(__CUDACC__)
  const unsigned lane = ::simt::lane_index();
  return emulated::shuffled(x, lane >= delta ? lane - delta : lane, place);
#else
  return x;
#endif
}
// The value of lane own + delta; its own where there is none.
template <class T>
__device__ __forceinline__ T shfl_down(T x, unsigned delta SIMT_AT) {
#if defined(__CUDA_ARCH__)
  return __shfl_down_sync(0xFFFFFFFFu, x, delta);
#elif !defined(__CUDACC__)
  const unsigned lane = ::simt::lane_index();
  return emulated::shuffled(x, lane + delta < 32 ? lane + delta : lane, place);
#else
  return x;
#endif
}
// Bit i: lane i's vote.
__device__ __forceinline__ std::uint32_t ballot(bool vote SIMT_AT) {
#if defined(__CUDA_ARCH__)
  return __ballot_sync(0xFFFFFFFFu, vote);
#elif !defined(__CUDACC__)
  emulated::Ballot b{vote, 0};
  ::simt::collective(emulated::ballot, &b, place);
  return b.result;
#else
  return vote;
#endif
}

}  // namespace tutelage::cuda
