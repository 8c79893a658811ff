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

// Whole blocks: kLanes rows (two fp64 registers) × kTile items.
constexpr int kExactVectors = kLanes / kLanes64;
static_assert(kExactVectors == 2);

struct ExactRows {
  double* panel;  // [width][kLanes]
  double row_scale[kLanes];
  double score[kLanes];  // the goals
  int64_t id[kLanes];
  int64_t first;  // which rows the panel holds, -1: none
};

// rows: `count` places in call.rows.
template <class T>
void pack_exact_rows(const RankCall& call, const int64_t* rows, int count, ExactRows& to) {
  for (int lane = 0; lane < kLanes; ++lane) {
    if (lane >= count) {
      to.row_scale[lane] = 0.0, to.score[lane] = __builtin_inf(), to.id[lane] = -1;
      for (int64_t k = 0; k < call.width; ++k) to.panel[k * kLanes + lane] = 0.0;
      continue;
    }
    const int64_t row = call.rows[rows[lane]];
    const Goal goal = goal_of<T>(call, rows[lane]);
    const T* query = row_of<T>(call.query, row);
    to.row_scale[lane] = row_scale_of<T>(call, row), to.score[lane] = goal.score, to.id[lane] = goal.id;
    for (int64_t k = 0; k < call.width; ++k)
      to.panel[k * kLanes + lane] = static_cast<double>(value(query[k * call.query.column_stride]));
  }
}

// above[lane] += how many of the (padded) items rank above the lane's goal.
template <class T>
__attribute__((noinline)) void count_exact(const RankCall& call, const ExactRows& rows, const ExactItems& items,
                                           int64_t* above) {
  const int64_t width = call.width;
  I64 count[kExactVectors]{};
  for (int64_t first = 0; first < items.count; first += kTile) {
    F64 sum[kTile][kExactVectors]{};
    const double* weights = items.weights + first * width;
    for (int64_t k = 0; k < width; ++k) {
      F64 query[kExactVectors];
#pragma GCC unroll 2
      for (int u = 0; u < kExactVectors; ++u) query[u] = load(rows.panel + k * kLanes + u * kLanes64);
#pragma GCC unroll 16
      for (int i = 0; i < kTile; ++i) {
        const F64 weight = broadcast(weights[i * width + k]);
#pragma GCC unroll 2
        for (int u = 0; u < kExactVectors; ++u) sum[i][u] = sum[i][u] + query[u] * weight;
      }
    }
#pragma GCC unroll 2
    for (int u = 0; u < kExactVectors; ++u) {
      const F64 row_scale = load(rows.row_scale + u * kLanes64), goal = load(rows.score + u * kLanes64);
      I64 tie;
      __builtin_memcpy(&tie, rows.id + u * kLanes64, sizeof tie);
#pragma GCC unroll 16
      for (int i = 0; i < kTile; ++i) {
        const F64 score = rounded<T>(sum[i][u] * call.scale * row_scale + items.bias[first + i]);
        const I64 over = (I64)(score > goal), equal = (I64)(score == goal) & (I64)(items.id[first + i] < tie);
        count[u] -= over | equal;
      }
    }
  }
  for (int u = 0; u < kExactVectors; ++u)
    for (int lane = 0; lane < kLanes64; ++lane) above[u * kLanes64 + lane] += count[u][lane];
}

}  // namespace seqrec_fast::SEQREC_TIER
