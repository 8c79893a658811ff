// The tile instructions of tiles.h in plain C++, with the processor's order of additions and its treatment of denormal
// values. A use that the processor would refuse, or leave undefined, aborts.
#pragma once

#include <stdlib.h>
#include <string.h>

#include "vector.h"

namespace seqrec_fast::SEQREC_TIER {

struct TileShapes;

namespace emulated {

struct Registers {
  bool configured;
  uint16_t row_bytes[16];
  uint8_t rows[16];
  unsigned char data[8][16][64];
};

static inline Registers& registers() {
  static thread_local Registers all;
  return all;
}

static inline void require(bool condition) {
  if (!condition) abort();
}

// Null releases. Both leave every tile zero.
static inline void configure(const TileShapes* shapes) {
  Registers& all = registers();
  require(all.configured == (shapes == nullptr));
  memset(&all, 0, sizeof all);
  if (shapes == nullptr) return;
  const unsigned char* const bytes = (const unsigned char*)shapes;
  require(bytes[0] == 1);
  memcpy(all.row_bytes, bytes + 16, sizeof all.row_bytes);
  memcpy(all.rows, bytes + 48, sizeof all.rows);
  for (int i = 0; i < 16; ++i)
    require(i < 8 ? all.rows[i] > 0 && all.rows[i] <= 16 && all.row_bytes[i] > 0 && all.row_bytes[i] <= 64
                  : all.rows[i] == 0 && all.row_bytes[i] == 0);
  all.configured = true;
}

static inline void zero(int tile) {
  require(registers().configured);
  memset(registers().data[tile], 0, sizeof registers().data[tile]);
}

static inline void load(int tile, const void* from, int64_t stride) {
  Registers& all = registers();
  require(all.configured);
  zero(tile);
  for (int i = 0; i < all.rows[tile]; ++i)
    memcpy(all.data[tile][i], (const char*)from + i * stride, all.row_bytes[tile]);
}

static inline void store(int tile, void* to, int64_t stride) {
  const Registers& all = registers();
  require(all.configured);
  for (int i = 0; i < all.rows[tile]; ++i) memcpy((char*)to + i * stride, all.data[tile][i], all.row_bytes[tile]);
}

// Denormal operands and results count as zero.
static inline float flushed(float x) { return __builtin_fabsf(x) < 0x1p-126f ? 0.0f * x : x; }

static inline float half_of(uint32_t pair, int which) {
  const uint32_t bits = which ? pair & 0xffff0000u : pair << 16;
  float x;
  memcpy(&x, &bits, sizeof x);
  return flushed(x);
}

static inline void multiply(int sum, int left, int right) {
  Registers& all = registers();
  require(all.configured && sum != left && sum != right && left != right);
  require(all.rows[sum] == all.rows[left] && all.row_bytes[sum] == all.row_bytes[right] &&
          all.row_bytes[left] / 4 == all.rows[right]);
  for (int m = 0; m < all.rows[sum]; ++m) {
    float total[16][2] = {};
    for (int k = 0; k < all.rows[right]; ++k) {
      uint32_t a, b[16];
      memcpy(&a, all.data[left][m] + 4 * k, sizeof a);
      memcpy(b, all.data[right][k], sizeof b);
      for (int n = 0; n < all.row_bytes[right] / 4; ++n)
        for (int i = 0; i < 2; ++i) total[n][i] = flushed(__builtin_fmaf(half_of(a, i), half_of(b[n], i), total[n][i]));
    }
    for (int n = 0; n < all.row_bytes[right] / 4; ++n) {
      float was;
      memcpy(&was, all.data[sum][m] + 4 * n, sizeof was);
      was = flushed(flushed(was) + flushed(total[n][0] + total[n][1]));
      memcpy(all.data[sum][m] + 4 * n, &was, sizeof was);
    }
  }
}

}  // namespace emulated
}  // namespace seqrec_fast::SEQREC_TIER
