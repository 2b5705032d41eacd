// The avx2 level: every kernel, compiled for this level only.
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "core/memory.h"
#include "core/parallel.h"
#include "core/philox.h"
#include "kernels/table.h"

namespace tutelage {
namespace {
using std::int32_t;
using std::int64_t;
using std::size_t;
using std::uint16_t;
using std::uint32_t;
using std::uint64_t;
using real = float;
#include "kernels/lanes_avx2.inc"
#include "kernels/all.inc"
constexpr KernelTable kTable = make_table("avx2");
}  // namespace

const KernelTable* avx2_table() { return &kTable; }
}  // namespace tutelage
