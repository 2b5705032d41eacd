// A view of somebody else's memory: what crosses the border as DLPack. No ownership, no arithmetic.
//
// The checks throw ArgumentError and name the argument, what was expected and what came.
// Test: tests/cpp/test_tensor.cc, tests/python/test_kernels.py (errors through the border).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace tutelage {

enum class DType : std::uint8_t { float32, float64, bfloat16, int32, boolean, other };

enum class Place : std::uint8_t { cpu, cuda, other };

const char* dtype_name(DType dtype);
std::int64_t dtype_size(DType dtype);

struct TensorView {
  std::string name;  // the argument's name, for errors
  void* data = nullptr;
  DType dtype = DType::other;
  Place place = Place::cpu;
  bool read_only = false;
  std::vector<std::int64_t> shape;
  std::vector<std::int64_t> strides;  // in elements

  std::int64_t rank() const { return static_cast<std::int64_t>(shape.size()); }
  std::int64_t size() const;
  bool contiguous() const;
  std::string describe() const;  // "float32 [3, 4] on the CPU"

  // Each returns *this so that checks chain; -1 in `expected` accepts any extent.
  const TensorView& require_cpu() const { return require_place(Place::cpu); }
  const TensorView& require_place(Place expected) const;
  const TensorView& require_dtype(DType expected) const;
  const TensorView& require_contiguous() const;
  const TensorView& require_shape(const std::vector<std::int64_t>& expected) const;
};

// Validates cu_seqlens: starts at 0, never falls, ends at `tokens`. int32 [sequences + 1].
void require_cu_seqlens(const std::int32_t* cu_seqlens, std::int64_t sequences, std::int64_t tokens);

// Validates 0 <= ids[i] < limit; names the row (sequence), position and id of the first that is not.
void require_token_ids(const char* name, const std::int32_t* ids, std::int64_t tokens, std::int64_t limit,
                       const std::int32_t* cu_seqlens, std::int64_t sequences);

}  // namespace tutelage
