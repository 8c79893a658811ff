// How far a score in fp32 can be from the score that defines a ranking.
#pragma once

#include "catalogue/tile.h"

namespace seqrec_fast::SEQREC_TIER {

// The scan computes â in fp32; the ranking is defined by s = fl32(S), with S the fp64 dot product in ascending k, times
// scale, plus bias. Let g be the row's goal (a float), q' = fl32(scale·q), u = 2^-24, M = |q'|·|w| + |bias| (Euclidean
// norms). Then
//   |â - (Σ q'ₖwₖ + bias)|        <= γ(d+1)·M     d fused steps from bias (one more rounding a step without FMA, each
//   on its
//                                                  own term, so d+1 on any one), γ(n) = n·u/(1 - n·u), Σ|q'ₖwₖ| <=
//                                                  |q'|·|w|
//   |Σ q'ₖwₖ - scale·Σ qₖwₖ|      <= u(1 + 2u)·M  rounding of q'
//   |S - (scale·Σ qₖwₖ + bias)|   <= 2^-53(d+3)·M·(1 + …)
// so |â - S| <= E = c·M with c = 1.05·(d + 6)·u for d <= 2^18, which keeps (d + 6)·u under 1/63 and thus γ within 1.6
// %. Underflow adds at most 2^-126 a step, and, where the thread flushes denormals, 2^-126 times the other factor:
// together less than 2^-126·(√d·(|q'| + |w|) + 3d). Overflow cannot happen: rows and items with a norm above 2^60, or a
// bias above 2^120, or anything not finite are kept out of the scan and decided in fp64.
//   â > g⁺ + E  =>  S >= g⁺  =>  s >= g⁺ > g: above.        g⁺, g⁻: the floats next to g
//   â < g⁻ - E  =>  S <= g⁻  =>  s <= g⁻ < g: below.
// Everything between is undecided and goes to fp64. For Gaussian data and a mid-rank target that is about 1 pair in
// 40,000 at d = 64. The limits are evaluated in fp32 a tile, from a term that grows with the tile's largest norm; their
// own roundings (two, each relative 2^-24) are covered by widening g⁺ and g⁻ by 2^-21 of themselves and by the 5 % in
// c.
constexpr int64_t kScanWidth = int64_t{1} << 18;
constexpr double kNormLimit = 0x1p60;
constexpr float kBiasLimit = 0x1p120f;

struct Limits {
  float low, high;  // at norm 0 and bias 0
  float slope;      // times the norm of an item
};

SEQREC_INLINE float next_up(float x) { return __builtin_nextafterf(x, __builtin_inff()); }
SEQREC_INLINE float next_down(float x) { return __builtin_nextafterf(x, -__builtin_inff()); }
SEQREC_INLINE double magnitude(double x) { return __builtin_fabs(x); }

// Whether the factors of a row may be multiplied into its query before the products are summed: a large or infinite one
// (or NaN) would make another sum of it.
template <class T>
SEQREC_INLINE bool folds(const LogitCall& call, int64_t row) {
  return magnitude(call.scale) <= kNormLimit && magnitude(row_scale_of<T>(call, row)) <= kNormLimit;
}

SEQREC_INLINE double relative_band(int64_t width) { return 1.05 * (static_cast<double>(width) + 6.0) * 0x1p-24; }

// What underflow adds whatever the item. 2^-120 where 2^-126 would do also covers denormal results of the limits' own
// evaluation.
SEQREC_INLINE double underflow_of(double norm, int64_t width) {
  const double d = static_cast<double>(width);
  return 0x1p-120 * (__builtin_sqrt(d) * (norm + 1.0) + 3.0 * d + 1.0);
}

// norm: |q'|, at most 2^60. goal: a float's value, or -inf.
SEQREC_INLINE Limits limits_of(double goal, double norm, int64_t width) {
  const double root = __builtin_sqrt(static_cast<double>(width)), underflow = underflow_of(norm, width);
  const double up = next_up(static_cast<float>(goal)), down = next_down(static_cast<float>(goal));
  const double slope = relative_band(width) * norm + root * 0x1p-120 + 0x1p-120;
  return {next_down(static_cast<float>(down - magnitude(down) * 0x1p-21 - underflow)),
          next_up(static_cast<float>(up + magnitude(up) * 0x1p-21 + underflow)),
          next_up(static_cast<float>(slope * 1.000001))};
}

}  // namespace seqrec_fast::SEQREC_TIER
