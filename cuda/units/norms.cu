#include "cuda/backend.h"
#include "cuda/kernels/column_sum.cuh"
#include "cuda/kernels/layer_norm.cuh"
#include "cuda/kernels/rms_norm.cuh"

namespace tutelage::device {

void rms_norm(const RmsNorm& g, cudaStream_t stream) { cuda::rms_norm(g, stream); }
void rms_norm_backward(const RmsNormBackward& g, cudaStream_t stream) { cuda::rms_norm_backward(g, stream); }
void layer_norm(const LayerNorm& g, cudaStream_t stream) { cuda::layer_norm(g, stream); }
void layer_norm_backward(const LayerNormBackward& g, cudaStream_t stream) { cuda::layer_norm_backward(g, stream); }
void column_sum(const ColumnSum& g, cudaStream_t stream) { cuda::column_sum(g, stream); }

}  // namespace tutelage::device
