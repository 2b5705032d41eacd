// What the tests of rms_norm and layer_norm share: one case, run through the kernels, the CPU's kernels, the formula in double
// and in bf16.
#pragma once

#include "cuda/kernels/layer_norm.cuh"
#include "cuda/kernels/rms_norm.cuh"
#include "device.h"
#include "kernels/select.h"

namespace test {

namespace tk = tutelage;

struct NormCase {
  bool layer;  // LayerNorm; else RMSNorm
  int64_t tokens, groups, d;
  bool gather = false, residual = false, accumulate = false;
  int64_t pad = 8;  // of a row; odd: no 16-byte accesses
  std::string name() const {
    return text(layer ? "layer_norm" : "rms_norm", tokens, groups, d, "gather", gather, "residual", residual, "accumulate",
                accumulate, "pad", pad);
  }
};
constexpr double kNormEps = 1e-5;

// Operands, and outputs beside what they held before; T is bf16 on the device, float on the CPU.
template <class T>
struct NormOperands {
  int64_t x_row, y_row, sources;
  Memory<int32_t> gather;
  Memory<T> x, residual, weight, bias, dy, sum, y, dx;
  Memory<float> mean, rstd, dweight, dbias;

  // The values are functions of (token, column), not of the pitch.
  explicit NormOperands(const NormCase& c) : x_row(c.groups * c.d + c.pad), y_row(x_row) {
    sources = c.gather ? 2 * c.tokens + 1 : c.tokens;
    if (c.gather) gather = Memory<int32_t>(c.tokens);
    for (int64_t t = 0; t < gather.size(); ++t) gather[t] = int32_t(sources - 1 - 2 * t);  // every other row, backwards
    x = matrix(c, sources, 1), residual = matrix(c, sources, 2), dy = matrix(c, c.tokens, 5), dx = matrix(c, sources, 8);
    weight = row(c.d, 3), bias = row(c.d, 4);
    sum = filled(sources * x_row), y = filled(c.tokens * y_row);
    mean = Memory<float>(c.tokens), rstd = Memory<float>(c.tokens * c.groups);
    dweight = random_float(c.d, 6), dbias = random_float(c.d, 7);
  }
  static T number(double v) {
    if constexpr (sizeof(T) == 2)
      return to_bf16(static_cast<float>(v));
    else
      return static_cast<T>(to_float(to_bf16(static_cast<float>(v))));
  }
  static Memory<T> filled(int64_t n) {
    Memory<T> m(n);
    for (T& e : m) e = number(7);
    return m;
  }
  static Memory<T> row(int64_t d, std::uint64_t seed) {
    Memory<T> m(d);
    for (int64_t j = 0; j < d; ++j) m[j] = number(1 + 0.5 * uniform(seed, j));
    return m;
  }
  Memory<T> matrix(const NormCase& c, int64_t rows, std::uint64_t seed) const {
    Memory<T> m = filled(rows * x_row);
    const int64_t width = c.groups * c.d;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t j = 0; j < width; ++j)
        m[r * x_row + j] = number(uniform(seed, r * width + j) * (1 + static_cast<double>(r % 5)) + 0.3);
    return m;
  }
  int64_t source(int64_t t) const { return gather.size() ? gather[t] : t; }

  // Tokens [begin, end).
  tk::RmsNorm rms(const NormCase& c, int64_t begin, int64_t end) {
    const int64_t first = c.gather ? 0 : begin * x_row;
    return {end - begin,
            c.groups,
            c.d,
            x.data() + first,
            x_row,
            c.gather ? gather.data() + begin : nullptr,
            c.residual ? residual.data() + first : nullptr,
            c.residual ? sum.data() + first : nullptr,
            weight.data(),
            kNormEps,
            y.data() + begin * y_row,
            y_row,
            rstd.data() + begin * c.groups};
  }
  tk::RmsNormBackward rms_backward(const NormCase& c, int64_t begin, int64_t end) {
    const int64_t first = c.gather ? 0 : begin * x_row;
    return {end - begin,
            c.groups,
            c.d,
            (c.residual ? sum : x).data() + first,
            x_row,
            c.gather ? gather.data() + begin : nullptr,
            weight.data(),
            rstd.data() + begin * c.groups,
            dy.data() + begin * y_row,
            y_row,
            dx.data() + first,
            x_row,
            c.accumulate,
            dweight.data()};
  }
  tk::LayerNorm layer(const NormCase& c, int64_t begin, int64_t end) {
    const tk::RmsNorm r = rms(c, begin, end);
    return {r.tokens,      c.d,         r.x,      x_row, r.gather, r.residual,          r.sum,
            weight.data(), bias.data(), kNormEps, r.y,   y_row,    mean.data() + begin, rstd.data() + begin};
  }
  tk::LayerNormBackward layer_backward(const NormCase& c, int64_t begin, int64_t end) {
    const tk::RmsNormBackward r = rms_backward(c, begin, end);
    return {r.tokens, c.d,   r.x,  x_row, r.gather,     weight.data(),  mean.data() + begin, rstd.data() + begin,
            r.dy,     y_row, r.dx, x_row, c.accumulate, dweight.data(), dbias.data()};
  }
  bool operator==(const NormOperands& o) const {
    return sum == o.sum && y == o.y && mean == o.mean && rstd == o.rstd && dx == o.dx && dweight == o.dweight &&
           dbias == o.dbias;
  }
};

