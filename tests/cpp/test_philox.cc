#include "core/philox.h"
#include "test.h"

using tutelage::philox4x32;
using tutelage::PhiloxCounter;

TEST(known_answers_of_random123) {  // kat_vectors, philox4x32 10 rounds; the key's first word is its low half
  CHECK((philox4x32(0, {0, 0, 0, 0}) == PhiloxCounter{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  CHECK((philox4x32(~0ull, {~0u, ~0u, ~0u, ~0u}) == PhiloxCounter{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  const PhiloxCounter pi{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344};
  CHECK((philox4x32(0x299f31d0a4093822, pi) == PhiloxCounter{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
  CHECK(philox4x32(0xa4093822299f31d0, pi)[0] != 0xd16cfe09, "the words of the key have an order");
}
