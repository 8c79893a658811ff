// The counter-based generator Philox4x32-10 (Salmon et al. 2011), one counter a lane, and the dropout masks that
// seqrec_fast/backends/reference/_philox.py defines by it, bit for bit.
//
// A counter's four words live in 64-bit lanes of which only the lower halves count: the products that the generator
// needs are 32 × 32 → 64 bits, every tier has an instruction for those, and what it leaves in the upper halves is never
// read. A round is two products, two shifts and two three-way exclusive ors: ten are 60 instructions of AVX-512 (80
// where exclusive ors take two operands) for kLanes64 counters.
#pragma once

#include "vector.h"

namespace seqrec_fast::SEQREC_TIER {

using U64 = uint64_t __attribute__((vector_size(kVectorBytes)));

struct PhiloxWords {
  U64 w[4];  // in the lower halves
};

// The products of the lower halves.
SEQREC_INLINE U64 multiply_low(U64 a, uint32_t b) {
#if defined(__AVX512F__)
  return (U64)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
#elif defined(__AVX2__)
  return (U64)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#elif defined(__SSE2__)
  return (U64)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(b));
#else
  return (a & 0xffffffffu) * b;
#endif
}

// Two registers of counters at once share the keys of the rounds and hide the products' latency.
constexpr int kPhiloxVectors = 2;

SEQREC_INLINE void philox(PhiloxWords (&counters)[kPhiloxVectors], uint64_t key) {
  uint32_t k0 = (uint32_t)key, k1 = (uint32_t)(key >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round, k0 += 0x9e3779b9u, k1 += 0xbb67ae85u) {
#pragma GCC unroll 2
    for (auto& [w] : counters) {
      const U64 p0 = multiply_low(w[0], 0xd2511f53u), p1 = multiply_low(w[2], 0xcd9e8d57u);
      w[0] = (p1 >> 32) ^ w[1] ^ k0;
      w[1] = p1;
      w[2] = (p0 >> 32) ^ w[3] ^ k1;
      w[3] = p0;
    }
  }
}

constexpr int kStepsOfADraw = 8;  // one counter serves a unit for eight steps, 16 bits each

// A mask's part of the key: see _philox.py.
struct DropStream {
  uint64_t seed;
  uint32_t stream;
  int32_t below;  // of 2^16: a smaller draw drops
};

constexpr int64_t kDropUnits = kPhiloxVectors * kLanes64;

// Bit i of drops[u] = unit u of `row` is dropped at step 8·block + i, for `units` units, a multiple of kDropUnits.
static inline void draw_drops(const DropStream& d, uint32_t row, uint32_t block, int64_t units, uint8_t* drops) {
  using Bytes = uint8_t __attribute__((vector_size(kLanes64)));
  U64 unit{};
  for (int i = 0; i < kLanes64; ++i) unit[i] = i;
  for (int64_t first = 0; first < units; first += kDropUnits) {
    PhiloxWords words[kPhiloxVectors];
    for (auto& [w] : words) {
      w[0] = unit;
      w[1] = U64{} + block;
      w[2] = U64{} + row;
      w[3] = U64{} + d.stream;
      unit += kLanes64;
    }
    philox(words, d.seed);
    for (int v = 0; v < kPhiloxVectors; ++v) {
      U64 bits{};
#pragma GCC unroll 8
      for (int i = 0; i < kStepsOfADraw; ++i) {
        const U64 word = words[v].w[i / 2], draw = (i % 2 ? word >> 16 : word) & 0xffff;
        // Compared in halves, since not every tier compares 64 bits; the upper ones have no bit to keep.
        bits |= (U64)((I32)draw < d.below) & ((uint64_t)1 << i);
      }
      const Bytes narrow = __builtin_convertvector(bits, Bytes);
      __builtin_memcpy(drops + first + v * kLanes64, &narrow, sizeof narrow);
    }
  }
}

}  // namespace seqrec_fast::SEQREC_TIER
