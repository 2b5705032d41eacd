#include "cuda/backend.h"
#include "cuda/kernels/adamw.cuh"
#include "cuda/kernels/embedding.cuh"
#include "cuda/kernels/gelu.cuh"
#include "cuda/kernels/rope.cuh"
#include "cuda/kernels/scalar_head.cuh"
#include "cuda/kernels/swiglu.cuh"
#include "cuda/kernels/total.cuh"

namespace tutelage::device {

void rope(const Rope& g, cudaStream_t stream) { cuda::rope(g, stream); }
void swiglu(const Swiglu& g, cudaStream_t stream) { cuda::swiglu(g, stream); }
void swiglu_backward(const SwigluBackward& g, cudaStream_t stream) { cuda::swiglu_backward(g, stream); }
void gelu(const Gelu& g, cudaStream_t stream) { cuda::gelu(g, stream); }
void gelu_backward(const GeluBackward& g, cudaStream_t stream) { cuda::gelu_backward(g, stream); }
void embedding(const Embedding& g, cudaStream_t stream) { cuda::embedding(g, stream); }
void embedding_backward(const EmbeddingBackward& g, cudaStream_t stream) { cuda::embedding_backward(g, stream); }
void scalar_head(const cuda::ScalarHead& g, cudaStream_t stream) { cuda::scalar_head(g, stream); }
void scalar_head_backward(const cuda::ScalarHeadBackward& g, cudaStream_t stream) { cuda::scalar_head_backward(g, stream); }
void adamw(const AdamW& g, cuda::bf16* copy, cudaStream_t stream) { cuda::adamw(g, copy, stream); }
void total(const Total& g, cudaStream_t stream) { cuda::total(g, stream); }
std::int64_t squares_parts(std::int64_t n) { return cuda::squares_parts(n); }
void sum_of_squares(const SumOfSquares& g, double* parts, cudaStream_t stream) { cuda::sum_of_squares(g, parts, stream); }

}  // namespace tutelage::device
