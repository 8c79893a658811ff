// exp, sigmoid and tanh in fp32 (at most 2 units in the last place, denormal results included) and fp64 (libm, per
// lane).
//
// All three reduce x = n·ln2 + r with |r| <= ln2/2 and use one polynomial, e^r - 1 = r + r^2·q(r). Its degree (5, so 7
// in all) is the lowest whose error (2e-9 relative to e^r - 1) vanishes beside fp32 rounding; coefficients by the Remez
// exchange with weight |r|, so that tanh keeps its relative accuracy near zero.
#pragma once

#include "vector.h"

namespace seqrec_fast::SEQREC_TIER {

struct Reduced {
  F32 n;                // a whole number
  I32 n_bits;           // the same as integer
  F32 r, r_squared, q;  // e^r - 1 = r + r_squared·q
};

// x must be NaN or within ±2^8·ln2.
SEQREC_INLINE Reduced reduce_for_exp(F32 x) {
  const F32 shift = broadcast(0x1.8p23f);  // adding it rounds to a whole number, kept in the low bits of the sum
  const F32 shifted = fma(x, broadcast(0x1.715476p0f), shift);
  const F32 n = shifted - shift;
  // ln2 in two parts; the first has 9 trailing zeros, so n times it is exact for |n| < 2^9.
  F32 r = fma(n, broadcast(-0x1.62e4p-1f), x);
  r = fma(n, broadcast(-0x1.7f7d1cp-20f), r);
  F32 q = fma(broadcast(0x1.a1a164p-13f), r, broadcast(0x1.6d7486p-10f));
  q = fma(q, r, broadcast(0x1.11109p-7f));
  q = fma(q, r, broadcast(0x1.5554aep-5f));
  q = fma(q, r, broadcast(0x1.555556p-3f));
  q = fma(q, r, broadcast(0x1p-1f));
  return {n, (I32)shifted - (I32)shift, r, r * r, q};
}

// p·2^n, rounded once also where the result is denormal; p in [0.5, 2], |n| <= 200.
SEQREC_INLINE F32 scale_by_power_of_two(F32 p, [[maybe_unused]] F32 n, [[maybe_unused]] I32 n_bits) {
#if defined(__AVX512F__)
  return (F32)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  const I32 half = n_bits >> 1;  // 2^n alone would leave the exponent range; its two factors do not
  return p * (F32)((half + 127) << 23) * (F32)((n_bits - half + 127) << 23);
#endif
}

SEQREC_INLINE F32 exp(F32 x) {
  // Beyond these e^x is 0 or infinite in fp32 anyway; NaN passes (see max, min).
  const F32 bounded = max(broadcast(-104.0f), min(broadcast(89.0f), x));
  const Reduced e = reduce_for_exp(bounded);
  const F32 leading = e.r + 1.0f;
  const F32 lost = e.r - (leading - 1.0f);  // what that sum rounded away
  return scale_by_power_of_two(leading + fma(e.r_squared, e.q, lost), e.n, e.n_bits);
}

// From q = σ(-|x|), so that nothing overflows and large negative x keeps its relative accuracy; 1 - q rounds once, so
// that 1 - σ(x), which the gradient reads, is as good as fp32 can hold it.
SEQREC_INLINE F32 sigmoid(F32 x) {
  const F32 e = exp((F32)((I32)x | (int32_t)0x80000000));
  const F32 denominator = e + 1.0f;
  F32 q = e / denominator;
  const F32 lost = e - (denominator - 1.0f);  // give back what the denominator lost: q·lost/denominator, where
  q = fma(q * lost, q - 1.0f, q);             // 1/denominator = 1 - q
  return select(x < 0.0f, q, 1.0f - q);
}

// (e^2|x| - 1) / (e^2|x| + 1), with e^2|x| - 1 computed without cancellation.
SEQREC_INLINE F32 tanh(F32 x) {
  const F32 bounded = min(broadcast(20.0f), abs(x) * 2.0f);  // tanh 10 rounds to 1
  const Reduced e = reduce_for_exp(bounded);
  const F32 power = (F32)((e.n_bits + 127) << 23);
  const F32 expm1 = fma(power, fma(e.r_squared, e.q, e.r), power - 1.0f);
  const F32 denominator = expm1 + 2.0f;
  const F32 y = expm1 / denominator;
  // As in sigmoid; here 1/denominator = (1 - y)/2, and the larger term must be the one taken away first.
  const F32 two = broadcast(2.0f);
  const F32 lost = min(expm1, two) - (denominator - max(expm1, two));
  return copy_sign(fma(y * lost, (y - 1.0f) * 0.5f, y), x);
}

// ---- for quotients that share a division ----------------------------------------------------------------------------
// A division takes as long as 30 multiply-adds, so a product of several of these functions is formed as one quotient:
// sigmoid(x) = 1/one_plus_exp(-x) and tanh(x) = -m/(m + 2) with m = expm1_of(-2x). Relative accuracy as above.

// 1 + e^x, bounded by 1 + e^limit.
SEQREC_INLINE F32 one_plus_exp(F32 x, float limit) {
  const Reduced e = reduce_for_exp(max(broadcast(-104.0f), min(broadcast(limit), x)));
  return scale_by_power_of_two(fma(e.r_squared, e.q, e.r) + 1.0f, e.n, e.n_bits) + 1.0f;
}

// e^x - 1 without cancellation near zero, bounded by e^18: beyond that (m + 2)/m is 1 in fp32.
SEQREC_INLINE F32 expm1_of(F32 x) {
  const Reduced e = reduce_for_exp(max(broadcast(-40.0f), min(broadcast(18.0f), x)));
  const F32 power = (F32)((e.n_bits + 127) << 23);
  return fma(power, fma(e.r_squared, e.q, e.r), power - 1.0f);
}

SEQREC_INLINE F64 exp(F64 x) {
  for (int i = 0; i < kLanes64; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}
SEQREC_INLINE F64 sigmoid(F64 x) {
  const F64 e = exp((F64)((I64)x | INT64_MIN));
  return select(x < 0.0, e, broadcast(1.0)) / (e + 1.0);
}
SEQREC_INLINE F64 tanh(F64 x) {
  for (int i = 0; i < kLanes64; ++i) x[i] = __builtin_tanh(x[i]);
  return x;
}

}  // namespace seqrec_fast::SEQREC_TIER
