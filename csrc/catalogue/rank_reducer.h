// Counting what ranks above a goal, in a tile of scores.
#pragma once

#include "catalogue/chunk.h"
#include "catalogue/rank_call.h"

namespace seqrec_fast::SEQREC_TIER {

struct Counters {
  float* low;  // [group] as in Limits, +inf in unused lanes, which then count nothing
  float* high;
  float* slope;
  int32_t* above;  // [group]
};

template <int Vectors>
struct CountAbove {
  I32 above[Vectors];

  // True when every pair of the tile was decided; only then does `above` hold the tile's counts.
  SEQREC_METHOD bool reduce(const F32 (&score)[kTile][Vectors], const Counters& rows, const TileBand& band) {
    I32 undecided{};
#pragma GCC unroll 4
    for (int u = 0; u < Vectors; ++u) {
      const F32 width = fma(load(rows.slope + u * kLanes), broadcast(band.norm), broadcast(band.bias));
      const F32 low = load(rows.low + u * kLanes) - width, high = load(rows.high + u * kLanes) + width;
      I32 over{}, reached{};
      // NaN, the start value of items that are not scanned, fails both comparisons.
#pragma GCC unroll 16
      for (int i = 0; i < kTile; ++i) {
        over = select(score[i][u] > high, over + 1, over);
        reached = select(score[i][u] >= low, reached + 1, reached);
      }
      above[u] = over;
      undecided |= over ^ reached;
    }
    return !any(undecided != 0);
  }

  SEQREC_METHOD void add_to(const Counters& rows) const {
#pragma GCC unroll 4
    for (int u = 0; u < Vectors; ++u) store(rows.above + u * kLanes, load(rows.above + u * kLanes) + above[u]);
  }
};

}  // namespace seqrec_fast::SEQREC_TIER
