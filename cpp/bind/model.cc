// The transformer as Python sees it: flat buffers in, log-probs out, a graph to go back through.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bind/device.h"
#include "bind/dlpack.h"
#include "bind/generator.h"
#include "bind/signals.h"
#include "engine/transformer.h"

using namespace py::literals;

namespace tutelage {
namespace {

template <class Value>
Value choice(const py::dict& fields, const char* key, std::initializer_list<std::pair<const char*, Value>> values) {
  const auto given = fields[key].cast<std::string>();
  for (const auto& [name, value] : values)
    if (given == name) return value;
  throw ArgumentError(std::string(key) + "='" + given + "' is unknown");
}

Config read_config(const py::dict& f) {
  Config c;
  c.vocab_size = f["vocab_size"].cast<std::int64_t>();
  c.hidden_size = f["hidden_size"].cast<std::int64_t>();
  c.intermediate_size = f["intermediate_size"].cast<std::int64_t>();
  c.num_hidden_layers = f["num_hidden_layers"].cast<std::int64_t>();
  c.num_attention_heads = f["num_attention_heads"].cast<std::int64_t>();
  c.num_key_value_heads = f["num_key_value_heads"].cast<std::int64_t>();
  c.head_dim = f["head_dim"].cast<std::int64_t>();
  c.max_position_embeddings = f["max_position_embeddings"].cast<std::int64_t>();
  c.sliding_window = f["sliding_window"].cast<std::int64_t>();
  c.tie_word_embeddings = f["tie_word_embeddings"].cast<bool>();
  c.norm = choice<Norm>(f, "norm", {{"rmsnorm", Norm::rmsnorm}, {"layernorm", Norm::layernorm}});
  c.norm_eps = f["norm_eps"].cast<double>();
  c.learned_positions = choice<bool>(f, "position", {{"rope", false}, {"learned", true}});
  c.rope_theta = f["rope_theta"].cast<double>();
  c.mlp = choice<Mlp>(f, "mlp", {{"swiglu", Mlp::swiglu}, {"gelu", Mlp::gelu}, {"gelu_erf", Mlp::gelu_erf}});
  c.attention_bias = f["attention_bias"].cast<bool>();
  c.attention_out_bias = f["attention_out_bias"].cast<bool>();
  c.mlp_bias = f["mlp_bias"].cast<bool>();
  c.qk_norm = f["qk_norm"].cast<bool>();
  c.rope_layers = f["rope_layers"].cast<std::vector<bool>>();
  c.window_layers = f["window_layers"].cast<std::vector<bool>>();
  c.head = choice<Head>(f, "head", {{"lm", Head::lm}, {"scalar", Head::scalar}});
  if (!f["rope_scaling"].is_none()) {
    const auto s = f["rope_scaling"].cast<py::dict>();
    using Kind = RopeScaling::Kind;
    c.rope_scaling.kind =
        choice<Kind>(s, "rope_type", {{"linear", Kind::linear}, {"llama3", Kind::llama3}, {"yarn", Kind::yarn}});
    c.rope_scaling.factor = s["factor"].cast<double>();
    if (c.rope_scaling.kind == Kind::llama3) {
      c.rope_scaling.low_freq_factor = s["low_freq_factor"].cast<double>();
      c.rope_scaling.high_freq_factor = s["high_freq_factor"].cast<double>();
    }
    if (c.rope_scaling.kind == Kind::yarn) {
      c.rope_scaling.beta_fast = s["beta_fast"].cast<double>();
      c.rope_scaling.beta_slow = s["beta_slow"].cast<double>();
      c.rope_scaling.attention_factor = s["attention_factor"].cast<double>();
      c.rope_scaling.mscale = s["mscale"].cast<double>();
      c.rope_scaling.mscale_all_dim = s["mscale_all_dim"].cast<double>();
      c.rope_scaling.truncate = s["truncate"].cast<bool>();
    }
    if (c.rope_scaling.kind != Kind::linear)
      c.rope_scaling.original_max_position_embeddings = s["original_max_position_embeddings"].cast<std::int64_t>();
  }
  return c;
}

// What the engine calls between blocks of a backward; nothing for None.
Transformer::Finished teller(const py::object& finished) {
  if (finished.is_none()) return {};
  return [&finished](std::int64_t block) {
    py::gil_scoped_acquire gil;
    finished(block);
  };
}

class BoundTransformer {
 public:
  BoundTransformer(const py::dict& config, const std::string& level)
      : table_(table_named(level)), model_(read_config(config), table_) {}
  BoundTransformer(const py::dict& config, const py::dict& adapter, const std::string& level)
      : table_(table_named(level)),
        model_(read_config(config), table_, choice<Head>(adapter, "base_head", {{"lm", Head::lm}, {"scalar", Head::scalar}}),
               {adapter["rank"].cast<std::int64_t>(), adapter["scale"].cast<double>(),
                adapter["target_modules"].cast<std::vector<std::string>>()}) {}

