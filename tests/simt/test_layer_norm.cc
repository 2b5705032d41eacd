#include "norms.h"

using namespace test;

TEST(close_to_the_cpu_and_to_double) {
  for (const NormCase& c : norm_cases(true)) check_norm(c);
}

TEST(same_bits_for_any_schedule_cut_and_alignment) {
  for (const NormCase& c : norm_cases(true))
    if (c.tokens > 1 && c.d > 1) check_norm_bits(c);
}

TEST(memory_is_read_and_written_in_whole_sectors) {
  for (int64_t d : {64, 1024, 2048}) {
    const NormCase c{true, 9, 1, d, true, true, true, 64};
    check_memory_traffic(c.name(), [&] { device_run(c); });
  }
}
