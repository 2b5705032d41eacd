// Ctrl-C while the core works without the GIL.
#pragma once

#include <pybind11/pybind11.h>

namespace tutelage {

// Between blocks: Python's signal handlers run; one that raises ends the call.
inline void poll_signals() {
  pybind11::gil_scoped_acquire gil;
  if (PyErr_CheckSignals() != 0) throw pybind11::error_already_set();
}

}  // namespace tutelage
