// Blocks per multiprocessor on an A100, an H100 and an RTX 4090, by NVIDIA's own calculator (plain C++, no GPU, no driver).
//
// Reads lines "registers threads shared_bytes" (of sm_80 or sm_90, by the argument: 80 also runs on 8.9), writes a line of
// counts for each: for 80 the A100's and the 4090's, for 90 the H100's. tools/check_cuda.py compiles and runs it.
#include <cstdio>
#include <cstring>

#include <cuda_occupancy.h>

namespace {

cudaOccDeviceProp device(int major, int minor, int threads, int shared_kilobytes, int multiprocessors) {
  cudaOccDeviceProp p;
  p.computeMajor = major, p.computeMinor = minor;
  p.maxThreadsPerBlock = 1024, p.maxThreadsPerMultiprocessor = threads, p.warpSize = 32, p.numSms = multiprocessors;
  p.regsPerBlock = p.regsPerMultiprocessor = 65536;
  p.sharedMemPerBlock = 48 * 1024, p.sharedMemPerMultiprocessor = static_cast<size_t>(shared_kilobytes) * 1024;
  p.reservedSharedMemPerBlock = 1024;
  p.sharedMemPerBlockOptin = p.sharedMemPerMultiprocessor - p.reservedSharedMemPerBlock;
  return p;
}

int blocks(const cudaOccDeviceProp& p, int registers, int threads, size_t shared) {
  cudaOccFuncAttributes f;
  f.maxThreadsPerBlock = threads, f.numRegs = registers, f.numBlockBarriers = 1;
  f.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN, f.maxDynamicSharedSizeBytes = shared;
  cudaOccDeviceState s{};
  s.carveoutConfig = SHAREDMEM_CARVEOUT_MAX_SHARED;
  cudaOccResult result{};
  const cudaOccError error = cudaOccMaxActiveBlocksPerMultiprocessor(&result, &p, &f, &s, threads, shared);
  return error == CUDA_OCC_SUCCESS ? result.activeBlocksPerMultiprocessor : -1;
}

}  // namespace

int main(int count, char** arguments) {
  const bool eighty = count > 1 && std::strcmp(arguments[1], "80") == 0;
  const cudaOccDeviceProp a100 = device(8, 0, 2048, 164, 108), h100 = device(9, 0, 2048, 228, 132),
                          rtx4090 = device(8, 9, 1536, 100, 128);
  int registers, threads;
  size_t shared;
  while (std::scanf("%d %d %zu", &registers, &threads, &shared) == 3) {
    if (eighty)
      std::printf("%d %d\n", blocks(a100, registers, threads, shared), blocks(rtx4090, registers, threads, shared));
    else
      std::printf("%d\n", blocks(h100, registers, threads, shared));
  }
}
