// The CUDA kernels' entry points, one an operation: what the kernel table of a device calls. Arguments as cpp/kernels/<op>.h
// states them, activations and weights bf16, statistics, gradients of parameters and optimizer state float, all in device
// memory. Nothing waits; nothing is allocated.
//
// Each is defined in one file of cuda/units/, which nvcc compiles for GPUs (module _cuda) and g++ for the emulator (_cuda_sim).
#pragma once

#include <string>

#include "cuda/kernels/arguments.h"
#include "cuda/ptx/bf16.h"
#include "cuda/simt/simt.h"
#include "kernels/adamw.h"
#include "kernels/cached_attention.h"
#include "kernels/column_sum.h"
#include "kernels/embedding.h"
#include "kernels/flash_attention.h"
#include "kernels/gelu.h"
#include "kernels/layer_norm.h"
#include "kernels/linear_logprob.h"
#include "kernels/matmul.h"
#include "kernels/rms_norm.h"
#include "kernels/rope.h"
#include "kernels/swiglu.h"
#include "kernels/table.h"
#include "kernels/total.h"

namespace tutelage::device {

// The kernel table made of them (cuda/backend.cu): what cpp/engine computes with.
const KernelTable* table();

// Which GPU this thread's calls mean, and why none can be used (empty: one can). Not on the emulator.
void use_device(int index);
std::string problem();

// What a module brings (cuda/bind/): device memory, and the stream of the call that this thread is in.
void* allocate(std::size_t bytes);
void release(void* block) noexcept;
cudaStream_t current_stream();

void rms_norm(const RmsNorm& g, cudaStream_t stream);
void rms_norm_backward(const RmsNormBackward& g, cudaStream_t stream);
void layer_norm(const LayerNorm& g, cudaStream_t stream);
void layer_norm_backward(const LayerNormBackward& g, cudaStream_t stream);
void column_sum(const ColumnSum& g, cudaStream_t stream);

void rope(const Rope& g, cudaStream_t stream);
void swiglu(const Swiglu& g, cudaStream_t stream);
void swiglu_backward(const SwigluBackward& g, cudaStream_t stream);
void gelu(const Gelu& g, cudaStream_t stream);
void gelu_backward(const GeluBackward& g, cudaStream_t stream);
void embedding(const Embedding& g, cudaStream_t stream);
void embedding_backward(const EmbeddingBackward& g, cudaStream_t stream);

// scratch: as many bytes of device memory as asked for (0: null will do), aligned to 16 bytes, for this call alone.
void matmul(const Matmul& g, cudaStream_t stream);
std::int64_t linear_logprob_scratch_bytes(const LinearLogprob& g);
void linear_logprob(const LinearLogprob& g, cudaStream_t stream, void* scratch);
std::int64_t linear_logprob_backward_scratch_bytes(const LinearLogprobBackward& g);
void linear_logprob_backward(const LinearLogprobBackward& g, cudaStream_t stream, void* scratch);
// head_dim: a multiple of 8 up to 128, else std::invalid_argument. Pitches are multiples of 8, pointers of 16 bytes. Read on
// the host: the shape's tokens and longest, a cache's most_rows and most_positions; the lists lie in device memory.
void flash_attention(const Attention& g, cudaStream_t stream);
std::int64_t flash_attention_backward_scratch_bytes(const AttentionBackward& g);
void flash_attention_backward(const AttentionBackward& g, cudaStream_t stream, void* scratch);
std::int64_t cached_attention_scratch_bytes(const CachedAttention& g);
void cached_attention(const CachedAttention& g, cudaStream_t stream, void* scratch);

void scalar_head(const cuda::ScalarHead& g, cudaStream_t stream);
void scalar_head_backward(const cuda::ScalarHeadBackward& g, cudaStream_t stream);

void adamw(const AdamW& g, cuda::bf16* copy, cudaStream_t stream);
void total(const Total& g, cudaStream_t stream);
std::int64_t squares_parts(std::int64_t n);
void sum_of_squares(const SumOfSquares& g, double* parts, cudaStream_t stream);

void scale_logits(float* z, std::int64_t rows, std::int64_t vocab, const SampleSettings* settings, cudaStream_t stream);
void tile_statistics(const float* z, std::int64_t rows, std::int64_t vocab, cuda::TileStatistics* out, cudaStream_t stream);
void sample(const cuda::Draw& g, cudaStream_t stream);

}  // namespace tutelage::device
