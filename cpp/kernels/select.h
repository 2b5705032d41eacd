// Which kernel table this process uses.
//
// The best level that this build has, this CPU can run, and whose self-check passes: every kernel on one odd shape against the
// scalar level, memcmp. A mismatch is one loud line on stderr and the next level down. TUTELAGE_ISA=scalar|avx2|avx512|neon
// overrides (for tests); an unknown or impossible name is an error. Test: tests/cpp/test_levels.cc, tests/python/test_core.py.
#pragma once

#include <string>
#include <vector>

#include "kernels/table.h"

namespace tutelage {

struct Level {
  const KernelTable* table;
  bool supported;  // by this CPU
};
// All levels of this build, best first, scalar last.
std::vector<Level> levels();

// The level in use (chosen at the first call), and the float64 table.
const KernelTable& active_table();

// A level by name; throws ArgumentError naming what there is.
const KernelTable& find_table(const std::string& name);

// The name of the first kernel whose bits differ from the scalar level's; empty when all agree.
std::string self_check(const KernelTable& table);

}  // namespace tutelage
