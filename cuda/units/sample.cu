#include "cuda/backend.h"
#include "cuda/kernels/sample.cuh"

namespace tutelage::device {

void scale_logits(float* z, std::int64_t rows, std::int64_t vocab, const SampleSettings* settings, cudaStream_t stream) {
  cuda::scale_logits(z, rows, vocab, settings, stream);
}
void tile_statistics(const float* z, std::int64_t rows, std::int64_t vocab, cuda::TileStatistics* out, cudaStream_t stream) {
  cuda::tile_statistics_of(z, rows, vocab, out, stream);
}
void sample(const cuda::Draw& g, cudaStream_t stream) { cuda::sample(g, stream); }

}  // namespace tutelage::device
