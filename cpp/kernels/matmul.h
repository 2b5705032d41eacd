// C = A B, with what follows it fused.
//
// Shapes   A [m, k], B [k, n], C [m, n]. Element (i, p) of A lies at a[i * a_row + p * a_col], of B at
//          b[p * b_row + j * b_col]; of each pair of strides one is 1, so x W^T, dy W and dy^T x are the same operation.
//          C is row-major with pitch c_row.
// Formula  c_ij = start_ij + sum_p a_ip b_pj, start = c_ij (accumulate) or 0; then, for the finished sum:
//            scale      c *= scale; without bias, residual and activation
//            bias       c += bias_j
//            residual   c += residual_ij, after the bias; residual is not c
//            gelu*      activated = gelu(c), c kept
//            swiglu     n = 2f; c = [gate | up]; activated_ij = silu(gate_ij) up_ij, [m, f]
//            *_backward the sum is d(activated), not stored; `pre` holds what the forward kept; c = d(pre) and
//                       activated is computed again for the weight gradient (c [m, 2f] for swiglu, n = f); a residual is
//                       added to the sum first, and may lie where activated will
// Order    ONE chain of fused multiply-adds over ascending p for every element, whatever the tile, the block, the number
//          of threads or the ISA. Rows of C depend on their own row of A only. No element is split between threads.
// Work     2 m n k flops; reads A and B once into packed panels of cache size, C once per block of k.
// Test     tests/cpp/test_matmul.cc, tests/python/test_kernels.py.   Benchmark  bench/kernels.py (matmul).
#pragma once

#include <cstdint>

namespace tutelage {

enum class Activation : std::uint8_t { none, gelu, gelu_erf, swiglu, gelu_backward, gelu_erf_backward, swiglu_backward };

struct Matmul {
  std::int64_t m = 0, n = 0, k = 0;
  const void* a = nullptr;
  std::int64_t a_row = 0, a_col = 1;
  const void* b = nullptr;
  std::int64_t b_row = 1, b_col = 0;
  void* c = nullptr;
  std::int64_t c_row = 0;
  bool a_state = false,
       c_state = false;     // elements of state_size: gradients of log-probs and values; gradients of weights, values
  bool accumulate = false;  // not with the backward activations, whose sum is not stored
  double scale = 1;
  const void* bias = nullptr;      // [n]
  const void* residual = nullptr;  // [m, n], pitch residual_row
  std::int64_t residual_row = 0;
  Activation activation = Activation::none;
  void* activated = nullptr;
  std::int64_t activated_row = 0;
  const void* pre = nullptr;
  std::int64_t pre_row = 0;
  const void* packed = nullptr;  // B as pack_weight leaves it (b is not looked at); not for the backward activations
  bool packed_half = false;      // of bfloat16
  // Where k are tokens, for kernels that add the products of several k at once: {first k, how many} of each such step of at
  // most 16, none over the border of two sequences, so that gradients do not depend on how a batch was cut. Others take one k
  // at a time.
  const std::int32_t* k_steps = nullptr;
  std::int64_t k_step_count = 0;
};

}  // namespace tutelage