  py::list parameters() const {
    py::list all;
    for (const Parameter& p : model_.trainable())
      all.append(py::make_tuple(p.name, p.offset, py::tuple(py::cast(p.shape)), p.decay));
    return all;
  }
  std::int64_t size() const { return model_.size(); }
  std::string level() const { return table_.name; }

  void initialise_params(py::handle params, std::uint64_t seed, int threads) const {
    TensorArgument p(params, "params");
    p.view.require_cpu().require_dtype(DType::float32).require_shape({size()}).require_contiguous();
    py::gil_scoped_release unlocked;
    initialise(model_.config(), model_.trainable(), seed, model_.adapted() ? 1 : 0, p.data<float>(), threads);
  }

  // weights: (parameters, an adapter's or None)
  std::unique_ptr<Graph> score(const py::tuple& weights, py::handle tokens, py::handle cu_seqlens, const py::object& mask,
                               py::handle logprobs, py::handle entropy, double temperature, bool keep, bool recompute,
                               std::int64_t logits_budget, int threads) {
    if (model_.config().head != Head::lm)
      throw ArgumentError("this model has a scalar head; call values(batch), or load it with head='lm' to score tokens");
    const WeightArguments w(*this, weights);
    Tokens batch(tokens, cu_seqlens);
    std::optional<TensorArgument> wanted;
    if (!mask.is_none()) {
      wanted.emplace(mask, "mask");
      wanted->view.require_cpu().require_dtype(DType::boolean).require_shape({batch.batch.tokens}).require_contiguous();
      batch.batch.mask = wanted->data<bool>();
    }
    const TensorArgument l = per_token(logprobs, "logprobs", batch), h = per_token(entropy, "entropy", batch);
    const Options options = make_options(temperature, keep, recompute, logits_budget, threads);
    const DeviceCall call;
    py::gil_scoped_release unlocked;
    return model_.score(batch.batch, w.weights, options, l.data<void>(), h.data<void>());
  }

  std::unique_ptr<Graph> values(const py::tuple& weights, py::handle tokens, py::handle cu_seqlens, py::handle values,
                                bool keep, bool recompute, int threads) {
    if (model_.config().head != Head::scalar)
      throw ArgumentError("this model has a language-model head; call score(batch), or load it with head='scalar' for values");
    const WeightArguments w(*this, weights);
    const Tokens batch(tokens, cu_seqlens);
    const TensorArgument v = per_token(values, "values", batch);
    const Options options = make_options(1.0, keep, recompute, 0, threads);
    const DeviceCall call;
    py::gil_scoped_release unlocked;
    return model_.values(batch.batch, w.weights, options, v.data<void>());
  }

  void backward_score(Graph& graph, const py::tuple& weights, py::handle grads, py::handle d_logprobs, py::handle d_entropy,
                      int threads, const py::object& finished) {
    const WeightArguments w(*this, weights);
    const TensorArgument g = flat(grads, "grads");
    const TensorArgument l = gradient(d_logprobs, "d_logprobs", graph), h = gradient(d_entropy, "d_entropy", graph);
    const DeviceCall call;
    const Transformer::Finished told = teller(finished);
    py::gil_scoped_release unlocked;
    model_.backward_score(graph, w.weights, g.data<void>(), l.data<void>(), h.data<void>(), threads, poll_signals, told);
  }
  void backward_values(Graph& graph, const py::tuple& weights, py::handle grads, py::handle d_values, int threads,
                       const py::object& finished) {
    const WeightArguments w(*this, weights);
    const TensorArgument g = flat(grads, "grads");
    const TensorArgument v = gradient(d_values, "d_values", graph);
    const DeviceCall call;
    const Transformer::Finished told = teller(finished);
    py::gil_scoped_release unlocked;
    model_.backward_values(graph, w.weights, g.data<void>(), v.data<void>(), threads, poll_signals, told);
  }

  void forget_gradients() { model_.forget_gradients(); }
  void finish_gradients(py::handle grads, int threads) {
    const TensorArgument g = flat(grads, "grads");
    const DeviceCall call;
    py::gil_scoped_release unlocked;
    model_.finish_gradients(g.data<void>(), threads);
  }

