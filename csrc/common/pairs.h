// Products of bf16 pairs (AVX512_BF16): a lane adds the products of two numbers at once, in fp32, twice the rate of a
// fused multiply-add. Sums begin and end in fp32; denormal numbers count as zero, whatever the thread is set to.
//
// A pair lies along the dimension that is summed. Operands that are broadcast lie as rows of bf16, as in memory; those
// that fill lanes are interleaved: [depth / 2][columns] of pairs.
#pragma once

#include "common/gemm.h"

#if defined(__AVX512BF16__)
#define SEQREC_PAIRS 1
#endif

namespace seqrec_fast::SEQREC_TIER {

// The first number is in the low half.
struct BF16Pair {
  uint32_t bits;
};

SEQREC_INLINE int64_t pairs_in(int64_t count) { return (count + 1) / 2; }

SEQREC_INLINE uint16_t bf16_bits(float x) { return narrow_bf16(broadcast(x))[0]; }

#if defined(SEQREC_PAIRS)
template <>
struct Compute<BF16Pair> {
  using Scalar = BF16Pair;
  using Vector = F32;
  static constexpr int kWidth = kLanes;
};

// Their bits.
SEQREC_INLINE F32 load(const BF16Pair* p) { return load(reinterpret_cast<const float*>(p)); }
SEQREC_INLINE F32 load_first(const BF16Pair* p, int n) { return load_first(reinterpret_cast<const float*>(p), n); }
SEQREC_INLINE F32 broadcast(BF16Pair pair) { return (F32)_mm512_set1_epi32(static_cast<int>(pair.bits)); }

template <>
inline __attribute__((always_inline)) F32 multiply_add<BF16Pair>(F32 a, F32 b, F32 sum) {
  return (F32)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}

// to[0 … 31] = the two registers, rounded.
SEQREC_INLINE void store_rounded(BF16Pair* to, F32 first, F32 second) {
  _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first));
}

// Lane l: (low[l], high[l]), rounded.
SEQREC_INLINE void store_pairs(BF16Pair* to, F32 low, F32 high) {
  alignas(64) static constexpr uint16_t kOrder[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
  _mm512_storeu_si512(to, _mm512_permutexvar_epi16(_mm512_load_si512(kOrder), both));
}

// Lane l: (low[l], high[l]) of rows that are bf16 already.
SEQREC_INLINE void store_pairs(BF16Pair* to, U16 low, U16 high) {
  const U32 both = __builtin_convertvector(low, U32) | __builtin_convertvector(high, U32) << 16;
  store(reinterpret_cast<int32_t*>(to), (I32)both);
}

#endif

}  // namespace seqrec_fast::SEQREC_TIER
