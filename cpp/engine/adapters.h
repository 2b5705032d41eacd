// Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685): beside a frozen matrix W [out, in] two small ones that learn,
// A [rank, in] and B [out, rank]:   y = t B^T + x W^T,   t = scale (x A^T).
//
// Layout   a flat buffer of their own, under PEFT's names. q, k, v and gate, up are one matrix to the engine but modules apart
//          here: the A's of a group lie one after the other, so that one product makes all its t; each B has its own columns.
//          A model with a scalar head has that here too, for it always learns.
// Order    forward: the output starts as t B^T (as 0 where a module has no adapter) and the product with W continues that
//          chain, so whatever is fused to it sees the whole sum. A B of zeros starts every chain at +0: the base's own bits.
//          backward: dx starts as d_t A and the product with W continues. dA and dB are ONE chain each over the tokens,
//          continued from what the gradients hold (P4). t is made again for them: the same bits.
// Work     2 rows width (in + out) flops forward, three times that backward; width = rank x modules of the group.
// Test     tests/python/test_lora.py, test_peft.py.   Benchmark  bench/rollout.py (--lora_rank).
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "engine/config.h"
#include "engine/layout.h"
#include "engine/packed_weights.h"
#include "kernels/table.h"

namespace tutelage {

struct AdapterOptions {
  std::int64_t rank = 0;
  double scale = 1;
  std::vector<std::string> target_modules;  // endings of modules' names, as PEFT's; empty: every matrix of the blocks
};

class Adapters {
 public:
  // What belongs to one of the engine's matrices.
  struct Group {
    struct Module {
      std::int64_t column, out, b;  // its columns of the output, and where its B lies
    };
    std::int64_t weight, in, out;  // of the matrix
    std::int64_t a, width;         // all A's: [width, in]
    std::vector<Module> modules;
    bool whole;  // the modules cover all columns
  };

  Adapters(const Config& config, const Layout& base, const AdapterOptions& options);

  // Null where the matrix has no adapter.
  const Group* of(std::int64_t weight) const;

  const std::vector<Parameter>& parameters() const { return parameters_; }
  std::int64_t size() const { return size_; }
  std::int64_t head() const { return head_; }      // kAbsent: the base's
  std::int64_t widest() const { return widest_; }  // of t

  // Every A and B, for generation.
  std::vector<PackedWeights::Matrix> matrices() const;

  // t [rows, width] = scale x A^T.   x [rows, in]   packed: `matrices` in streaming order, or null
  void project(const KernelTable& table, const Group& group, const void* params, const PackedWeights* packed, std::int64_t rows,
               const void* x, void* t, int threads) const;
  // y [rows, out] = t B^T, for the product with W to continue.
  void begin_output(const KernelTable& table, const Group& group, const void* params, const PackedWeights* packed,
                    std::int64_t rows, const void* t, void* y, int threads) const;
  // d_t [rows, width] = scale dy B.   dy [rows, out]
  void project_back(const KernelTable& table, const Group& group, const void* params, std::int64_t rows, const void* dy,
                    void* d_t, int threads) const;
  // dx [rows, in] = d_t A, for the product with W to continue.
  void begin_input(const KernelTable& table, const Group& group, const void* params, std::int64_t rows, const void* d_t,
                   void* dx, int threads) const;
  // dA += d_t^T x, dB += dy^T t, products like `over_tokens`. fresh(offset): whether the gradient of the parameter there counts
  // as zero, and is overwritten.
  void gradients(const KernelTable& table, const Group& group, void* grads, const Matmul& over_tokens, const void* x,
                 const void* t, const void* dy, const void* d_t, const std::function<bool(std::int64_t)>& fresh,
                 int threads) const;

 private:
  void add_group(const Layout& base, std::int64_t weight, std::int64_t in, std::int64_t out,
                 const std::vector<std::string>& targets, std::vector<bool>& used);
  std::int64_t add(std::string name, std::vector<std::int64_t> shape, Parameter::Init init);

  std::int64_t rank_;
  double scale_;
  std::vector<Group> groups_;
  std::vector<Parameter> parameters_;
  std::int64_t size_ = 0, head_ = kAbsent, widest_ = 0;
};

}  // namespace tutelage
