// What each file of this folder adds to a module.
#pragma once

#include <pybind11/pybind11.h>

namespace tutelage {

void bind_memory(pybind11::module_& m);
void bind_kernels(pybind11::module_& m);
void bind_model(pybind11::module_& m);
void bind_ceilings(pybind11::module_& m);

}  // namespace tutelage
