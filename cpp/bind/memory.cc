// The core's own memory, watched and made to fail. Test: tests/python/test_memory.py.
#include "core/memory.h"

#include "bind/module.h"

namespace py = pybind11;
using namespace py::literals;

namespace tutelage {

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

}  // namespace tutelage
