// Every kernel of the table, callable from Python: tensors in, tensors that Python allocated filled. Each function checks all
// its arguments (errors name them), then lets go of the GIL. tutelage/kernels.py makes differentiable torch ops of them.
//
// All tensors are contiguous. On the CPU float32 runs the active level, or the one that `level` names, and float64 the float64
// table; on a device activations and weights are bfloat16 and the rest float32.
// Test: tests/python/test_kernels.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bind/device.h"
#include "bind/dlpack.h"
#include "bind/module.h"
#include "core/error.h"

namespace tutelage {
namespace {

using namespace py::literals;
using Shape = std::vector<std::int64_t>;
using LevelName = std::optional<std::string>;

class Argument : public TensorArgument {
 public:
  Argument(py::handle tensor, const std::string& name, DType dtype, const Shape& shape) : TensorArgument(tensor, name) {
    view.require_place(kPlace).require_dtype(dtype).require_shape(shape).require_contiguous();
  }
};

// One call: the table that its first tensor asks for, and the two types that go with that: of activations and weights, and of
// statistics, parameters' gradients, logits and the optimizer's state.
class Call {
 public:
  Call(py::handle first, const std::string& name, int threads, const LevelName& level, bool state = false) : threads_(threads) {
    if (threads < 1) throw ArgumentError("threads must be at least 1, but it is " + std::to_string(threads));
    const TensorArgument argument(first, name);
    table_ = &table_for(argument.view, level);
    const DType expected = state ? state_type() : activation_type();
    if (argument.view.dtype == expected) return;
    if (level) throw ArgumentError("level '" + *level + "' does not take " + dtype_name(argument.view.dtype) + " tensors");
    argument.view.require_dtype(expected);
  }

  Argument real(py::handle tensor, const std::string& name, const Shape& shape) const {
    return {tensor, name, activation_type(), shape};
  }
  Argument state(py::handle tensor, const std::string& name, const Shape& shape) const {
    return {tensor, name, state_type(), shape};
  }
  // None where the caller has none
  std::optional<Argument> optional_real(const py::object& tensor, const std::string& name, const Shape& shape) const {
    if (tensor.is_none()) return std::nullopt;
    return real(tensor, name, shape);
  }
  std::optional<Argument> optional_state(const py::object& tensor, const std::string& name, const Shape& shape) const {
    if (tensor.is_none()) return std::nullopt;
    return state(tensor, name, shape);
  }
  // Of either type; whether it is of the state's, where that is another.
  std::pair<Argument, bool> either(py::handle tensor, const std::string& name, const Shape& shape) const {
    const bool is_state = TensorArgument(tensor, name).view.dtype == state_type() && state_type() != activation_type();
    return {is_state ? state(tensor, name, shape) : real(tensor, name, shape), is_state};
  }

  bool rounds() const { return table_->activation_size == 2; }

  // A list that kernels read, for the host.
  std::vector<std::int32_t> on_host(const std::int32_t* list, std::int64_t n) const {
    std::vector<std::int32_t> copy(static_cast<std::size_t>(n));
    if (table_->download == nullptr)
      std::copy_n(list, n, copy.begin());
    else
      table_->download(copy.data(), list, copy.size() * sizeof(std::int32_t));
    return copy;
  }

  template <class Parameters>
  void run(void (*KernelTable::*kernel)(const Parameters&, int), const Parameters& parameters) const {
    py::gil_scoped_release release;
    (table_->*kernel)(parameters, threads_);
  }

 private:
  DType activation_type() const {
    return table_->activation_size == 2 ? DType::bfloat16 : table_->activation_size == 8 ? DType::float64 : DType::float32;
  }
  DType state_type() const { return table_->state_size == 8 ? DType::float64 : DType::float32; }

