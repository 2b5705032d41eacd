// The scalar level with other tiles of keys and of the vocabulary: for the controls that their size is part of every bit.
#include <cstddef>
#include <cstdint>

#include "core/memory.h"
#include "core/parallel.h"
#include "core/philox.h"
#include "kernels/table.h"

#define TUTELAGE_KEY_TILE 64
#define TUTELAGE_VOCAB_TILE 128

namespace tutelage {
namespace {
using std::int32_t;
using std::int64_t;
using std::size_t;
using std::uint16_t;
using std::uint32_t;
using std::uint64_t;
using real = float;
#include "kernels/lanes_scalar.inc"
// all.inc follows the lanes, as in isa_scalar.cc
#include "kernels/all.inc"
constexpr KernelTable kTable = make_table("other tiles");
}  // namespace

const KernelTable* other_tiles_table() { return &kTable; }
}  // namespace tutelage
