#include <cfenv>
#include <cstdint>
#include <vector>

#include "cuda/simt/fiber.h"
#include "test.h"

namespace {

// Two fibers and the test pass the turn round; what each keeps in registers and on its stack must survive.
struct Ring {
  simt::StackPointer at[3];  // the test, the first, the second
  std::vector<int> turns;
  double sums[2];
};
Ring* ring;

template <int Which>
void entry() {
  double sum = Which;  // in a callee-saved register, where the platform has one for floats
  std::int64_t count = 0;
  std::uint64_t more = 17;
  char filler[3000];  // a frame of some size
  for (char& c : filler) c = static_cast<char>(Which);
  for (;;) {
    ring->turns.push_back(Which);
    sum += static_cast<double>(++count) * 0.5, more = more * 31 + static_cast<std::uint64_t>(count);
    for (char c : filler) sum += c == Which ? 0 : 1e9;
    ring->sums[Which - 1] = sum + static_cast<double>(more % 2) * 0;
    simt::simt_switch(&ring->at[Which], ring->at[(Which + 1) % 3]);
  }
}

}  // namespace

TEST(a_switch_keeps_registers_and_stacks) {
  Ring own{};
  ring = &own;
  const simt::Stack first(1 << 16), second(1 << 16);
  own.at[1] = simt::make_fiber(first, entry<1>), own.at[2] = simt::make_fiber(second, entry<2>);
  std::int64_t a = 1, b = 2, c = 3;
  double x = 0.25;
  for (int i = 1; i <= 100; ++i) {
    simt::simt_switch(&own.at[0], own.at[1]);
    a += i, b += a, c += b, x = x * 0.5 + 1;
  }
  CHECK(own.turns.size() == 200, own.turns.size());
  for (std::size_t i = 0; i < 200; ++i) CHECK(own.turns[i] == (i % 2 ? 2 : 1), i, own.turns[i]);
  CHECK(own.sums[0] == 1 + 0.5 * 5050 && own.sums[1] == 2 + 0.5 * 5050, own.sums[0], own.sums[1]);
  CHECK(a == 5051 && b == 2 + 100 + 171700 && c > 0 && x > 1.99, a, b, c, x);
}

TEST(a_stack_has_the_size_asked_for_and_can_be_moved) {
  simt::Stack one(100000);
  CHECK(one.size() >= 100000 && one.size() % 4096 == 0, one.size());
  void* bottom = one.bottom();
  static_cast<char*>(bottom)[0] = 1;
  const simt::Stack other(std::move(one));
  CHECK(other.bottom() == bottom);
}
