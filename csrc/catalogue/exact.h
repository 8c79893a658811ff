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

// Single pairs, four at a time: four chains of additions run at once, which hides most of their latency.
constexpr int kPairs = 4;

template <class T>
struct Pairs {
  const LogitCall& call;
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

// Whole items, converted once.
struct ExactItems {
  double* weights;  // [count rounded up to kTile][width]
  double* bias;     // NaN in the padding
  int64_t* id;
  int64_t count;
};

template <class T>
void push_exact_item(const LogitCall& call, int64_t id, ExactItems& items) {
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

// Whole blocks: kLanes rows (two fp64 registers) × kTile items.
constexpr int kExactVectors = kLanes / kLanes64;
static_assert(kExactVectors == 2);

struct ExactRows {
  double* panel;  // [width][kLanes]
  double row_scale[kLanes];
  int count;      // lanes in use; the others hold zeros
  int64_t first;  // which rows the panel holds, -1: none
};

template <class T>
void pack_exact_row(const LogitCall& call, int64_t row, int lane, ExactRows& to) {
  const T* query = row_of<T>(call.query, row);
  to.row_scale[lane] = row_scale_of<T>(call, row);
  for (int64_t k = 0; k < call.width; ++k)
    to.panel[k * kLanes + lane] = static_cast<double>(value(query[k * call.query.column_stride]));
}
SEQREC_INLINE void pad_exact_rows(int64_t width, int count, ExactRows& to) {
  to.count = count;
  for (int lane = count; lane < kLanes; ++lane) {
    to.row_scale[lane] = 0.0;
    for (int64_t k = 0; k < width; ++k) to.panel[k * kLanes + lane] = 0.0;
  }
}

// Scores of kTile items, the first of which is items[first].
template <class T>
SEQREC_METHOD void score_exact_tile(const LogitCall& call, const ExactRows& rows, const ExactItems& items,
                                    int64_t first, F64 (&score)[kTile][kExactVectors]) {
  const int64_t width = call.width;
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
    const F64 row_scale = load(rows.row_scale + u * kLanes64);
#pragma GCC unroll 16
    for (int i = 0; i < kTile; ++i)
      score[i][u] = rounded<T>(sum[i][u] * call.scale * row_scale + items.bias[first + i]);
  }
}

}  // namespace seqrec_fast::SEQREC_TIER
