// Tensors from Python, borrowed: anything with __dlpack__ (torch, numpy, jax) seen as a TensorView, nothing copied.
//
// The structs are DLPack's C ABI, unversioned form (the "dltensor" capsule, https://dmlc.github.io/dlpack/latest/c_api.html),
// declared here because they are all of DLPack that is needed. Test: tests/python/test_core.py.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <string>

#include "core/error.h"
#include "core/tensor.h"

namespace py = pybind11;

namespace tutelage {

namespace dlpack {

struct Device {
  std::int32_t type, id;
};
struct DataType {
  std::uint8_t code, bits;
  std::uint16_t lanes;
};
struct Tensor {
  void* data;
  Device device;
  std::int32_t rank;
  DataType dtype;
  std::int64_t* shape;
  std::int64_t* strides;  // in elements; null: contiguous
  std::uint64_t byte_offset;
};
struct ManagedTensor {
  Tensor tensor;
  void* context;
  void (*deleter)(ManagedTensor*);
};
constexpr std::int32_t kCpu = 1, kCuda = 2;
constexpr std::uint8_t kInt = 0, kFloat = 2, kBfloat = 4, kBool = 6;

}  // namespace dlpack

// One tensor argument of a call. Created and destroyed with the GIL held; `view` may be used without it in between.
class TensorArgument {
 public:
  TensorArgument(py::handle tensor, const std::string& name);

  TensorView view;

  template <class T>
  T* data() const {
    return static_cast<T*>(view.data);
  }
  std::int64_t extent(std::size_t axis) const { return view.shape[axis]; }

 private:
  struct Deleter {
    void operator()(dlpack::ManagedTensor* managed) const noexcept {
      if (managed->deleter != nullptr) managed->deleter(managed);
    }
  };
  std::unique_ptr<dlpack::ManagedTensor, Deleter> owner_;
};

}  // namespace tutelage
