#include "cuda/backend.h"
#include "cuda/kernels/cached_attention.cuh"
#include "cuda/kernels/flash_attention.cuh"

namespace tutelage::device {

void flash_attention(const Attention& g, cudaStream_t stream) { cuda::flash_attention(g, stream); }
std::int64_t cached_attention_scratch_bytes(const CachedAttention& g) { return cuda::cached_attention_scratch_bytes(g); }
void cached_attention(const CachedAttention& g, cudaStream_t stream, void* scratch) {
  cuda::cached_attention(g, stream, scratch);
}

}  // namespace tutelage::device
