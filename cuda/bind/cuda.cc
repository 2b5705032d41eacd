// The Python module tutelage._cuda: the CUDA kernels on a GPU, on torch's current stream, in memory of torch's allocator.
// Imports without a driver and without torch's CUDA; a first use says what is missing. Test: tests/python/test_cuda.py.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <new>

#include "bind/device.h"
#include "bind/module.h"
#include "core/error.h"
#include "cuda/backend.h"

namespace py = pybind11;

namespace tutelage {
namespace {

// Of this thread's call. Outside of calls memory is only given back, which needs neither.
thread_local std::uintptr_t stream_of_call = 0;

py::object torch_cuda() { return py::module_::import("torch").attr("cuda"); }

}  // namespace

const Place kPlace = Place::cuda;

DeviceCall::DeviceCall() {
  const py::object stream = torch_cuda().attr("current_stream")();
  device::use_device(stream.attr("device_index").cast<int>());
  stream_of_call = stream.attr("cuda_stream").cast<std::uintptr_t>();
}
DeviceCall::~DeviceCall() { stream_of_call = 0; }

const KernelTable& table_named(const std::string& name) {
  if (!name.empty()) throw ArgumentError("there is no kernel table '" + name + "' here: the levels are the CPU's");
  return *device::table();
}
const KernelTable& table_for(const TensorView&, const std::optional<std::string>& level) {
  return table_named(level.value_or(""));
}

namespace device {

// torch's allocator knows what else of this process lies on the device, and gives its own cache back before it refuses.
void* allocate(std::size_t bytes) {
  const py::gil_scoped_acquire gil;
  const py::object cuda = torch_cuda();
  try {
    const py::object block = cuda.attr("caching_allocator_alloc")(bytes == 0 ? std::size_t{1} : bytes,
                                                                  cuda.attr("current_device")(), py::int_(stream_of_call));
    return reinterpret_cast<void*>(block.cast<std::uintptr_t>());
  } catch (const py::error_already_set& error) {
    if (error.matches(cuda.attr("OutOfMemoryError"))) throw std::bad_alloc();
    throw;
  }
}

void release(void* block) noexcept {
  if (block == nullptr || Py_IsInitialized() == 0) return;  // the process ends, and its memory with it
  const py::gil_scoped_acquire gil;
  try {
    torch_cuda().attr("caching_allocator_delete")(py::int_(reinterpret_cast<std::uintptr_t>(block)));
  } catch (py::error_already_set& error) {
    error.discard_as_unraisable("tutelage: device memory could not be given back");
  }
}

cudaStream_t current_stream() { return reinterpret_cast<cudaStream_t>(stream_of_call); }

}  // namespace device
}  // namespace tutelage

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "tutelage's CUDA kernels for NVIDIA GPUs from 8.0 on";
  m.def("problem", &tutelage::device::problem,
        "Why this machine's GPUs cannot be used, as the CUDA runtime sees it; empty where they can.");
  tutelage::bind_kernels(m);
  tutelage::bind_model(m);
}
