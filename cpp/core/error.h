// Errors that cross the border to Python: one clear sentence each.
#pragma once

#include <stdexcept>
#include <string>

namespace tutelage {

// Bad input from the caller. Becomes ValueError. The message names the argument and what to do.
class ArgumentError : public std::invalid_argument {
 public:
  explicit ArgumentError(const std::string& message) : std::invalid_argument(message) {}
};

}  // namespace tutelage
