#include "bind/dlpack.h"

namespace tutelage {
namespace {

DType dtype_of(const dlpack::DataType& type) {
  if (type.lanes != 1) return DType::other;
  if (type.code == dlpack::kFloat && type.bits == 32) return DType::float32;
  if (type.code == dlpack::kFloat && type.bits == 64) return DType::float64;
  if (type.code == dlpack::kBfloat && type.bits == 16) return DType::bfloat16;
  if (type.code == dlpack::kInt && type.bits == 32) return DType::int32;
  if (type.code == dlpack::kBool && type.bits == 8) return DType::boolean;
  return DType::other;
}

py::object export_capsule(py::handle tensor, const std::string& name) {
  if (!py::hasattr(tensor, "__dlpack__"))
    throw ArgumentError("argument '" + name + "' must be a tensor, but it is of type " +
                        py::str(py::type::handle_of(tensor).attr("__name__")).cast<std::string>());
  try {
    return tensor.attr("__dlpack__")();
  } catch (py::error_already_set& error) {
    // what torch and numpy raise for a tensor that cannot be lent out (it requires grad, is sparse, is read-only)
    if (!error.matches(PyExc_BufferError) && !error.matches(PyExc_RuntimeError)) throw;
    throw ArgumentError("argument '" + name + "' cannot be read: " + py::str(error.value()).cast<std::string>());
  }
}

}  // namespace

TensorArgument::TensorArgument(py::handle tensor, const std::string& name) {
  py::object capsule = export_capsule(tensor, name);
  auto* managed = static_cast<dlpack::ManagedTensor*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"));
  if (managed == nullptr) throw py::error_already_set();
  if (PyCapsule_SetName(capsule.ptr(), "used_dltensor") != 0) throw py::error_already_set();
  owner_.reset(managed);  // from here on the deleter is ours to call

  const dlpack::Tensor& source = managed->tensor;
  view.name = name;
  view.data = static_cast<char*>(source.data) + source.byte_offset;
  view.dtype = dtype_of(source.dtype);
  view.place = source.device.type == dlpack::kCpu    ? Place::cpu
               : source.device.type == dlpack::kCuda ? Place::cuda
                                                     : Place::other;
  view.shape.assign(source.shape, source.shape + source.rank);
  if (source.strides != nullptr) {
    view.strides.assign(source.strides, source.strides + source.rank);
  } else {
    view.strides.resize(view.shape.size());
    std::int64_t stride = 1;
    for (std::size_t axis = view.shape.size(); axis-- > 0; stride *= view.shape[axis]) view.strides[axis] = stride;
  }
}

}  // namespace tutelage
