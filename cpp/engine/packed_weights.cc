#include "engine/packed_weights.h"

namespace tutelage {

PackedWeights::PackedWeights(const KernelTable& table, const std::vector<Matrix>& matrices, const void* params, bool half,
                             int threads, void (*poll)())
    : half_(half) {
  if (table.pack_weight == nullptr) return;  // its products read the plain weights
  Plan plan(table);
  if (half) plan.element = 2;
  for (const Matrix& m : matrices) {
    places_[m.offset] = plan.used;
    plan.take(packed_weight_elements(m.n, m.k, m.gate_up));
  }
  memory_ = Buffer(table, plan.used);
  for (const Matrix& m : matrices) {
    if (poll != nullptr) poll();
    PackWeight w;
    w.n = m.n, w.k = m.k, w.gate_up = m.gate_up, w.half = half;
    w.b = static_cast<const char*>(params) + m.offset * table.activation_size;
    w.b_row = m.transposed ? m.n : 1, w.b_col = m.transposed ? 1 : m.k;
    w.out = static_cast<char*>(memory_.data()) + places_[m.offset];
    table.pack_weight(w, threads);
  }
}

}  // namespace tutelage
