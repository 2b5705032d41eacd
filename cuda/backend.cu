#include "cuda/backend.h"

#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/simt/host.h"

namespace tutelage::device {
namespace {

// Scratch memory for one call. The allocator hands a block out again in the order of the stream, so nobody waits.
template <class T>
class Scratch {
 public:
  explicit Scratch(std::int64_t n) : data_(allocate(static_cast<std::size_t>(n) * sizeof(T))) {}
  ~Scratch() { release(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* get() const { return static_cast<T*>(data_); }

 private:
  void* data_;
};

// A kernel as the table has it: on the call's stream. The number of threads is the CPU's affair.
template <class Arguments, void (*kernel)(const Arguments&, cudaStream_t)>
void on_stream(const Arguments& g, int) {
  kernel(g, current_stream());
}

// The same for a kernel that needs scratch memory.
template <class Arguments, std::int64_t (*bytes)(const Arguments&), void (*kernel)(const Arguments&, cudaStream_t, void*)>
void with_scratch(const Arguments& g, int) {
  const std::int64_t n = bytes(g);
  if (n == 0) return kernel(g, current_stream(), nullptr);
  const Scratch<char> scratch(n);
  kernel(g, current_stream(), scratch.get());
}

// What the engine writes as products with one row or one column of another type: the scalar head.
void scalar_head_of(const Matmul& g, cudaStream_t stream) {
  cuda::ScalarHead head;
  head.tokens = g.m, head.d = g.k;
  head.hidden = static_cast<const cuda::bf16*>(g.a), head.row = g.a_row;
  head.weight = static_cast<const cuda::bf16*>(g.b), head.values = static_cast<float*>(g.c);
  scalar_head(head, stream);
}
void scalar_head_backward_of(const Matmul& g, cudaStream_t stream) {
  cuda::ScalarHeadBackward back;
  back.d_values = static_cast<const float*>(g.a), back.d = g.n;
  if (g.c_state) {  // d_weight [1, d] += d_values^T hidden
    if (!g.accumulate) cuda::zero(g.c, static_cast<std::size_t>(g.n) * sizeof(float), stream);
    back.tokens = g.k, back.hidden = static_cast<const cuda::bf16*>(g.b), back.row = g.b_row;
    back.d_weight = static_cast<float*>(g.c);
  } else {  // d_hidden = d_values weight
    back.tokens = g.m, back.weight = static_cast<const cuda::bf16*>(g.b);
    back.d_hidden = static_cast<cuda::bf16*>(g.c), back.row = g.c_row;
  }
  scalar_head_backward(back, stream);
}

void run_matmul(const Matmul& g, int) {
  if (g.a_state)
    scalar_head_backward_of(g, current_stream());
  else if (g.n == 1 && g.c_state)
    scalar_head_of(g, current_stream());
  else
    matmul(g, current_stream());
}

// The logits by the same product that scores, so that a token's log-prob has score's bits; then the draw.
void run_sample(const Sample& g, int) {
  const cudaStream_t stream = current_stream();
  Matmul logits;
  logits.m = g.rows, logits.n = g.vocab, logits.k = g.hidden;
  logits.a = g.x, logits.a_row = g.hidden, logits.b = g.weight, logits.b_row = 1, logits.b_col = g.hidden;
  logits.c = g.z, logits.c_row = g.vocab, logits.c_state = true;
  matmul(logits, stream);
  auto* z = static_cast<float*>(g.z);
  scale_logits(z, g.rows, g.vocab, g.settings, stream);
  constexpr std::int64_t kTile = 256;  // kVocabTile: part of every bit (cpp/kernels/linear_logprob.h)
  const Scratch<cuda::TileStatistics> statistics(g.rows * ((g.vocab + kTile - 1) / kTile));
  tile_statistics(z, g.rows, g.vocab, statistics.get(), stream);
  cuda::Draw draw;
  draw.rows = g.rows, draw.vocab = g.vocab, draw.z = z, draw.statistics = statistics.get(), draw.settings = g.settings;
  draw.tokens = g.tokens, draw.logprob = static_cast<float*>(g.logprob);
  draw.support_logprob = static_cast<float*>(g.support_logprob);
  sample(draw, stream);
}

void run_adamw(const AdamW& g, int) { adamw(g, static_cast<cuda::bf16*>(g.copy), current_stream()); }

// Its result is the host's: waits.
void run_sum_of_squares(const SumOfSquares& g, int) {
  const cudaStream_t stream = current_stream();
  const std::int64_t parts = squares_parts(g.n);
  const Scratch<double> scratch(parts + 1);
  SumOfSquares on_device = g;
  on_device.out = scratch.get() + parts;
  sum_of_squares(on_device, scratch.get(), stream);
  cuda::download(g.out, on_device.out, sizeof(double), stream);
}

void run_copy(void* to, const void* from, std::size_t bytes) { cuda::copy(to, from, bytes, current_stream()); }
void run_zero(void* to, std::size_t bytes) { cuda::zero(to, bytes, current_stream()); }
void run_upload(void* to, const void* from, std::size_t bytes) { cuda::upload(to, from, bytes, current_stream()); }
void run_download(void* to, const void* from, std::size_t bytes) { cuda::download(to, from, bytes, current_stream()); }

void from_float(void* to, const float* from, std::int64_t n) {
  run_upload(to, from, static_cast<std::size_t>(n) * sizeof(float));
}
void to_double(double* to, const void* from, std::int64_t n) {
  std::vector<float> numbers(static_cast<std::size_t>(n));
  run_download(numbers.data(), from, numbers.size() * sizeof(float));
  for (std::size_t i = 0; i < numbers.size(); ++i) to[i] = numbers[i];
}

}  // namespace

#if defined(__CUDACC__)
void use_device(int index) { cuda::check(cudaSetDevice(index), "the CUDA device cannot be used"); }

std::string problem() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaErrorInsufficientDriver) {
    int driver = 0, runtime = 0;
    cudaDriverGetVersion(&driver), cudaRuntimeGetVersion(&runtime);
    if (driver == 0) return "there is no NVIDIA driver";
    return "the NVIDIA driver is too old: it is for CUDA " + std::to_string(driver / 1000) + "." +
           std::to_string(driver % 1000 / 10) + ", and this build needs CUDA " + std::to_string(runtime / 1000) + "." +
           std::to_string(runtime % 1000 / 10);
  }
  if (error != cudaSuccess) return cudaGetErrorString(error);
  if (count == 0) return "there is no NVIDIA GPU";
  int device = 0, major = 0;
  cuda::check(cudaGetDevice(&device), "cudaGetDevice");
  cuda::check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute");
  if (major < 8) return "the GPU is too old: compute capability 8.0 (A100) or later is needed";
  return "";
}
#endif

const KernelTable* table() {
  static const KernelTable table = [] {
    KernelTable t{};
    t.name = "cuda", t.activation_size = 2, t.state_size = 4;
    t.matmul = run_matmul;
    t.flash_attention = on_stream<Attention, flash_attention>;
    t.flash_attention_backward =
        with_scratch<AttentionBackward, flash_attention_backward_scratch_bytes, flash_attention_backward>;
    t.rms_norm = on_stream<RmsNorm, rms_norm>;
    t.rms_norm_backward = on_stream<RmsNormBackward, rms_norm_backward>;
    t.layer_norm = on_stream<LayerNorm, layer_norm>;
    t.layer_norm_backward = on_stream<LayerNormBackward, layer_norm_backward>;
    t.column_sum = on_stream<ColumnSum, column_sum>;
    t.rope = on_stream<Rope, rope>;
    t.swiglu = on_stream<Swiglu, swiglu>;
    t.swiglu_backward = on_stream<SwigluBackward, swiglu_backward>;
    t.gelu = on_stream<Gelu, gelu>;
    t.gelu_backward = on_stream<GeluBackward, gelu_backward>;
    t.embedding = on_stream<Embedding, embedding>;
    t.embedding_backward = on_stream<EmbeddingBackward, embedding_backward>;
    t.linear_logprob = with_scratch<LinearLogprob, linear_logprob_scratch_bytes, linear_logprob>;
    t.linear_logprob_backward =
        with_scratch<LinearLogprobBackward, linear_logprob_backward_scratch_bytes, linear_logprob_backward>;
    t.cached_attention = with_scratch<CachedAttention, cached_attention_scratch_bytes, cached_attention>;
    t.sample = run_sample;
    t.adamw = run_adamw;
    t.total = on_stream<Total, total>;
    t.sum_of_squares = run_sum_of_squares;
    // pack_weight, fma_peak, read_sweep: none. Products read the plain weights; ceilings are bench/gpu.py's affair.
    t.allocate = allocate, t.release = release;
    t.copy = run_copy, t.zero = run_zero, t.upload = run_upload, t.download = run_download;
    t.from_float = from_float, t.to_double = to_double;
    return t;
  }();
  return &table;
}

}  // namespace tutelage::device