inline void device_forward(const NormCase& c, NormOperands<bf16>& o, int64_t begin, int64_t end) {
  if (c.layer)
    tk::cuda::layer_norm(o.layer(c, begin, end), nullptr);
  else
    tk::cuda::rms_norm(o.rms(c, begin, end), nullptr);
}
inline void device_backward(const NormCase& c, NormOperands<bf16>& o, int64_t begin, int64_t end) {
  if (c.layer)
    tk::cuda::layer_norm_backward(o.layer_backward(c, begin, end), nullptr);
  else
    tk::cuda::rms_norm_backward(o.rms_backward(c, begin, end), nullptr);
}
inline NormOperands<bf16> device_run(const NormCase& c) {
  NormOperands<bf16> o(c);
  device_forward(c, o, 0, c.tokens);
  device_backward(c, o, 0, c.tokens);
  return o;
}
inline NormOperands<float> cpu_run(const NormCase& c) {
  const tk::KernelTable& t = *tk::scalar_table();
  NormOperands<float> o(c);
  if (c.layer) {
    t.layer_norm(o.layer(c, 0, c.tokens), 1);
    t.layer_norm_backward(o.layer_backward(c, 0, c.tokens), 1);
  } else {
    t.rms_norm(o.rms(c, 0, c.tokens), 1);
    t.rms_norm_backward(o.rms_backward(c, 0, c.tokens), 1);
  }
  return o;
}

// Of every token and column: y and dx. In double, or in bf16 as torch computes it eagerly: statistics kept in float, every
// element-wise operation rounded.
template <class T>
std::pair<std::vector<double>, std::vector<double>> norm_formula(const NormCase& c) {
  const NormOperands<float> o(c);
  std::vector<double> ys, slopes;
  for (int64_t t = 0; t < c.tokens; ++t)
    for (int64_t group = 0; group < c.groups; ++group) {
      const int64_t at = o.source(t) * o.x_row + group * c.d, to = t * o.y_row + group * c.d;
      std::vector<T> v;
      double mean = 0, squares = 0, mean_w = 0, mean_wh = 0;
      const double n = static_cast<double>(c.d);
      for (int64_t j = 0; j < c.d; ++j) {
        v.push_back(c.residual ? T(o.x[at + j]) + T(o.residual[at + j]) : T(o.x[at + j]));
        mean += value(v.back()) / n;
      }
      if (!c.layer) mean = 0;
      for (const T& e : v) squares += (value(e) - mean) * (value(e) - mean) / n;
      const double rstd = 1 / std::sqrt(squares + kNormEps);
      std::vector<T> h, w;
      for (int64_t j = 0; j < c.d; ++j) {
        h.push_back(T((value(v[static_cast<std::size_t>(j)]) - mean) * rstd));
        w.push_back(T(o.dy[to + j]) * T(o.weight[j]));
        const T y = h.back() * T(o.weight[j]);
        ys.push_back(value(c.layer ? y + T(o.bias[j]) : y));
        if (c.layer) mean_w += value(w.back()) / n;
        mean_wh += value(w.back() * h.back()) / n;
      }
      for (int64_t j = 0; j < c.d; ++j) {
        const auto i = static_cast<std::size_t>(j);
        const T slope = T(rstd) * (w[i] - T(mean_w) - h[i] * T(mean_wh));
        slopes.push_back(value(c.accumulate ? T(o.dx[at + j]) + slope : slope));
      }
    }
  return {ys, slopes};
}

// y (or dx) without what lies between the rows, in the formula's order.
template <class T>
std::vector<double> rows_of(const NormCase& c, const NormOperands<T>& o, bool gradient) {
  std::vector<double> out;
  for (int64_t t = 0; t < c.tokens; ++t)
    for (int64_t j = 0; j < c.groups * c.d; ++j)
      out.push_back(value(gradient ? o.dx[o.source(t) * o.x_row + j] : o.y[t * o.y_row + j]));
  return out;
}
template <class T>
void check_between_rows(const NormCase& c, const NormOperands<T>& o) {  // nothing is written there
  const double pad = 7;
  const int64_t width = c.groups * c.d;
  for (int64_t r = 0; r < o.sources; ++r)
    for (int64_t j = width; j < o.x_row; ++j)
      CHECK(value(o.dx[r * o.x_row + j]) == pad && value(o.sum[r * o.x_row + j]) == pad);
  for (int64_t t = 0; t < c.tokens; ++t)
    for (int64_t j = width; j < o.y_row; ++j) CHECK(value(o.y[t * o.y_row + j]) == pad, c.name(), t, j);
}

