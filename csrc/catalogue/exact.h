// Scores as the ranking defines them: fp64 dot product in ascending k, times scale, plus bias, without contraction,
// rounded once to fp32 (not for fp64 input). The same bits on every tier: lanes are pairs, never parts of a sum.
#pragma once

#include "catalogue/tile.h"

namespace seqrec_fast::SEQREC_TIER {

SEQREC_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
SEQREC_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

template <class T>
constexpr bool kIsDouble = false;
template <>
inline constexpr bool kIsDouble<double> = true;

// The empty assembly keeps the two conversions apart: g++ 12 drops them in one branch of what it makes of Pairs::score
// at -O3 (a wrong result of its SLP vectoriser), and then ties are none.
SEQREC_INLINE double rounded_to_float(double x) {
  float y = static_cast<float>(x);
#if defined(__x86_64__)
  asm("" : "+x"(y));
#elif defined(__aarch64__)
  asm("" : "+w"(y));
#endif
  return y;
}

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

// Single pairs, four at a time: four chains of additions run at once, which hides most of their latency.
constexpr int kPairs = 4;

template <class T>
struct Pairs {
  const RankCall& call;
  int64_t row[kPairs];  // of query
  int64_t item[kPairs];

  SEQREC_METHOD void score(int count, double* out) const {
    const T* query[kPairs];
    const T* weights[kPairs];
    double sum[kPairs];
    for (int j = 0; j < kPairs; ++j) {
      const int from = j < count ? j : 0;
      query[j] = row_of<T>(call.query, row[from]);
      weights[j] = row_of<T>(call.items, item[from]);
      sum[j] = 0.0;
    }
    const int64_t query_step = call.query.column_stride, item_step = call.items.column_stride;
    for (int64_t k = 0; k < call.width; ++k)
#pragma GCC unroll 4
      for (int j = 0; j < kPairs; ++j)
        sum[j] += static_cast<double>(value(query[j][k * query_step])) *
                  static_cast<double>(value(weights[j][k * item_step]));
    for (int j = 0; j < count; ++j) {
      double s = sum[j] * call.scale * row_scale_of<T>(call, row[j]);
      if (call.bias.data) s += static_cast<double>(at<T>(call.bias, item[j]));
      out[j] = kIsDouble<T> ? s : rounded_to_float(s);
    }
  }
};

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

struct ExactItems {
  double* weights;  // [count rounded up to kTile][width]
  double* bias;     // NaN in the padding
  int64_t* id;
  int64_t count;
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

template <class T>
void push_exact_item(const RankCall& call, int64_t id, ExactItems& items) {
  const T* from = row_of<T>(call.items, id);
  double* to = items.weights + items.count * call.width;
  if (call.items.column_stride == 1)
    for (int64_t k = 0; k < call.width; ++k) to[k] = static_cast<double>(value(from[k]));
  else
    for (int64_t k = 0; k < call.width; ++k) to[k] = static_cast<double>(value(from[k * call.items.column_stride]));
  items.bias[items.count] = call.bias.data ? static_cast<double>(at<T>(call.bias, id)) : 0.0;
  items.id[items.count++] = id;
}

SEQREC_INLINE void pad_exact_items(ExactItems& items, int64_t width) {
  for (int64_t i = items.count; i % kTile; ++i) {
    items.bias[i] = __builtin_nan("");
    items.id[i] = -1;
    for (int64_t k = 0; k < width; ++k) items.weights[i * width + k] = 0.0;
  }
}

template <class T>
SEQREC_INLINE F64 rounded(F64 score) {
  if constexpr (kIsDouble<T>) return score;
  using Half = float __attribute__((vector_size(kVectorBytes / 2)));
  return __builtin_convertvector(__builtin_convertvector(score, Half), F64);
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
