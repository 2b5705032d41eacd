// A stretch of a kernel table's memory, and how it is cut into arrays.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

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

// Numbers that the host makes and kernels read: the vector itself, or where they do not read the host's memory a copy, made by
// place() once the vector is whole.
template <class T>
class Placed {
 public:
  std::vector<T> host;
  void place(const KernelTable& table) {
    if (table.upload == nullptr || host.empty()) return;
    device_ = Buffer(table, host.size() * sizeof(T));
    table.upload(device_.data(), host.data(), host.size() * sizeof(T));
  }
  const T* data() const { return device_.data() == nullptr ? host.data() : static_cast<const T*>(device_.data()); }

 private:
  Buffer device_;
};

// Cuts one stretch of memory into arrays. Without memory it only counts.
struct Plan {
  std::int64_t element, state_element;  // bytes: of an activation, of a statistic or logit
  char* base = nullptr;
  std::size_t used = 0;

  explicit Plan(const KernelTable& table, void* memory = nullptr)
      : element(table.activation_size), state_element(table.state_size), base(static_cast<char*>(memory)) {}
  void* take(std::int64_t elements) { return take_bytes(static_cast<std::size_t>(elements * element)); }
  void* take_state(std::int64_t elements) { return take_bytes(static_cast<std::size_t>(elements * state_element)); }
  void* take_bytes(std::size_t bytes) {
    constexpr std::size_t line = 64;  // every array starts on a cache line
    void* at = base == nullptr ? nullptr : base + used;
    used += (bytes + line - 1) / line * line;
    return at;
  }
};

}  // namespace tutelage
