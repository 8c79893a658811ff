// Counting in fp64, as the ranking defines scores: for rows and items outside the preconditions of the band.
#pragma once

#include "catalogue/exact.h"
#include "catalogue/rank_call.h"

namespace seqrec_fast::SEQREC_TIER {

struct Goal {
  double score;  // -inf for a target that comes after every ranked item
  int64_t id;    // wins ties against larger ids; -1 where score is -inf, so that items of score -inf never rank
};

template <class T>
SEQREC_INLINE Goal goal_of(const RankCall& call, int64_t index) {
  const double score = call.goal[index];
  const int64_t target = static_cast<const int64_t*>(call.target.data)[call.rows[index] * call.target.stride];
  return {score, score == -__builtin_inf() ? -1 : target};
}

// NaN and -inf never rank. -0 equals +0.
SEQREC_INLINE bool ranks_above(double score, int64_t id, const Goal& goal) {
  return score > goal.score || (score == goal.score && id < goal.id);
}

// The goals of a block of rows.
struct ExactGoals {
  double score[kLanes];
  int64_t id[kLanes];
};

// rows: `count` places in call.rows.
template <class T>
void pack_exact_rows(const RankCall& call, const int64_t* rows, int count, ExactRows& to, ExactGoals& goals) {
  for (int lane = 0; lane < kLanes; ++lane) {
    const Goal goal = lane < count ? goal_of<T>(call, rows[lane]) : Goal{__builtin_inf(), -1};
    goals.score[lane] = goal.score, goals.id[lane] = goal.id;
    if (lane < count) pack_exact_row<T>(call, call.rows[rows[lane]], lane, to);
  }
  pad_exact_rows(call.width, count, to);
}

// above[lane] += how many of the (padded) items rank above the lane's goal.
template <class T>
__attribute__((noinline)) void count_exact(const RankCall& call, const ExactRows& rows, const ExactGoals& goals,
                                           const ExactItems& items, int64_t* above) {
  I64 count[kExactVectors]{};
  for (int64_t first = 0; first < items.count; first += kTile) {
    F64 score[kTile][kExactVectors];
    score_exact_tile<T>(call, rows, items, first, score);
#pragma GCC unroll 2
    for (int u = 0; u < kExactVectors; ++u) {
      const F64 goal = load(goals.score + u * kLanes64);
      I64 tie;
      __builtin_memcpy(&tie, goals.id + u * kLanes64, sizeof tie);
#pragma GCC unroll 16
      for (int i = 0; i < kTile; ++i) {
        const I64 over = (I64)(score[i][u] > goal);
        const I64 equal = (I64)(score[i][u] == goal) & (I64)(items.id[first + i] < tie);
        count[u] -= over | equal;
      }
    }
  }
  for (int u = 0; u < kExactVectors; ++u)
    for (int lane = 0; lane < kLanes64; ++lane) above[u * kLanes64 + lane] += count[u][lane];
}

}  // namespace seqrec_fast::SEQREC_TIER