  int threads_;
  const KernelTable* table_ = nullptr;
  DeviceCall device_;
};

void* data_of(const std::optional<Argument>& argument) { return argument ? argument->view.data : nullptr; }

// Lists of whole numbers lie where the numbers do. Those on the CPU are checked; those on a GPU are taken as they are, for this
// is where kernels are measured and tested.
constexpr std::int64_t kAny = -1;
bool readable() { return kPlace == Place::cpu; }

Argument integers(py::handle tensor, const char* name, std::int64_t size) { return {tensor, name, DType::int32, {size}}; }

struct Sequences {
  Argument cu_seqlens;
  std::int64_t count;
  Sequences(py::handle tensor, std::int64_t tokens)
      : cu_seqlens(integers(tensor, "cu_seqlens", kAny)), count(cu_seqlens.extent(0) - 1) {
    if (count < 0) throw ArgumentError("argument 'cu_seqlens' must hold at least one entry, 0");
    if (readable()) require_cu_seqlens(data(), count, tokens);
  }
  const std::int32_t* data() const { return cu_seqlens.data<std::int32_t>(); }
};

// Ids of a flat list: one sequence as far as the error is concerned.
Argument token_ids(py::handle tensor, const char* name, std::int64_t tokens, std::int64_t limit) {
  Argument ids = integers(tensor, name, tokens);
  const std::int32_t whole[] = {0, static_cast<std::int32_t>(ids.extent(0))};
  if (readable()) require_token_ids(name, ids.data<std::int32_t>(), ids.extent(0), limit, whole, 1);
  return ids;
}

void require_positive(double value, const char* name) {
  if (!(value > 0) || !std::isfinite(value))
    throw ArgumentError(std::string(name) + " must be a positive number, but it is " + std::to_string(value));
}

void require_eps(double eps) {
  if (!(eps >= 0) || !std::isfinite(eps))
    throw ArgumentError("eps must be a number of at least 0, but it is " + std::to_string(eps));
}

void require_not_empty(std::int64_t extent, const char* name, const char* axis) {
  if (extent < 1) throw ArgumentError(std::string("argument '") + name + "' must have at least one " + axis);
}

// ---- matmul

Activation activation_named(const std::string& name) {
  constexpr std::pair<const char*, Activation> known[] = {{"none", Activation::none},
                                                          {"gelu", Activation::gelu},
                                                          {"gelu_erf", Activation::gelu_erf},
                                                          {"swiglu", Activation::swiglu},
                                                          {"gelu_backward", Activation::gelu_backward},
                                                          {"gelu_erf_backward", Activation::gelu_erf_backward},
                                                          {"swiglu_backward", Activation::swiglu_backward}};
  std::string names;
  for (const auto& [text, activation] : known) {
    if (name == text) return activation;
    names += (names.empty() ? "" : ", ") + std::string(text);
  }
  throw ArgumentError("unknown activation '" + name + "'; it must be one of " + names);
}

void bind_matmul(py::module_& m) {
  m.def(
      "matmul",
      [](py::handle a, py::handle b, py::handle c, bool transpose_a, bool transpose_b, bool accumulate, const py::object& bias,
         const py::object& residual, const std::string& activation, const py::object& activated, const py::object& pre,
         const std::pair<std::string, std::string>& names, int threads, const LevelName& level) {
        const auto& [a_name, b_name] = names;
        const Call call(a, a_name, threads, level);
        const Argument a_view = call.real(a, a_name, {-1, -1}), b_view = call.real(b, b_name, {-1, -1});
        Matmul g;
        g.m = a_view.extent(transpose_a), g.k = a_view.extent(!transpose_a), g.n = b_view.extent(!transpose_b);
        b_view.view.require_shape(transpose_b ? Shape{g.n, g.k} : Shape{g.k, g.n});
        g.activation = activation_named(activation);
        const bool backward = g.activation == Activation::gelu_backward || g.activation == Activation::gelu_erf_backward ||
                              g.activation == Activation::swiglu_backward;
        const bool gated = g.activation == Activation::swiglu;
        if (gated && g.n % 2 != 0)
          throw ArgumentError("swiglu needs an even number of columns, but there are " + std::to_string(g.n));
        const std::int64_t c_columns = g.activation == Activation::swiglu_backward ? 2 * g.n : g.n;
        const auto [c_view, c_state] = call.either(c, "c", {g.m, c_columns});
        g.c_state = c_state;
        const auto bias_view = call.optional_real(bias, "bias", {g.n});
        const auto residual_view = call.optional_real(residual, "residual", {g.m, g.n});
        const auto activated_view = call.optional_real(activated, "activated", {g.m, gated ? g.n / 2 : g.n});
        const auto pre_view = call.optional_real(pre, "pre", {g.m, c_columns});
        if ((g.activation != Activation::none) != activated_view.has_value())
          throw ArgumentError("argument 'activated' goes with an activation, and only with one");
        if (backward != pre_view.has_value())
          throw ArgumentError("argument 'pre' goes with a backward activation, and only with one");
        if ((gated && residual_view) || (backward && (bias_view || residual_view || accumulate)))
          throw ArgumentError("activation '" + activation + "' does not go with these of bias, residual and accumulate");
        if (g.m == 0 || g.n == 0 || (g.k == 0 && accumulate)) return;
        if (g.k == 0)
          throw ArgumentError("matmul needs an inner dimension of at least 1, but argument '" + a_name + "' is " +
                              a_view.view.describe());
        g.a = a_view.view.data, g.a_row = transpose_a ? 1 : g.k, g.a_col = transpose_a ? g.m : 1;
        g.b = b_view.view.data, g.b_row = transpose_b ? 1 : g.n, g.b_col = transpose_b ? g.k : 1;
        g.c = c_view.view.data, g.c_row = c_columns, g.accumulate = accumulate;
        g.bias = data_of(bias_view), g.residual = data_of(residual_view), g.residual_row = g.n;
        g.activated = data_of(activated_view), g.activated_row = gated ? g.n / 2 : g.n;
        g.pre = data_of(pre_view), g.pre_row = c_columns;
        call.run(&KernelTable::matmul, g);
      },
      "a"_a, "b"_a, "c"_a, py::kw_only(), "transpose_a"_a = false, "transpose_b"_a = false, "accumulate"_a = false,
      "bias"_a = py::none(), "residual"_a = py::none(), "activation"_a = "none", "activated"_a = py::none(),
      "pre"_a = py::none(), "names"_a = std::pair("a", "b"), "threads"_a, "level"_a = py::none(),
      "c [m, n] = op(a) op(b), or c += with accumulate; kernels/matmul.h. names: what errors call a and b.");
  m.def(
      "column_sum",
      [](py::handle x, py::handle out, int threads, const LevelName& level) {
        const Call call(x, "x", threads, level);
        const Argument x_view = call.real(x, "x", {-1, -1});
        const std::int64_t rows = x_view.extent(0), d = x_view.extent(1);
        const Argument out_view = call.state(out, "out", {d});
        call.run(&KernelTable::column_sum, {rows, d, x_view.view.data, d, out_view.view.data});
      },
      "x"_a, "out"_a, py::kw_only(), "threads"_a, "level"_a = py::none(), "out [d] += sum over the rows of x [rows, d].");
}

// ---- flash_attention

struct AttentionArguments {
  Argument q, k, v;
  std::int64_t tokens, heads, kv_heads, head_dim;
  Sequences sequences;
  AttentionShape shape;

