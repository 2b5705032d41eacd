// A stretch of a kernel table's memory, and how it is cut into arrays.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/table.h"

namespace tutelage {

class Buffer {
 public:
  Buffer() = default;
  Buffer(const KernelTable& table, std::size_t bytes) : table_(&table), data_(table.allocate(bytes)), bytes_(bytes) {}
  ~Buffer() { reset(); }
  Buffer(Buffer&& other) noexcept { *this = static_cast<Buffer&&>(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    if (this != &other) {
      reset();
      table_ = other.table_, data_ = other.data_, bytes_ = other.bytes_;
      other.data_ = nullptr, other.bytes_ = 0;
    }
    return *this;
  }
  void reset() noexcept {
    if (data_ != nullptr) table_->release(data_);
    data_ = nullptr, bytes_ = 0;
  }
  void* data() const { return data_; }
  std::size_t bytes() const { return bytes_; }

 private:
  const KernelTable* table_ = nullptr;
  void* data_ = nullptr;
  std::size_t bytes_ = 0;
};

// Cuts one stretch of memory into arrays. Without memory it only counts.
struct Plan {
  std::int64_t element;  // bytes
  char* base = nullptr;
  std::size_t used = 0;

  void* take(std::int64_t elements) { return take_bytes(static_cast<std::size_t>(elements * element)); }
  void* take_bytes(std::size_t bytes) {
    constexpr std::size_t line = 64;  // every array starts on a cache line
    void* at = base == nullptr ? nullptr : base + used;
    used += (bytes + line - 1) / line * line;
    return at;
  }
};

}  // namespace tutelage
