#include "core/tensor.h"

#include "core/error.h"

namespace tutelage {

const char* dtype_name(DType dtype) {
  switch (dtype) {
    case DType::float32:
      return "float32";
    case DType::float64:
      return "float64";
    case DType::bfloat16:
      return "bfloat16";
    case DType::int32:
      return "int32";
    case DType::boolean:
      return "bool";
    case DType::other:
      break;
  }
  return "another dtype";
}

std::int64_t dtype_size(DType dtype) {
  switch (dtype) {
    case DType::float32:
      return 4;
    case DType::float64:
      return 8;
    case DType::bfloat16:
      return 2;
    case DType::int32:
      return 4;
    case DType::boolean:
      return 1;
    case DType::other:
      break;
  }
  return 0;
}

namespace {
const char* place_name(Place place) {
  switch (place) {
    case Place::cpu:
      return "on the CPU";
    case Place::cuda:
      return "on a CUDA device";
    case Place::other:
      break;
  }
  return "on another device";
}

std::string shape_text(const std::vector<std::int64_t>& shape) {
  std::string text = "[";
  for (std::size_t i = 0; i < shape.size(); ++i)
    text += (i ? ", " : "") + (shape[i] < 0 ? std::string("any") : std::to_string(shape[i]));
  return text + "]";
}
}  // namespace

std::int64_t TensorView::size() const {
  std::int64_t n = 1;
  for (std::int64_t extent : shape) n *= extent;
  return n;
}

bool TensorView::contiguous() const {
  if (size() == 0) return true;
  std::int64_t expected = 1;
  for (std::size_t i = shape.size(); i-- > 0;) {
    if (shape[i] != 1 && strides[i] != expected) return false;
    expected *= shape[i];
  }
  return true;
}

std::string TensorView::describe() const {
  return std::string(dtype_name(dtype)) + " " + shape_text(shape) + " " + place_name(place);
}

const TensorView& TensorView::require_place(Place expected) const {
  if (place != expected)
    throw ArgumentError("argument '" + name + "' must be " + place_name(expected) + ", but it is " + describe());
  return *this;
}

const TensorView& TensorView::require_dtype(DType expected) const {
  if (dtype != expected)
    throw ArgumentError("argument '" + name + "' must be " + dtype_name(expected) + ", but it is " + describe());
  return *this;
}

const TensorView& TensorView::require_contiguous() const {
  if (!contiguous()) throw ArgumentError("argument '" + name + "' must be contiguous; call .contiguous() on it first");
  return *this;
}

const TensorView& TensorView::require_shape(const std::vector<std::int64_t>& expected) const {
  bool same = shape.size() == expected.size();
  for (std::size_t i = 0; same && i < shape.size(); ++i) same = expected[i] < 0 || expected[i] == shape[i];
  if (!same)
    throw ArgumentError("argument '" + name + "' must have shape " + shape_text(expected) + ", but it is " + describe());
  return *this;
}

void require_cu_seqlens(const std::int32_t* cu_seqlens, std::int64_t sequences, std::int64_t tokens) {
  if (cu_seqlens[0] != 0) throw ArgumentError("cu_seqlens must start at 0, but it starts at " + std::to_string(cu_seqlens[0]));
  for (std::int64_t s = 0; s < sequences; ++s)
    if (cu_seqlens[s + 1] < cu_seqlens[s])
      throw ArgumentError("cu_seqlens must never fall, but entry " + std::to_string(s + 1) + " is " +
                          std::to_string(cu_seqlens[s + 1]) + " after " + std::to_string(cu_seqlens[s]));
  if (cu_seqlens[sequences] != tokens)
    throw ArgumentError("cu_seqlens must end at the number of tokens, " + std::to_string(tokens) + ", but it ends at " +
                        std::to_string(cu_seqlens[sequences]));
}

void require_token_ids(const char* name, const std::int32_t* ids, std::int64_t tokens, std::int64_t limit,
                       const std::int32_t* cu_seqlens, std::int64_t sequences) {
  for (std::int64_t i = 0; i < tokens; ++i) {
    if (ids[i] >= 0 && ids[i] < limit) continue;
    std::int64_t row = 0;
    while (row + 1 < sequences && cu_seqlens[row + 1] <= i) ++row;
    throw ArgumentError(std::string(name) + ": token id " + std::to_string(ids[i]) + " at position " +
                        std::to_string(i - cu_seqlens[row]) + " of sequence " + std::to_string(row) +
                        " is outside the vocabulary of " + std::to_string(limit) + " ids (0 to " + std::to_string(limit - 1) +
                        ")");
  }
}

}  // namespace tutelage
