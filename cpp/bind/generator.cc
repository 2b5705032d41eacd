#include "bind/generator.h"

#include <pybind11/stl.h>

#include <cstdint>

#include "bind/device.h"
#include "bind/signals.h"

using namespace pybind11::literals;

namespace tutelage {
namespace {

GeneratorOptions make_options(std::int64_t kv_cache_bytes, std::int64_t prefill_chunk, std::int64_t max_sequences,
                              bool share_prefixes, int threads) {
  GeneratorOptions o;
  o.kv_cache_bytes = kv_cache_bytes, o.prefill_chunk = prefill_chunk, o.max_sequences = max_sequences;
  o.share_prefixes = share_prefixes, o.threads = threads, o.poll = poll_signals;
  return o;
}

void add(BoundGenerator& g, std::vector<std::int32_t> prompt, std::int64_t max_new_tokens, double temperature,
         std::int64_t top_k, double top_p, double min_p, std::uint64_t seed, std::uint64_t sample,
         std::vector<std::int32_t> stop_token_ids, std::vector<std::string> stop_strings) {
  Request r;
  r.settings.temperature = temperature, r.settings.top_k = top_k, r.settings.top_p = top_p, r.settings.min_p = min_p;
  r.settings.key = sample_key(seed, prompt, sample);
  r.prompt = std::move(prompt), r.max_new_tokens = max_new_tokens;
  r.stop_token_ids = std::move(stop_token_ids), r.stop_strings = std::move(stop_strings);
  (*g).add(std::move(r));
}

const char* name_of(FinishReason reason) {
  switch (reason) {
    case FinishReason::stop:
      return "stop";
    case FinishReason::length:
      return "length";
    case FinishReason::string:
      return "string";
    case FinishReason::running:
      break;
  }
  return "running";
}

py::tuple completion(BoundGenerator& g, std::size_t request) {
  if (request >= (*g).size()) throw py::index_error("there is no request " + std::to_string(request));
  const Completion& c = (*g).completion(request);
  return py::make_tuple(py::cast(c.tokens), py::cast(c.logprobs), py::cast(c.support_logprobs), name_of(c.reason));
}

}  // namespace

void bind_generator(py::module_& m) {
  py::class_<PackedWeights, std::shared_ptr<PackedWeights>>(m, "PackedWeights", py::module_local(),
                                                            "A model's matrices, packed for generation.")
      .def_property_readonly("bytes", &PackedWeights::bytes)
      .def_property_readonly("half", &PackedWeights::half);
  py::class_<GeneratorOptions>(m, "GeneratorOptions", py::module_local(),
                               "How a generator works; none of it changes what it makes.")
      .def(py::init(&make_options), "kv_cache_bytes"_a, "prefill_chunk"_a, "max_sequences"_a, "share_prefixes"_a, "threads"_a);
  py::class_<BoundGenerator>(m, "Generator", py::module_local(), "Continuous batching over one model's weights.")
      .def("add", &add, "prompt"_a, "max_new_tokens"_a, "temperature"_a, "top_k"_a, "top_p"_a, "min_p"_a, "seed"_a, "sample"_a,
           "stop_token_ids"_a, "stop_strings"_a)
      .def(
          "step",
          [](BoundGenerator& g) {
            const DeviceCall call;
            const py::gil_scoped_release unlocked;
            return (*g).step();
          },
          "Every token that is due; False when nothing is left to do.")
      .def("completion", &completion, "request"_a, "(tokens, logprobs, support_logprobs, reason) so far.")
      .def_property_readonly(
          "advanced", [](BoundGenerator& g) { return (*g).advanced(); }, "Requests that got a token in the last step.")
      .def_property_readonly("prefilled", [](BoundGenerator& g) { return (*g).prefilled(); })
      .def_property_readonly("steps", [](BoundGenerator& g) { return (*g).steps(); });
}

}  // namespace tutelage