  AttentionArguments(const Call& call, py::handle q_in, py::handle k_in, py::handle v_in, py::handle cu_seqlens, bool causal,
                     std::int64_t window, double scale)
      : q(call.real(q_in, "q", {-1, -1, -1})),
        k(call.real(k_in, "k", {q.extent(0), -1, q.extent(2)})),
        v(call.real(v_in, "v", k.view.shape)),
        tokens(q.extent(0)),
        heads(q.extent(1)),
        kv_heads(k.extent(1)),
        head_dim(q.extent(2)),
        sequences(cu_seqlens, tokens) {
    if (head_dim < 8 || head_dim % 8 != 0)
      throw ArgumentError("the head dimension must be a multiple of 8, but argument 'q' is " + q.view.describe());
    if (kv_heads < 1 || heads < 1 || heads % kv_heads != 0)
      throw ArgumentError("the number of query heads must be a multiple of the number of key heads, but there are " +
                          std::to_string(heads) + " and " + std::to_string(kv_heads));
    if (window < 0) throw ArgumentError("window must be at least 1, or none, but it is " + std::to_string(window));
    if (window > 0 && !causal) throw ArgumentError("a window needs causal attention");
    require_positive(scale, "scale");
    shape = {sequences.count, sequences.data(), heads, kv_heads, head_dim, causal, window, scale, tokens};
    const std::vector<std::int32_t> offsets = call.on_host(sequences.data(), sequences.count + 1);
    for (std::size_t s = 0; s + 1 < offsets.size(); ++s)
      shape.longest = std::max<std::int64_t>(shape.longest, offsets[s + 1] - offsets[s]);
  }
  std::int64_t q_row() const { return heads * head_dim; }
  std::int64_t k_row() const { return kv_heads * head_dim; }
};

void bind_attention(py::module_& m) {
  m.def(
      "flash_attention",
      [](py::handle q, py::handle k, py::handle v, py::handle cu_seqlens, py::handle o, py::handle lse, bool causal,
         std::int64_t window, double scale, int threads, const LevelName& level) {
        const Call call(q, "q", threads, level);
        const AttentionArguments in(call, q, k, v, cu_seqlens, causal, window, scale);
        const Argument o_view = call.real(o, "o", in.q.view.shape), lse_view = call.state(lse, "lse", {in.tokens, in.heads});
        if (in.tokens == 0) return;
        Attention g;
        g.shape = in.shape;
        g.q = in.q.view.data, g.k = in.k.view.data, g.v = in.v.view.data;
        g.q_row = in.q_row(), g.k_row = in.k_row(), g.v_row = in.k_row();
        g.o = o_view.view.data, g.o_row = in.q_row(), g.lse = lse_view.view.data;
        call.run(&KernelTable::flash_attention, g);
      },
      "q"_a, "k"_a, "v"_a, "cu_seqlens"_a, "o"_a, "lse"_a, py::kw_only(), "causal"_a, "window"_a, "scale"_a, "threads"_a,
      "level"_a = py::none(),
      "o [N, heads, d], lse [N, heads] from q, k, v; window 0: all earlier keys; kernels/flash_attention.h.");
  m.def(
      "flash_attention_backward",
      [](py::handle q, py::handle k, py::handle v, py::handle cu_seqlens, py::handle o, py::handle lse, py::handle d_o,
         py::handle dq, py::handle dk, py::handle dv, bool causal, std::int64_t window, double scale, int threads,
         const LevelName& level) {
        const Call call(q, "q", threads, level);
        const AttentionArguments in(call, q, k, v, cu_seqlens, causal, window, scale);
        const Argument o_view = call.real(o, "o", in.q.view.shape), lse_view = call.state(lse, "lse", {in.tokens, in.heads});
        const Argument d_o_view = call.real(d_o, "d_o", in.q.view.shape), dq_view = call.real(dq, "dq", in.q.view.shape);
        const Argument dk_view = call.real(dk, "dk", in.k.view.shape), dv_view = call.real(dv, "dv", in.k.view.shape);
        if (in.tokens == 0) return;
        AttentionBackward g;
        g.shape = in.shape;
        g.q = in.q.view.data, g.k = in.k.view.data, g.v = in.v.view.data;
        g.q_row = in.q_row(), g.k_row = in.k_row(), g.v_row = in.k_row();
        g.o = o_view.view.data, g.lse = lse_view.view.data, g.d_o = d_o_view.view.data;
        g.o_row = in.q_row(), g.d_o_row = in.q_row();
        g.dq = dq_view.view.data, g.dk = dk_view.view.data, g.dv = dv_view.view.data;
        g.dq_row = in.q_row(), g.dk_row = in.k_row(), g.dv_row = in.k_row();
        call.run(&KernelTable::flash_attention_backward, g);
      },
      "q"_a, "k"_a, "v"_a, "cu_seqlens"_a, "o"_a, "lse"_a, "d_o"_a, "dq"_a, "dk"_a, "dv"_a, py::kw_only(), "causal"_a,
      "window"_a, "scale"_a, "threads"_a, "level"_a = py::none(), "dq, dk, dv from d_o and what the forward gave.");
}

// ---- norms

void bind_norms(py::module_& m) {
  m.def(
      "rms_norm",
      [](py::handle x, py::handle weight, py::handle y, py::handle rstd, const py::object& residual, const py::object& sum,
         double eps, int threads, const LevelName& level) {
        const Call call(x, "x", threads, level);
        const Argument x_view = call.real(x, "x", {-1, -1});
        const std::int64_t tokens = x_view.extent(0), d = x_view.extent(1);
        require_not_empty(d, "x", "column");
        require_eps(eps);
        const Argument weight_view = call.real(weight, "weight", {d}), y_view = call.real(y, "y", {tokens, d});
        const Argument rstd_view = call.state(rstd, "rstd", {tokens});
        const auto residual_view = call.optional_real(residual, "residual", {tokens, d});
        const auto sum_view = call.optional_real(sum, "sum", {tokens, d});
        if (residual_view.has_value() != sum_view.has_value())
          throw ArgumentError("arguments 'residual' and 'sum' must be given together");
        RmsNorm g;
        g.tokens = tokens, g.d = d, g.x = x_view.view.data, g.x_row = d, g.weight = weight_view.view.data, g.eps = eps;
        g.residual = data_of(residual_view), g.sum = data_of(sum_view);
        g.y = y_view.view.data, g.y_row = d, g.rstd = rstd_view.view.data;
        call.run(&KernelTable::rms_norm, g);
      },
      "x"_a, "weight"_a, "y"_a, "rstd"_a, py::kw_only(), "residual"_a = py::none(), "sum"_a = py::none(), "eps"_a, "threads"_a,
      "level"_a = py::none(), "y [tokens, d], rstd [tokens], and sum = x + residual where there is one; kernels/rms_norm.h.");
  m.def(
      "rms_norm_backward",
      [](py::handle x, py::handle weight, py::handle rstd, py::handle dy, py::handle dx, py::handle dweight, bool accumulate,
         int threads, const LevelName& level) {
        const Call call(x, "x", threads, level);
        const Argument x_view = call.real(x, "x", {-1, -1});
        const std::int64_t tokens = x_view.extent(0), d = x_view.extent(1);
        require_not_empty(d, "x", "column");
        const Argument weight_view = call.real(weight, "weight", {d}), rstd_view = call.state(rstd, "rstd", {tokens});
        const Argument dy_view = call.real(dy, "dy", {tokens, d}), dx_view = call.real(dx, "dx", {tokens, d});
        const Argument dweight_view = call.state(dweight, "dweight", {d});
        RmsNormBackward g;
        g.tokens = tokens, g.d = d, g.x = x_view.view.data, g.x_row = d, g.weight = weight_view.view.data;
        g.rstd = rstd_view.view.data, g.dy = dy_view.view.data, g.dy_row = d;
        g.dx = dx_view.view.data, g.dx_row = d, g.accumulate = accumulate, g.dweight = dweight_view.view.data;
        call.run(&KernelTable::rms_norm_backward, g);
      },
      "x"_a, "weight"_a, "rstd"_a, "dy"_a, "dx"_a, "dweight"_a, py::kw_only(), "accumulate"_a = false, "threads"_a,
      "level"_a = py::none(), "dx (+= with accumulate), dweight += ...");
  m.def(
      "layer_norm",
      [](py::handle x, py::handle weight, py::handle bias, py::handle y, py::handle mean, py::handle rstd,
         const py::object& residual, const py::object& sum, double eps, int threads, const LevelName& level) {
        const Call call(x, "x", threads, level);
        const Argument x_view = call.real(x, "x", {-1, -1});
        const std::int64_t tokens = x_view.extent(0), d = x_view.extent(1);
        require_not_empty(d, "x", "column");
        require_eps(eps);
        const Argument weight_view = call.real(weight, "weight", {d}), bias_view = call.real(bias, "bias", {d});
        const Argument y_view = call.real(y, "y", {tokens, d});
        const Argument mean_view = call.state(mean, "mean", {tokens}), rstd_view = call.state(rstd, "rstd", {tokens});
        const auto residual_view = call.optional_real(residual, "residual", {tokens, d});
        const auto sum_view = call.optional_real(sum, "sum", {tokens, d});
        if (residual_view.has_value() != sum_view.has_value())
          throw ArgumentError("arguments 'residual' and 'sum' must be given together");
        LayerNorm g;
        g.tokens = tokens, g.d = d, g.x = x_view.view.data, g.x_row = d, g.eps = eps;
        g.residual = data_of(residual_view), g.sum = data_of(sum_view);
        g.weight = weight_view.view.data, g.bias = bias_view.view.data;
        g.y = y_view.view.data, g.y_row = d, g.mean = mean_view.view.data, g.rstd = rstd_view.view.data;
        call.run(&KernelTable::layer_norm, g);
      },
      "x"_a, "weight"_a, "bias"_a, "y"_a, "mean"_a, "rstd"_a, py::kw_only(), "residual"_a = py::none(), "sum"_a = py::none(),
      "eps"_a, "threads"_a, "level"_a = py::none(),
      "y [tokens, d], mean, rstd [tokens], and sum = x + residual where there is one; kernels/layer_norm.h.");
  m.def(
      "layer_norm_backward",
      [](py::handle x, py::handle weight, py::handle mean, py::handle rstd, py::handle dy, py::handle dx, py::handle dweight,
         py::handle dbias, bool accumulate, int threads, const LevelName& level) {
        const Call call(x, "x", threads, level);
        const Argument x_view = call.real(x, "x", {-1, -1});
        const std::int64_t tokens = x_view.extent(0), d = x_view.extent(1);
        require_not_empty(d, "x", "column");
        const Argument weight_view = call.real(weight, "weight", {d});
        const Argument mean_view = call.state(mean, "mean", {tokens}), rstd_view = call.state(rstd, "rstd", {tokens});
        const Argument dy_view = call.real(dy, "dy", {tokens, d}), dx_view = call.real(dx, "dx", {tokens, d});
        const Argument dweight_view = call.state(dweight, "dweight", {d}), dbias_view = call.state(dbias, "dbias", {d});
        LayerNormBackward g;
        g.tokens = tokens, g.d = d, g.x = x_view.view.data, g.x_row = d, g.weight = weight_view.view.data;
        g.mean = mean_view.view.data, g.rstd = rstd_view.view.data, g.dy = dy_view.view.data, g.dy_row = d;
        g.dx = dx_view.view.data, g.dx_row = d, g.accumulate = accumulate;
        g.dweight = dweight_view.view.data, g.dbias = dbias_view.view.data;
        call.run(&KernelTable::layer_norm_backward, g);
      },
      "x"_a, "weight"_a, "mean"_a, "rstd"_a, "dy"_a, "dx"_a, "dweight"_a, "dbias"_a, py::kw_only(), "accumulate"_a = false,
      "threads"_a, "level"_a = py::none(), "dx (+= with accumulate), dweight += ..., dbias += ...");
}

// ---- element-wise kernels and look-ups

void bind_elementwise(py::module_& m) {
  m.def(
      "rope",
      [](py::handle x, py::handle positions, py::handle cosines, py::handle sines, py::handle y, bool backward, int threads,
         const LevelName& level) {
        const Call call(x, "x", threads, level);
        const Argument x_view = call.real(x, "x", {-1, -1, -1}), y_view = call.real(y, "y", x_view.view.shape);
        const std::int64_t tokens = x_view.extent(0), heads = x_view.extent(1), d = x_view.extent(2);
        if (d % 2 != 0) throw ArgumentError("rope needs an even head dimension, but argument 'x' is " + x_view.view.describe());
        const Argument cos_view = call.state(cosines, "cos", {-1, d / 2});
        const std::int64_t rows = cos_view.extent(0);
        const Argument sin_view = call.state(sines, "sin", {rows, d / 2}),
                       position_view = integers(positions, "positions", tokens);
        const std::int32_t* at = position_view.data<std::int32_t>();
        for (std::int64_t t = 0; readable() && t < tokens; ++t)
          if (at[t] < 0 || at[t] >= rows)
            throw ArgumentError("positions: position " + std::to_string(at[t]) + " of token " + std::to_string(t) +
                                " is outside the cos and sin tables of " + std::to_string(rows) + " rows");
        Rope g;
        g.tokens = tokens, g.heads = heads, g.d = d, g.x = x_view.view.data, g.x_row = heads * d;
        g.y = y_view.view.data, g.y_row = heads * d, g.positions = at;
        g.cos = cos_view.view.data, g.sin = sin_view.view.data, g.backward = backward;
        call.run(&KernelTable::rope, g);
      },
      "x"_a, "positions"_a, "cos"_a, "sin"_a, "y"_a, py::kw_only(), "backward"_a = false, "threads"_a, "level"_a = py::none(),
      "y [tokens, heads, d] = x rotated by its position, back with backward; kernels/rope.h.");
  m.def(
      "swiglu",
      [](py::handle gate, py::handle up, py::handle y, int threads, const LevelName& level) {
        const Call call(gate, "gate", threads, level);
        const Argument gate_view = call.real(gate, "gate", {-1, -1});
        const Shape& shape = gate_view.view.shape;
        const Argument up_view = call.real(up, "up", shape), y_view = call.real(y, "y", shape);
        call.run(&KernelTable::swiglu,
                 {shape[0], shape[1], gate_view.view.data, up_view.view.data, shape[1], y_view.view.data, shape[1]});
      },
      "gate"_a, "up"_a, "y"_a, py::kw_only(), "threads"_a, "level"_a = py::none(), "y = silu(gate) up, all [rows, columns].");
  m.def(
      "swiglu_backward",
      [](py::handle gate, py::handle up, py::handle dy, py::handle d_gate, py::handle d_up, int threads,
         const LevelName& level) {
        const Call call(gate, "gate", threads, level);
        const Argument gate_view = call.real(gate, "gate", {-1, -1});
        const Shape& shape = gate_view.view.shape;
        const Argument up_view = call.real(up, "up", shape), dy_view = call.real(dy, "dy", shape);
        const Argument d_gate_view = call.real(d_gate, "d_gate", shape), d_up_view = call.real(d_up, "d_up", shape);
        call.run(&KernelTable::swiglu_backward,
                 {shape[0], shape[1], gate_view.view.data, up_view.view.data, shape[1], dy_view.view.data, shape[1],
                  d_gate_view.view.data, d_up_view.view.data, shape[1]});
      },
      "gate"_a, "up"_a, "dy"_a, "d_gate"_a, "d_up"_a, py::kw_only(), "threads"_a, "level"_a = py::none(),
      "d_gate, d_up from dy, all [rows, columns].");
  m.def(
      "gelu",
      [](py::handle x, py::handle y, bool erf, int threads, const LevelName& level) {
        const Call call(x, "x", threads, level);
        const Argument x_view = call.real(x, "x", {-1}), y_view = call.real(y, "y", x_view.view.shape);
        call.run(&KernelTable::gelu, {x_view.extent(0), x_view.view.data, y_view.view.data, erf});
      },
      "x"_a, "y"_a, py::kw_only(), "erf"_a, "threads"_a, "level"_a = py::none(),
      "y [n] = gelu(x), tanh form or erf; kernels/gelu.h.");
  m.def(
      "gelu_backward",
      [](py::handle x, py::handle dy, py::handle dx, bool erf, int threads, const LevelName& level) {
        const Call call(x, "x", threads, level);
        const Argument x_view = call.real(x, "x", {-1});
        const Argument dy_view = call.real(dy, "dy", x_view.view.shape), dx_view = call.real(dx, "dx", x_view.view.shape);
        call.run(&KernelTable::gelu_backward, {x_view.extent(0), x_view.view.data, dy_view.view.data, dx_view.view.data, erf});
      },
      "x"_a, "dy"_a, "dx"_a, py::kw_only(), "erf"_a, "threads"_a, "level"_a = py::none(), "dx from dy, all [n].");
  m.def(
      "embedding",
      [](py::handle ids, py::handle table, py::handle y, int threads, const LevelName& level) {
        const Call call(table, "table", threads, level);
        const Argument table_view = call.real(table, "table", {-1, -1});
        const std::int64_t d = table_view.extent(1);
        const Argument id_view = token_ids(ids, "ids", -1, table_view.extent(0));
        const Argument y_view = call.real(y, "y", {id_view.extent(0), d});
        Embedding g;
        g.tokens = id_view.extent(0), g.d = d, g.ids = id_view.data<std::int32_t>();
        g.table = table_view.view.data, g.y = y_view.view.data;
        call.run(&KernelTable::embedding, g);
      },
      "ids"_a, "table"_a, "y"_a, py::kw_only(), "threads"_a, "level"_a = py::none(), "y [tokens, d] = table[ids].");
  m.def(
      "embedding_backward",
      [](py::handle ids, py::handle dy, py::handle dtable, int threads, const LevelName& level) {
        const Call call(dy, "dy", threads, level);
        const Argument dtable_view = call.state(dtable, "dtable", {-1, -1});
        const std::int64_t d = dtable_view.extent(1);
        const Argument id_view = token_ids(ids, "ids", -1, dtable_view.extent(0));
        const Argument dy_view = call.real(dy, "dy", {id_view.extent(0), d});
        call.run(&KernelTable::embedding_backward,
                 {id_view.extent(0), d, id_view.data<std::int32_t>(), dy_view.view.data, dtable_view.view.data});
      },
      "ids"_a, "dy"_a, "dtable"_a, py::kw_only(), "threads"_a, "level"_a = py::none(), "dtable[ids] += dy, token by token.");
}

// ---- linear_logprob

void bind_linear_logprob(py::module_& m) {
  m.def(
      "linear_logprob",
      [](py::handle hidden, py::handle weight, py::handle targets, py::handle logprob, py::handle entropy, py::handle lse,
         const py::object& z, double temperature, int threads, const LevelName& level) {
        const Call call(hidden, "hidden", threads, level);
        const Argument hidden_view = call.real(hidden, "hidden", {-1, -1});
        const std::int64_t rows = hidden_view.extent(0), d = hidden_view.extent(1);
        require_not_empty(d, "hidden", "column");
        require_positive(temperature, "temperature");
        const Argument weight_view = call.real(weight, "weight", {-1, d});
        const std::int64_t vocab = weight_view.extent(0);
        const Argument target_view = token_ids(targets, "targets", rows, vocab);
        const Argument logprob_view = call.state(logprob, "logprob", {rows}),
                       entropy_view = call.state(entropy, "entropy", {rows});
        const Argument lse_view = call.state(lse, "lse", {rows});
        const auto z_view = call.optional_state(z, "z", {rows, vocab});
        if (rows == 0) return;
        LinearLogprob g;
        g.rows = rows, g.hidden = d, g.vocab = vocab, g.x = hidden_view.view.data, g.weight = weight_view.view.data;
        g.targets = target_view.data<std::int32_t>(), g.temperature = temperature, g.z = data_of(z_view);
        g.logprob = logprob_view.view.data, g.entropy = entropy_view.view.data, g.lse = lse_view.view.data;
        call.run(&KernelTable::linear_logprob, g);
      },
      "hidden"_a, "weight"_a, "targets"_a, "logprob"_a, "entropy"_a, "lse"_a, py::kw_only(), "z"_a = py::none(),
      "temperature"_a, "threads"_a, "level"_a = py::none(),
      "logprob, entropy, lse [rows] from hidden [rows, d] and weight [vocab, d]; z [rows, vocab] receives the scaled "
      "logits where given; kernels/linear_logprob.h.");
  m.def(
      "linear_logprob_backward",
      [](py::handle hidden, py::handle weight, py::handle targets, py::handle entropy, py::handle lse, py::handle d_logprob,
         py::handle d_entropy, const py::object& dx, const py::object& dweight, const py::object& z, std::int64_t block_rows,
         double temperature, int threads, const LevelName& level) {
        const Call call(hidden, "hidden", threads, level);
        const Argument hidden_view = call.real(hidden, "hidden", {-1, -1});
        const std::int64_t rows = hidden_view.extent(0), d = hidden_view.extent(1);
        require_not_empty(d, "hidden", "column");
        require_positive(temperature, "temperature");
        const Argument weight_view = call.real(weight, "weight", {-1, d});
        const std::int64_t vocab = weight_view.extent(0);
        const Argument target_view = token_ids(targets, "targets", rows, vocab);
        const Argument entropy_view = call.state(entropy, "entropy", {rows}), lse_view = call.state(lse, "lse", {rows});
        const Argument d_logprob_view = call.state(d_logprob, "d_logprob", {rows});
        const Argument d_entropy_view = call.state(d_entropy, "d_entropy", {rows});
        const auto dx_view = call.optional_real(dx, "dx", {rows, d});
        const auto dweight_view = call.optional_state(dweight, "dweight", {vocab, d});
        const auto z_view = call.optional_state(z, "z", {rows, vocab});
        if (!z_view && block_rows < 1)
          throw ArgumentError("block_rows must be at least 1 where no logits are kept, but it is " +
                              std::to_string(block_rows));
        if (rows == 0) return;
        LinearLogprobBackward g;
        g.rows = rows, g.hidden = d, g.vocab = vocab, g.x = hidden_view.view.data, g.weight = weight_view.view.data;
        g.targets = target_view.data<std::int32_t>(), g.temperature = temperature;
        g.z = data_of(z_view), g.block_rows = block_rows, g.entropy = entropy_view.view.data, g.lse = lse_view.view.data;
        g.d_logprob = d_logprob_view.view.data, g.d_entropy = d_entropy_view.view.data;
        g.dx = data_of(dx_view), g.dweight = data_of(dweight_view);
        call.run(&KernelTable::linear_logprob_backward, g);
      },
      "hidden"_a, "weight"_a, "targets"_a, "entropy"_a, "lse"_a, "d_logprob"_a, "d_entropy"_a, py::kw_only(),
      "dx"_a = py::none(), "dweight"_a = py::none(), "z"_a = py::none(), "block_rows"_a = 0, "temperature"_a, "threads"_a,
      "level"_a = py::none(),
      "dx = ..., dweight += ...; z: the kept logits, overwritten; without them they are computed again, block_rows at a time.");
}

// ---- sums and the optimizer

void bind_sums(py::module_& m) {
  m.def(
      "total",
      [](py::handle x, py::handle out, const py::object& mask, const py::object& cu_seqlens, int threads,
         const LevelName& level) {
        const Call call(x, "x", threads, level, true);
        const Argument x_view = call.state(x, "x", {-1});
        const std::int64_t n = x_view.extent(0);
        std::optional<Argument> mask_view;
        if (!mask.is_none()) mask_view.emplace(mask, "mask", DType::boolean, Shape{n});
        std::optional<Sequences> sequences;
        if (!cu_seqlens.is_none()) sequences.emplace(cu_seqlens, n);
        const std::int64_t segments = sequences ? sequences->count : 1;
        const Argument out_view = call.state(out, "out", {segments});
        call.run(&KernelTable::total, {n, x_view.view.data, static_cast<const bool*>(data_of(mask_view)), segments,
                                       sequences ? sequences->data() : nullptr, out_view.view.data});
      },
      "x"_a, "out"_a, py::kw_only(), "mask"_a = py::none(), "cu_seqlens"_a = py::none(), "threads"_a, "level"_a = py::none(),
      "out [1], or [segments] with cu_seqlens: the sum of x [n] where mask; kernels/total.h.");
  m.def(
      "sum_of_squares",
      [](py::handle x, int threads, const LevelName& level) {
        const Call call(x, "x", threads, level, true);
        const Argument x_view = call.state(x, "x", {-1});
        double sum = 0;
        call.run(&KernelTable::sum_of_squares, {x_view.extent(0), x_view.view.data, &sum});
        return sum;
      },
      "x"_a, py::kw_only(), "threads"_a, "level"_a = py::none(), "The sum of the squares of x [n], added in double.");
  m.def(
      "adamw",
      [](py::handle p, py::handle g, py::handle exp_avg, py::handle exp_avg_sq, std::int64_t step, double lr,
         std::pair<double, double> betas, double eps, double weight_decay, double grad_scale, const py::object& copy,
         int threads, const LevelName& level) {
        const Call call(p, "p", threads, level, true);
        const Argument p_view = call.state(p, "p", {-1});
        const Shape& shape = p_view.view.shape;
        const Argument g_view = call.state(g, "g", shape), m_view = call.state(exp_avg, "exp_avg", shape);
        const Argument v_view = call.state(exp_avg_sq, "exp_avg_sq", shape);
        if (step < 1) throw ArgumentError("step counts from 1, but it is " + std::to_string(step));
        const auto [beta1, beta2] = betas;
        if (!(beta1 >= 0 && beta1 < 1 && beta2 >= 0 && beta2 < 1))
          throw ArgumentError("betas must be at least 0 and below 1, but they are " + std::to_string(beta1) + " and " +
                              std::to_string(beta2));
        AdamW a;
        a.n = shape[0], a.p = p_view.view.data, a.g = g_view.view.data, a.m = m_view.view.data, a.v = v_view.view.data;
        a.lr = lr, a.beta1 = beta1, a.beta2 = beta2, a.eps = eps, a.weight_decay = weight_decay, a.grad_scale = grad_scale;
        a.correction1 = 1 - std::pow(beta1, static_cast<double>(step));
        a.correction2 = 1 - std::pow(beta2, static_cast<double>(step));
        std::optional<Argument> copy_view;
        if (!copy.is_none()) {
          if (!call.rounds()) throw ArgumentError("argument 'copy' is for a device that computes in bfloat16");
          copy_view.emplace(call.real(copy, "copy", shape));
        }
        a.copy = data_of(copy_view);
        call.run(&KernelTable::adamw, a);
      },
      "p"_a, "g"_a, "exp_avg"_a, "exp_avg_sq"_a, py::kw_only(), "step"_a, "lr"_a, "betas"_a, "eps"_a, "weight_decay"_a,
      "grad_scale"_a = 1.0, "copy"_a = py::none(), "threads"_a, "level"_a = py::none(),
      "One AdamW step over p [n], in place; copy: of p as a device's kernels read it; kernels/adamw.h.");
}

}  // namespace

void bind_kernels(py::module_& m) {
  bind_matmul(m);
  bind_attention(m);
  bind_norms(m);
  bind_elementwise(m);
  bind_linear_logprob(m);
  bind_sums(m);
}

}  // namespace tutelage