  std::shared_ptr<const PackedWeights> pack(py::handle params, bool half, int threads) const {
    const TensorArgument p(params, "params");
    require_weights(p.view, size());
    const DeviceCall call;
    py::gil_scoped_release unlocked;
    return model_.pack(p.data<void>(), half, threads, poll_signals);
  }
  std::unique_ptr<BoundGenerator> generator(py::tuple weights, std::shared_ptr<const PackedWeights> packed,
                                            std::shared_ptr<const PackedWeights> packed_adapter,
                                            const GeneratorOptions& options, std::vector<std::string> token_bytes) {
    if (model_.config().head != Head::lm)
      throw ArgumentError("this model has a scalar head; load it with head='lm' to generate tokens");
    const WeightArguments w(*this, weights);
    const Packed streams{std::move(packed), std::move(packed_adapter)};
    return std::make_unique<BoundGenerator>(model_, std::move(weights), w.weights, streams, options, std::move(token_bytes));
  }

  std::int64_t activation_bytes(std::int64_t tokens, std::int64_t sequences, bool keep, bool recompute,
                                std::int64_t logits_budget) const {
    return model_.activation_bytes(tokens, sequences, make_options(1.0, keep, recompute, logits_budget, 1));
  }

  double sum_of_squares(py::handle x, int threads) const {
    const TensorArgument v = flat(x, "grads");
    double result = 0;
    const DeviceCall call;
    py::gil_scoped_release unlocked;
    table_.sum_of_squares({size(), v.data<void>(), &result}, threads);
    return result;
  }

  // One AdamW step over all that learns; only those that decay get the weight decay. copy: the parameters as the kernels read
  // them, kept up to date on the way; None: nobody has such a copy.
  void adamw(py::handle params, py::handle grads, py::handle m, py::handle v, double lr, double beta1, double beta2, double eps,
             double weight_decay, std::int64_t step, double grad_scale, const py::object& copy, int threads) const {
    std::optional<TensorArgument> rounded;
    if (!copy.is_none()) {
      if (table_.activation_size != 2) throw ArgumentError("argument 'copy' is for a device that computes in bfloat16");
      rounded.emplace(copy, "copy");
      require_weights(rounded->view, size());
    }
    const TensorArgument p = flat(params, "params"), g = flat(grads, "grads"), mean = flat(m, "exp_avg"),
                         square = flat(v, "exp_avg_sq");
    AdamW a;
    a.lr = lr, a.beta1 = beta1, a.beta2 = beta2, a.eps = eps, a.grad_scale = grad_scale;
    a.correction1 = 1 - std::pow(beta1, static_cast<double>(step));
    a.correction2 = 1 - std::pow(beta2, static_cast<double>(step));
    const DeviceCall call;
    py::gil_scoped_release unlocked;
    const auto& all = model_.trainable();
    for (std::size_t first = 0, last = 0; first < all.size(); first = last) {  // neighbours of one kind go together
      while (last < all.size() && all[last].decay == all[first].decay) ++last;
      const std::int64_t offset = all[first].offset * table_.state_size;
      a.n = all[last - 1].offset + all[last - 1].size - all[first].offset;
      a.weight_decay = all[first].decay ? weight_decay : 0.0;
      a.p = p.data<char>() + offset, a.g = g.data<char>() + offset;
      a.m = mean.data<char>() + offset, a.v = square.data<char>() + offset;
      if (rounded) a.copy = rounded->data<char>() + all[first].offset * table_.activation_size;
      table_.adamw(a, threads);
    }
  }

 private:
  struct WeightArguments {
    std::optional<TensorArgument> params, adapter;
    Weights weights;
    WeightArguments(const BoundTransformer& model, const py::tuple& given) {
      const py::object own = given[1];
      if (own.is_none() == model.model_.adapted()) throw ArgumentError("weights: a model with adapters, and no other, has two");
      params.emplace(given[0], "params");
      model.require_weights(params->view, model.model_.layout().size);
      weights.params = params->data<void>();
      if (own.is_none()) return;
      adapter.emplace(own, "adapter");
      model.require_weights(adapter->view, model.size());
      weights.adapter = adapter->data<void>();
    }
  };
  struct Tokens {
    TensorArgument ids, cu_seqlens;
    Batch batch;
    Tokens(py::handle tokens, py::handle cu) : ids(tokens, "tokens"), cu_seqlens(cu, "cu_seqlens") {
      ids.view.require_cpu().require_dtype(DType::int32).require_shape({-1}).require_contiguous();
      cu_seqlens.view.require_cpu().require_dtype(DType::int32).require_shape({-1}).require_contiguous();
      if (cu_seqlens.extent(0) < 2) throw ArgumentError("the batch is empty; pack at least one sequence");
      batch = {ids.extent(0), cu_seqlens.extent(0) - 1, ids.data<std::int32_t>(), cu_seqlens.data<std::int32_t>()};
    }
  };

