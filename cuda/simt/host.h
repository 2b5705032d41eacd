// What the host does with device memory, in the order of a stream. On the emulator memory is memory, and all is done at once.
#pragma once

#include <cstddef>
#include <cstring>

#include "cuda/simt/simt.h"

namespace tutelage::cuda {

#if defined(__CUDACC__)

inline void copy(void* to, const void* from, std::size_t bytes, cudaStream_t stream) {
  check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream), "a copy on the device failed");
}
// The host may change its memory afterwards: the runtime has taken pageable memory over when it returns.
inline void upload(void* to, const void* from, std::size_t bytes, cudaStream_t stream) {
  check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, stream), "a copy to the device failed");
}
// Waits for the stream.
inline void download(void* to, const void* from, std::size_t bytes, cudaStream_t stream) {
  check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, stream), "a copy from the device failed");
  check(cudaStreamSynchronize(stream), "a kernel failed");
}
inline void zero(void* to, std::size_t bytes, cudaStream_t stream) {
  check(cudaMemsetAsync(to, 0, bytes, stream), "device memory could not be set to zero");
}

#else

inline void copy(void* to, const void* from, std::size_t bytes, cudaStream_t) { std::memcpy(to, from, bytes); }
inline void upload(void* to, const void* from, std::size_t bytes, cudaStream_t) { std::memcpy(to, from, bytes); }
inline void download(void* to, const void* from, std::size_t bytes, cudaStream_t) { std::memcpy(to, from, bytes); }
inline void zero(void* to, std::size_t bytes, cudaStream_t) { std::memset(to, 0, bytes); }

#endif

}  // namespace tutelage::cuda
