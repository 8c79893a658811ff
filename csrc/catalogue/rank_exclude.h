// The exclusion list of one row: which of its ids rank above the row's target.
//
// The scan counts excluded pairs like all others, and they are taken off afterwards: the hot loop knows nothing of
// exclusion, and a list costs as much as scoring its own ids.
#pragma once

#include "catalogue/rank_exact.h"
#include "catalogue/rank_reducer.h"

namespace seqrec_fast::SEQREC_TIER {

// The scaled query of one row, in fp32, and whether the error bound of band.h holds for it.
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
    const double scale = call.scale * row_scale_of<T>(call, row);
    bool usable = call.width <= kScanWidth && call.items.column_stride == 1 && folds<T>(call, row);
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

// A register of excluded items against one row, as in the scan but with the terms Σ|q'ₖwₖ| themselves in place of the
// product of norms. The order of the sum is another, which the bound does not mind; nothing overflows where |Σ| +
// |bias| is finite, and underflow is at most 2^-150 a step.
struct Places {
  uint32_t above;      // bit j: item j ranks above the target
  uint32_t undecided;  // bit j: fp64 must decide
};

template <class T>
SEQREC_INLINE Places quick_places(const QuickQuery& query, const RankCall& call, const int64_t* ids, int count) {
  float sums[kLanes], sizes[kLanes];
  const int64_t whole = query.width / kLanes * kLanes;
  const int left = static_cast<int>(query.width - whole);
  for (int j = 0; j < count; ++j) {
    const T* item = row_of<T>(call.items, ids[j]);
    F32 sum{}, size{};
    for (int64_t k = 0; k < whole; k += kLanes) {
      const F32 q = load(query.data + k), w = load(item + k);
      sum = fma(q, w, sum);
      size = fma(abs(q), abs(w), size);
    }
    if (left) {
      const F32 q = load_first(query.data + whole, left), w = load_first(item + whole, left);
      sum = fma(q, w, sum);
      size = fma(abs(q), abs(w), size);
    }
    const float bias = call.bias.data ? static_cast<float>(at<T>(call.bias, ids[j])) : 0.0f;
    sums[j] = reduce_add(sum) + bias;
    sizes[j] = reduce_add(size) + __builtin_fabsf(bias);
  }
  const F32 score = load_first(sums, count), size = load_first(sizes, count);
  const F32 width = size * static_cast<float>(relative_band(query.width) * 1.1);
  const I32 bounded = (I32)(size < 0x1p126f);
  const I32 above = bounded & (I32)(score > query.limits.high + width);
  const I32 below = bounded & (I32)(score < query.limits.low - width);
  const uint32_t all = (1u << count) - 1u;
  return {mask_bits(above) & all, ~mask_bits(above | below) & all};
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

// The list is taken a register of ids at a time; the items of the next are fetched while this one is scored.
template <class T, class Id>
struct ListAbove {
  const RankCall& call;
  const int64_t row;
  const Goal goal;
  const int64_t target;
  const QuickQuery quick;
  int64_t* above;
  int64_t found = 0;
  Pairs<T> pairs{call, {}, {}};
  int waiting = 0;

  void decide_pairs() {
    double score[kPairs];
    if (waiting) pairs.score(waiting, score);
    for (int j = 0; j < waiting; ++j)
      if (ranks_above(score[j], pairs.item[j], goal)) above[found++] = pairs.item[j];
    waiting = 0;
  }

  void decide(const int64_t* ids, int count) {
    Places places{0, (1u << count) - 1u};
    if constexpr (!kIsDouble<T>)
      if (quick.usable) places = quick_places<T>(quick, call, ids, count);
    // Without a branch: which of them rank above is as good as random.
    for (int j = 0; j < count; ++j) above[found] = ids[j], found += (places.above >> j) & 1u;
    for (; places.undecided; places.undecided &= places.undecided - 1) {
      pairs.row[waiting] = row;
      pairs.item[waiting++] = ids[__builtin_ctz(places.undecided)];
      if (waiting == kPairs) decide_pairs();
    }
  }

  void fetch(int64_t id) const {
    const char* from = reinterpret_cast<const char*>(row_of<T>(call.items, id));
    const int64_t bytes = least(call.width * static_cast<int64_t>(sizeof(T)), 1024);
    if (call.items.column_stride == 1)
      for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(from + byte);
  }

  // Returns false at an id that is out of range.
  bool run(const Id* ids, int64_t begin, int64_t end, bool padded, int64_t* bad) {
    int64_t batches[2][kLanes];
    int filled = 0, current = 0, previous = 0;
    for (int64_t i = begin; i < end; ++i) {
      if (padded && ids[i] == -1) {
        i = pass_padding(ids, i, end);
        if (i == end) break;
        if (ids[i] == -1) continue;
      }
      const int64_t id = ids[i];
      if (id < 0 || id >= call.num_items) {
        *bad = id;
        return false;
      }
      if (id == target) continue;
      fetch(id);
      batches[current][filled++] = id;
      if (filled < kLanes) continue;
      if (previous) decide(batches[1 - current], previous);
      previous = filled, filled = 0, current = 1 - current;
    }
    if (previous) decide(batches[1 - current], previous);
    if (filled) decide(batches[current], filled);
    decide_pairs();
    return true;
  }
};

// Into `above`, with room for one id more than the list has: the ids that rank above the row's target, in no particular
// order and as often as they are listed.
template <class T, class Id>
int64_t list_above(const RankCall& call, int64_t index, const Id* ids, int64_t begin, int64_t end, float* scratch,
                   int64_t* above, int64_t* bad) {
  const int64_t row = call.rows[index];
  const Goal goal = goal_of<T>(call, index);
  const int64_t target = static_cast<const int64_t*>(call.target.data)[row * call.target.stride];
  ListAbove<T, Id> list{call, row, goal, target, quick_query<T>(call, row, goal.score, scratch), above};
  return list.run(ids, begin, end, call.excluded.begin == nullptr, bad) ? list.found : -1;
}

}  // namespace seqrec_fast::SEQREC_TIER
