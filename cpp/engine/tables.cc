#include "engine/tables.h"

#include <algorithm>
#include <cmath>

#include "core/parallel.h"
#include "core/philox.h"
#include "engine/fixed_math.h"

namespace tutelage {
namespace {

constexpr double kTwoPi = 6.283185307179586;

double scaled_frequency(const RopeScaling& scaling, double frequency) {
  if (scaling.kind == RopeScaling::Kind::none) return frequency;
  if (scaling.kind == RopeScaling::Kind::linear) return frequency / scaling.factor;
  // Llama 3: wavelengths shorter than original / high_freq_factor stay, longer than original / low_freq_factor are divided
  const double turns = static_cast<double>(scaling.original_max_position_embeddings) * frequency / kTwoPi;
  if (turns > scaling.high_freq_factor) return frequency;
  if (turns < scaling.low_freq_factor) return frequency / scaling.factor;
  const double blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor);
  return (1 - blend) * frequency / scaling.factor + blend * frequency;
}

// Four normal numbers from one Philox block (Box & Muller 1958).
void four_normals(std::uint64_t seed, PhiloxCounter counter, double* out) {
  const PhiloxCounter bits = philox4x32(seed, counter);
  for (int pair = 0; pair < 2; ++pair) {
    // (bits + 1/2) / 2^32 lies inside (0, 1): the logarithm is finite
    const auto i = static_cast<std::size_t>(2 * pair);
    const double u = (bits[i] + 0.5) * 0x1p-32, v = (bits[i + 1] + 0.5) * 0x1p-32;
    const double radius = std::sqrt(-2 * fixed_log(u));
    const SinCos angle = fixed_sincos(kTwoPi * v);
    out[2 * pair] = radius * angle.cos;
    out[2 * pair + 1] = radius * angle.sin;
  }
}

// Four numbers that are uniform in (-1, 1).
void four_uniforms(std::uint64_t seed, PhiloxCounter counter, double* out) {
  const PhiloxCounter bits = philox4x32(seed, counter);
  for (std::size_t i = 0; i < 4; ++i) out[i] = (bits[i] + 0.5) * 0x1p-31 - 1;
}

double deviation(const Config& config, const Parameter& parameter) {
  switch (parameter.init) {
    case Parameter::Init::residual:
      return 0.02 / std::sqrt(2.0 * static_cast<double>(config.num_hidden_layers));
    case Parameter::Init::scalar_head:
      return 1 / std::sqrt(static_cast<double>(config.hidden_size) + 1);
    case Parameter::Init::uniform:
      return 1 / std::sqrt(static_cast<double>(parameter.shape.back()));
    default:
      return 0.02;
  }
}

}  // namespace

RopeTables rope_tables(const Config& config, std::int64_t positions, int threads) {
  const std::int64_t half = config.head_dim / 2;
  std::vector<float> frequencies(static_cast<std::size_t>(half));
  for (std::int64_t i = 0; i < half; ++i) {
    const double exponent = static_cast<double>(2 * i) / static_cast<double>(config.head_dim);
    const double frequency = fixed_exp(-exponent * fixed_log(config.rope_theta));
    frequencies[static_cast<std::size_t>(i)] = static_cast<float>(scaled_frequency(config.rope_scaling, frequency));
  }
  RopeTables tables;
  tables.cos.resize(static_cast<std::size_t>(positions * half));
  tables.sin.resize(static_cast<std::size_t>(positions * half));
  parallel_for(threads, positions, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t p = begin; p < end; ++p)
      for (std::int64_t i = 0; i < half; ++i) {
        const float angle = static_cast<float>(p) * frequencies[static_cast<std::size_t>(i)];
        const SinCos value = fixed_sincos(static_cast<double>(angle));
        tables.cos[static_cast<std::size_t>(p * half + i)] = static_cast<float>(value.cos);
        tables.sin[static_cast<std::size_t>(p * half + i)] = static_cast<float>(value.sin);
      }
  });
  return tables;
}

void initialise(const Config& config, const std::vector<Parameter>& parameters, std::uint64_t seed, std::uint32_t stream,
                float* params, int threads) {
  for (std::size_t index = 0; index < parameters.size(); ++index) {
    const Parameter& parameter = parameters[index];
    float* to = params + parameter.offset;
    if (parameter.init == Parameter::Init::ones || parameter.init == Parameter::Init::zeros) {
      std::fill_n(to, parameter.size, parameter.init == Parameter::Init::ones ? 1.0f : 0.0f);
      continue;
    }
    const double scale = deviation(config, parameter);
    parallel_for(threads, (parameter.size + 3) / 4, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t block = begin; block < end; ++block) {
        double draws[4];
        const PhiloxCounter counter{static_cast<std::uint32_t>(block), static_cast<std::uint32_t>(block >> 32),
                                    static_cast<std::uint32_t>(index), stream};
        (parameter.init == Parameter::Init::uniform ? four_uniforms : four_normals)(seed, counter, draws);
        for (std::int64_t i = 0; i < 4 && block * 4 + i < parameter.size; ++i)
          to[block * 4 + i] = static_cast<float>(draws[i] * scale);
      }
    });
  }
}

}  // namespace tutelage
