// For tests/backends/test_philox.py: prints the bytes of draw_drops for `units` units, as hexadecimal digits.
#include <stdio.h>
#include <stdlib.h>

#define SEQREC_TIER tier_test
#include "common/philox.h"

using namespace seqrec_fast::SEQREC_TIER;

int main(int count, char** arguments) {
  if (count != 7) return 2;
  uint64_t value[6];
  for (int i = 0; i < 6; ++i) value[i] = strtoull(arguments[i + 1], nullptr, 10);
  const auto [seed, stream, below, row, block, units] = value;
  const int64_t drawn = ((int64_t)units + kDropUnits - 1) / kDropUnits * kDropUnits;
  uint8_t* const drops = (uint8_t*)malloc(drawn);
  draw_drops({seed, (uint32_t)stream, (int32_t)below}, (uint32_t)row, (uint32_t)block, drawn, drops);
  for (uint64_t i = 0; i < units; ++i) printf("%02x", drops[i]);
  free(drops);
}
