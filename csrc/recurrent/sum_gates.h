// A cell's gates seen from its sums.
#pragma once

#include "sequence_cells.h"

namespace seqrec_fast::SEQREC_TIER {

// The gate whose rows of W_ih and of W_hh make a sum, or -1. The sums that both make come first.
template <class Cell>
struct SumGates {
  int input[kSumCount], hidden[kSumCount];
  int shared = 0;

  constexpr SumGates() : input{-1, -1, -1, -1}, hidden{-1, -1, -1, -1} {
    for (int gate = 0; gate < Cell::kGates; ++gate) {
      input[Cell::kInputSum[gate]] = gate;
      hidden[Cell::kHiddenSum[gate]] = gate;
    }
    while (shared < kSumCount && input[shared] >= 0 && hidden[shared] >= 0) ++shared;
  }
  // Whether some gate keeps W_ih·x and W_hh·h apart.
  constexpr bool apart() const { return shared < Cell::kGates; }
};
template <class Cell>
constexpr SumGates<Cell> kSumGates{};

}  // namespace seqrec_fast::SEQREC_TIER
