// What a module computes on. The bindings are compiled once for each module (_core; _cuda_sim and _cuda, whose
// halves of this are cuda/bind/), which brings these.
#pragma once

#include <optional>
#include <string>

#include "core/tensor.h"
#include "kernels/table.h"

namespace tutelage {

// The module's kernel table of that name; of none: the one it uses. Throws ArgumentError naming what there is.
const KernelTable& table_named(const std::string& name);

// The module's table for a call whose first tensor this is; level: the name that the caller gave, if any.
const KernelTable& table_for(const TensorView& first, const std::optional<std::string>& level);

// Where parameters, gradients and results lie. Token ids and what else the engine reads itself is on the CPU.
extern const Place kPlace;

// Lives as long as a call that runs kernels; made with the GIL held, on the thread that runs them. On a GPU: finds torch's
// current stream, which is where they go.
class DeviceCall {
 public:
  DeviceCall();
  ~DeviceCall();
  DeviceCall(const DeviceCall&) = delete;
  DeviceCall& operator=(const DeviceCall&) = delete;
};

}  // namespace tutelage
