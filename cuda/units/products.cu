// Both in one unit: the second is made of the first, whose kernels are compiled once.
#include "cuda/backend.h"
#include "cuda/kernels/linear_logprob.cuh"
#include "cuda/kernels/matmul.cuh"

namespace tutelage::device {

void matmul(const Matmul& g, cudaStream_t stream) { cuda::matmul(g, stream); }

std::int64_t linear_logprob_scratch_bytes(const LinearLogprob& g) { return cuda::linear_logprob_scratch_bytes(g); }
void linear_logprob(const LinearLogprob& g, cudaStream_t stream, void* scratch) { cuda::linear_logprob(g, stream, scratch); }
std::int64_t linear_logprob_backward_scratch_bytes(const LinearLogprobBackward& g) {
  return cuda::linear_logprob_backward_scratch_bytes(g);
}
void linear_logprob_backward(const LinearLogprobBackward& g, cudaStream_t stream, void* scratch) {
  cuda::linear_logprob_backward(g, stream, scratch);
}

}  // namespace tutelage::device
