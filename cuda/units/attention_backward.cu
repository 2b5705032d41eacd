#include "cuda/backend.h"
#include "cuda/kernels/flash_attention_backward.cuh"

namespace tutelage::device {

std::int64_t flash_attention_backward_scratch_bytes(const AttentionBackward& g) {
  return cuda::flash_attention_backward_scratch_bytes(g);
}
void flash_attention_backward(const AttentionBackward& g, cudaStream_t stream, void* scratch) {
  cuda::flash_attention_backward(g, stream, scratch);
}

}  // namespace tutelage::device