inline void check_norm(const NormCase& c) {
  const NormOperands<bf16> mine = device_run(c);
  const NormOperands<float> cpu = cpu_run(c);
  const auto [y, dx] = norm_formula<double>(c);
  const auto [rounded_y, rounded_dx] = norm_formula<Rounded>(c);
  check_error(c.name() + " y", rows_of(c, mine, false), y, rounded_y);
  check_error(c.name() + " dx", rows_of(c, mine, true), dx, rounded_dx);
  check_error(c.name() + " y, CPU", rows_of(c, mine, false), rows_of(c, cpu, false), rounded_y);
  check_error(c.name() + " dx, CPU", rows_of(c, mine, true), rows_of(c, cpu, true), rounded_dx);
  const double tolerance = c.residual ? 0x1p-8 : 1e-5;  // the CPU's sum is not rounded to bf16
  check_close(c.name() + " rstd", mine.rstd, cpu.rstd, tolerance);
  check_close(c.name() + " dweight", mine.dweight, cpu.dweight, tolerance);
  if (c.layer) {
    check_close(c.name() + " mean", mine.mean, cpu.mean, tolerance);
    check_close(c.name() + " dbias", mine.dbias, cpu.dbias, 1e-5);
  }
  check_between_rows(c, mine);
}

// The same bits whatever the order of threads, for single tokens, for any cut (P1, P4), for rows that cannot be read in 16
// bytes, and next to rows full of NaN.
inline void check_norm_bits(const NormCase& c) {
  const NormOperands<bf16> whole = every_schedule([&] { return device_run(c); });
  for (int64_t cut : {int64_t(1), c.tokens / 2, c.tokens - 1}) {
    NormOperands<bf16> parts(c);
    for (auto [begin, end] : {std::pair<int64_t, int64_t>{0, cut}, {cut, c.tokens}}) device_forward(c, parts, begin, end);
    for (auto [begin, end] : {std::pair<int64_t, int64_t>{0, cut}, {cut, c.tokens}}) device_backward(c, parts, begin, end);
    CHECK(parts == whole, c.name(), cut);
  }
  NormCase odd = c;
  odd.pad = 3;
  const NormOperands<bf16> unaligned = device_run(odd);
  CHECK(rows_of(c, whole, false) == rows_of(odd, unaligned, false) && rows_of(c, whole, true) == rows_of(odd, unaligned, true),
        c.name());
  CHECK(whole.dweight == unaligned.dweight && whole.rstd == unaligned.rstd, c.name());
  NormOperands<bf16> beside(c);
  const int64_t bad = beside.source(c.tokens / 2);
  for (int64_t j = 0; j < c.groups * c.d; ++j) beside.x[bad * beside.x_row + j] = bf16{0xFFFF};
  device_forward(c, beside, 0, c.tokens);
  for (int64_t t = 0; t < c.tokens; ++t)
    for (int64_t j = 0; j < c.groups * c.d; ++j) {
      const bf16 y = beside.y[t * beside.y_row + j];
      if (t == c.tokens / 2)
        CHECK(std::isnan(to_float(y)), c.name(), t, j);
      else
        CHECK(y.bits == whole.y[t * beside.y_row + j].bits, c.name(), t, j);
    }
  // a control: the comparison notices one bit
  NormOperands<bf16> other = device_run(c);
  other.dweight[0] = std::nextafter(other.dweight[0], 9.0f);
  CHECK(!(other == whole));
}

inline std::vector<NormCase> norm_cases(bool layer) {
  std::vector<NormCase> cases = {{layer, 1, 1, 8},
                                 {layer, 5, 1, 37, false, true, true, 3},
                                 {layer, 3, 1, 1, true},
                                 {layer, 67, 1, 96, true, true, true},
                                 {layer, 4, 1, 1024, false, true},
                                 {layer, 3, 1, 1032, true, true, true},
                                 {layer, 2, 1, 4097, false, true, false, 2}};
  if (!layer) cases.push_back({layer, 11, 3, 64}), cases.push_back({layer, 4, 2, 20, true, false, true, 1});
  if (!kSmall) cases.push_back({layer, 2, 1, 9000, false, true, true});  // more than a thread keeps
  return cases;
}

}  // namespace test
