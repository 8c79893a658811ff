// The exclusion list of one row: which of its ids rank above the row's target.
//
// The scan counts excluded pairs like all others, and they are taken off afterwards: the hot loop knows nothing of exclusion,
// and a list costs as much as scoring its own ids.
#pragma once

#include "catalogue/exact.h"
#include "catalogue/reducers.h"

namespace seqrec_fast::SEQREC_TIER {

enum class Place { kAbove, kBelow, kUndecided };

// The scaled query of one row, in fp32, and whether the error bound of reducers.h holds for it.
struct QuickQuery {
  const float* data;  // [width]
  int64_t width;
  Limits limits;  // at norm and bias 0
  bool usable;
};

template <class T>
QuickQuery quick_query(const RankCall& call, int64_t row, double goal, float* to) {
  QuickQuery quick{to, call.width, {}, false};
  if constexpr (!kIsDouble<T>) {
    const T* query = row_of<T>(call.query, row);
    const double scale = scale_of<T>(call, row);
    bool usable = call.width <= kScanWidth && call.items.column_stride == 1;
    for (int64_t k = 0; k < call.width; ++k) {
      const double x = static_cast<double>(value(query[k * call.query.column_stride])) * scale;
      // Rounding a denormal is not relative. (A comparison with NaN is false.)
      usable = usable && (x == 0.0 || (magnitude(x) >= 0x1p-126 && magnitude(x) <= kNormLimit));
      to[k] = static_cast<float>(x);
    }
    quick.usable = usable;
    quick.limits = limits_of(goal, 0.0, call.width);
  }
  return quick;
}

// As in the scan, with the terms Σ|q'ₖwₖ| themselves in place of the product of norms. The order of the sum is another, which
// the bound does not mind; nothing overflows where |Σ| + |bias| is finite, and underflow is at most 2^-150 a step.
template <class T>
SEQREC_INLINE Place quick_place(const QuickQuery& query, const T* item, float bias) {
  F32 sum{}, size{};
  int64_t k = 0;
  for (; k + kLanes <= query.width; k += kLanes) {
    const F32 q = load(query.data + k), w = load(item + k);
    sum = fma(q, w, sum);
    size = fma(abs(q), abs(w), size);
  }
  if (k < query.width) {
    const int left = static_cast<int>(query.width - k);
    const F32 q = load_first(query.data + k, left), w = load_first(item + k, left);
    sum = fma(q, w, sum);
    size = fma(abs(q), abs(w), size);
  }
  const float score = reduce_add(sum) + bias, bound = reduce_add(size) + __builtin_fabsf(bias);
  const float width = bound * static_cast<float>(relative_band(query.width) * 1.1);
  if (!(bound < 0x1p126f)) return Place::kUndecided;
  if (score > query.limits.high + width) return Place::kAbove;
  if (score < query.limits.low - width) return Place::kBelow;
  return Place::kUndecided;
}

SEQREC_INLINE int64_t id_at(const void* ids, bool are_64, int64_t i) {
  return are_64 ? static_cast<const int64_t*>(ids)[i] : static_cast<const int32_t*>(ids)[i];
}

// Where the padding that starts at `i` may end: eight ids of -1 are passed at a time.
template <class Id>
SEQREC_INLINE int64_t pass_padding(const Id* ids, int64_t i, int64_t end) {
  for (; i + 8 <= end; i += 8) {
    Id all = -1;
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) all &= ids[i + j];
    if (all != -1) break;
  }
  return i;
}

template <class T, class Id>
int64_t list_above(const RankCall& call, int64_t index, const Id* ids, int64_t begin, int64_t end, float* scratch, int64_t* above,
                   int64_t* bad) {
  const int64_t row = call.rows[index];
  const Goal goal = goal_of<T>(call, index);
  const int64_t target = static_cast<const int64_t*>(call.target.data)[row * call.target.stride];
  QuickQuery quick{};
  bool first = true;
  int64_t found = 0;
  int waiting = 0;
  Pairs<T> pairs{call, {}, {}};
  auto decide = [&] {
    double score[kPairs];
    if (waiting) pairs.score(waiting, score);
    for (int j = 0; j < waiting; ++j)
      if (ranks_above(score[j], pairs.item[j], goal)) above[found++] = pairs.item[j];
    waiting = 0;
  };
  for (int64_t i = begin; i < end; ++i) {
    int64_t id = ids[i];
    if (id == -1) {
      i = pass_padding(ids, i, end);
      if (i == end) break;
      id = ids[i];
      if (id == -1) continue;
    }
    if (id < 0 || id >= call.num_items) {
      *bad = id;
      return -1;
    }
    if (id == target) continue;
    if (first) quick = quick_query<T>(call, row, goal.score, scratch), first = false;
    if (i + 8 < end && static_cast<uint64_t>(ids[i + 8]) < static_cast<uint64_t>(call.num_items)) {
      const char* ahead = reinterpret_cast<const char*>(row_of<T>(call.items, ids[i + 8]));
      for (int64_t byte = 0; byte < 512 && byte < call.width * static_cast<int64_t>(sizeof(T)); byte += 64)
        __builtin_prefetch(ahead + byte);
    }
    if constexpr (!kIsDouble<T>) {
      if (quick.usable) {
        const float bias = call.bias.data ? at<T>(call.bias, id) : 0.0f;
        const Place place = quick_place<T>(quick, row_of<T>(call.items, id), bias);
        if (place == Place::kAbove) above[found++] = id;
        if (place != Place::kUndecided) continue;
      }
    }
    pairs.row[waiting] = row, pairs.item[waiting++] = id;
    if (waiting == kPairs) decide();
  }
  decide();
  return found;
}

}  // namespace seqrec_fast::SEQREC_TIER
