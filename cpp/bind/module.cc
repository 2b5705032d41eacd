// The Python module tutelage._core. Everything else in this folder adds to it; nothing outside it knows Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <exception>
#include <string>
#include <utility>
#include <vector>

#include "bind/device.h"
#include "bind/module.h"
#include "core/error.h"
#include "core/philox.h"
#include "kernels/select.h"

namespace py = pybind11;
using namespace py::literals;

namespace tutelage {

const KernelTable& table_named(const std::string& name) { return name.empty() ? active_table() : find_table(name); }
const KernelTable& table_for(const TensorView& first, const std::optional<std::string>& level) {
  if (first.dtype != DType::float32 && first.dtype != DType::float64)
    throw ArgumentError("argument '" + first.name + "' must be float32 or float64, but it is " + first.describe());
  return level ? find_table(*level) : first.dtype == DType::float32 ? active_table() : *float64_table();
}
const Place kPlace = Place::cpu;
DeviceCall::DeviceCall() = default;
DeviceCall::~DeviceCall() = default;

namespace {

void bind_levels(py::module_& m) {
  m.def(
      "levels",
      [] {
        std::vector<std::pair<std::string, bool>> all;
        for (const Level& level : levels()) all.emplace_back(level.table->name, level.supported);
        return all;
      },
      "The ISA levels of this build, best first, and whether this CPU can run each.");
  m.def(
      "active_level", [] { return std::string(active_table().name); },
      "The ISA level in use: the best one that passed its self-check, or TUTELAGE_ISA.");
  m.def(
      "self_check", [](const std::string& name) { return self_check(find_table(name)); }, "name"_a,
      "The name of the first kernel of this level whose bits differ from the scalar level's; empty when all agree.");
}

}  // namespace
}  // namespace tutelage

PYBIND11_MODULE(_core, m) {
  m.doc() = "tutelage's compiled core";
  m.attr("__version__") = TUTELAGE_VERSION;
  // ArgumentError is a std::invalid_argument, which pybind11 makes a ValueError; std::bad_alloc becomes MemoryError.
  m.def("philox4x32", &tutelage::philox4x32, "key"_a, "counter"_a,
        "Philox4x32-10: four 32-bit words, a pure function of the 64-bit key and the counter of four 32-bit words.");
  tutelage::bind_levels(m);
  tutelage::bind_memory(m);
  tutelage::bind_kernels(m);
  tutelage::bind_model(m);
  tutelage::bind_ceilings(m);
}
