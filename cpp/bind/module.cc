// The Python module tutelage._core. Everything else in this folder adds to it; nothing outside it knows Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <exception>
#include <string>
#include <utility>
#include <vector>

#include "core/error.h"
#include "core/memory.h"
#include "core/philox.h"
#include "kernels/select.h"

namespace py = pybind11;
using namespace py::literals;

namespace tutelage {

void bind_kernels(py::module_& m);
void bind_model(py::module_& m);
void bind_ceilings(py::module_& m);

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

void bind_memory(py::module_& m) {
  m.def(
      "memory_use",
      [] {
        const MemoryUse use = memory_use();
        return py::dict("in_use"_a = use.in_use, "cached"_a = use.cached, "peak"_a = use.peak,
                        "allocations"_a = use.allocations);
      },
      "The core's own memory, in bytes: in_use, cached (freed and kept), peak (of in_use); and the number of allocations.");
  m.def("reset_memory_peak", &reset_memory_peak, "Sets the peak to what is in use now.");
  m.def("free_cached_memory", &free_cached_memory, "Returns freed blocks that were kept for reuse to the system.");
  m.def("fail_allocation", &fail_allocation, "n"_a,
        "For tests: makes the n-th allocation from now (1: the next) raise MemoryError; 0 switches it off.");
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