  // Of the weights that the kernels compute with, and of all that is accumulated or handed out.
  DType weight_type() const {
    return table_.activation_size == 2 ? DType::bfloat16 : table_.activation_size == 8 ? DType::float64 : DType::float32;
  }
  DType state_type() const { return table_.state_size == 8 ? DType::float64 : DType::float32; }
  void require_weights(const TensorView& view, std::int64_t n) const {
    view.require_place(kPlace).require_dtype(weight_type()).require_shape({n}).require_contiguous();
  }
  TensorArgument flat(py::handle x, const char* name) const {
    TensorArgument t(x, name);
    t.view.require_place(kPlace).require_dtype(state_type()).require_shape({size()}).require_contiguous();
    return t;
  }
  TensorArgument per_token(py::handle x, const char* name, const Tokens& batch) const {
    TensorArgument t(x, name);
    t.view.require_place(kPlace).require_dtype(state_type()).require_shape({batch.batch.tokens}).require_contiguous();
    return t;
  }
  TensorArgument gradient(py::handle x, const char* name, const Graph& graph) const {
    TensorArgument t(x, name);
    t.view.require_place(kPlace).require_dtype(state_type()).require_shape({graph.tokens()}).require_contiguous();
    return t;
  }
  static Options make_options(double temperature, bool keep, bool recompute, std::int64_t logits_budget, int threads) {
    Options o;
    o.threads = threads, o.keep = keep, o.recompute = recompute, o.logits_budget = logits_budget;
    o.temperature = temperature, o.poll = poll_signals;
    return o;
  }

  const KernelTable& table_;
  Transformer model_;
};

}  // namespace

void bind_model(py::module_& m) {
  bind_generator(m);
  py::class_<Graph>(m, "Graph", py::module_local(), "What one forward keeps for its backward.")
      .def_property_readonly("bytes", &Graph::bytes)
      .def_property_readonly("used", &Graph::used);
  py::class_<BoundTransformer>(m, "Transformer", py::module_local(),
                               "The engine: configuration and layout, but no parameters of its own.")
      .def(py::init([](const py::dict& config, const std::string& level, const std::optional<py::dict>& adapter) {
             return adapter ? std::make_unique<BoundTransformer>(config, *adapter, level)
                            : std::make_unique<BoundTransformer>(config, level);
           }),
           "config"_a, "level"_a = "", "adapter"_a = py::none())
      .def_property_readonly("size", &BoundTransformer::size)
      .def_property_readonly("level", &BoundTransformer::level)
      .def("parameters", &BoundTransformer::parameters, "(name, offset, shape, decay) of every parameter that learns.")
      .def("initialise", &BoundTransformer::initialise_params, "params"_a, "seed"_a, "threads"_a)
      .def("score", &BoundTransformer::score, "weights"_a, "tokens"_a, "cu_seqlens"_a, "mask"_a, "logprobs"_a, "entropy"_a,
           "temperature"_a, "keep"_a, "recompute"_a, "logits_budget"_a, "threads"_a)
      .def("values", &BoundTransformer::values, "weights"_a, "tokens"_a, "cu_seqlens"_a, "values"_a, "keep"_a, "recompute"_a,
           "threads"_a)
      .def("backward_score", &BoundTransformer::backward_score, "graph"_a, "weights"_a, "grads"_a, "d_logprobs"_a,
           "d_entropy"_a, "threads"_a, "finished"_a = py::none(),
           "finished: called with each block's index when its gradients are whole, the last block's first.")
      .def("backward_values", &BoundTransformer::backward_values, "graph"_a, "weights"_a, "grads"_a, "d_values"_a, "threads"_a,
           "finished"_a = py::none())
      .def("forget_gradients", &BoundTransformer::forget_gradients)
      .def("finish_gradients", &BoundTransformer::finish_gradients, "grads"_a, "threads"_a)
      .def("pack", &BoundTransformer::pack, "params"_a, "half"_a, "threads"_a,
           "Every matrix of what learns, in the order in which generation streams it.")
      .def("generator", &BoundTransformer::generator, "weights"_a, "packed"_a, "packed_adapter"_a, "options"_a, "token_bytes"_a,
           py::keep_alive<0, 1>())
      .def("activation_bytes", &BoundTransformer::activation_bytes, "tokens"_a, "sequences"_a, "keep"_a, "recompute"_a,
           "logits_budget"_a)
      .def("sum_of_squares", &BoundTransformer::sum_of_squares, "grads"_a, "threads"_a)
      .def("adamw", &BoundTransformer::adamw, "params"_a, "grads"_a, "exp_avg"_a, "exp_avg_sq"_a, "lr"_a, "beta1"_a, "beta2"_a,
           "eps"_a, "weight_decay"_a, "step"_a, "grad_scale"_a, "copy"_a, "threads"_a);
}

}  // namespace tutelage
