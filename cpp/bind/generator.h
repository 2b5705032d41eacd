// The generator as Python sees it: requests in, completions out; the parameters stay alive meanwhile.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "engine/generator.h"

namespace tutelage {

namespace py = pybind11;

class BoundGenerator {
 public:
  BoundGenerator(Transformer& model, py::object owner, const Weights& weights, Packed packed, const GeneratorOptions& options,
                 std::vector<std::string> token_bytes)
      : owner_(std::move(owner)), generator_(model, weights, std::move(packed), options, std::move(token_bytes)) {}

  Generator& operator*() { return generator_; }

 private:
  py::object owner_;
  Generator generator_;
};

void bind_generator(py::module_& m);

}  // namespace tutelage
