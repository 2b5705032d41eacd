// The Python module tutelage._cuda_sim: the CUDA kernels on the emulator, in the CPU's memory. Test:
// tests/python/test_cuda_sim.py.
#include <pybind11/pybind11.h>

#include <cstring>

#include "bind/device.h"
#include "bind/module.h"
#include "core/error.h"
#include "core/memory.h"
#include "cuda/backend.h"

namespace tutelage {

const Place kPlace = Place::cpu;
DeviceCall::DeviceCall() = default;
DeviceCall::~DeviceCall() = default;

const KernelTable& table_named(const std::string& name) {
  if (!name.empty()) throw ArgumentError("there is no kernel table '" + name + "' here: the levels are the CPU's");
  return *device::table();
}
const KernelTable& table_for(const TensorView&, const std::optional<std::string>& level) {
  return table_named(level.value_or(""));
}

namespace device {

// Full of NaN, as an emulated GPU's memory is (docs/cuda.md): what a kernel reads before anything wrote it does not stay
// hidden.
void* allocate(std::size_t bytes) {
  void* block = acquire_memory(bytes);
  std::memset(block, 0xFF, bytes);
  return block;
}
void release(void* block) noexcept { release_memory(block); }
cudaStream_t current_stream() { return nullptr; }

}  // namespace device
}  // namespace tutelage

PYBIND11_MODULE(_cuda_sim, m) {
  m.doc() = "tutelage's CUDA kernels, run by an emulator on the CPU: exact and slow";
  tutelage::bind_memory(m);
  tutelage::bind_kernels(m);
  tutelage::bind_model(m);
}
