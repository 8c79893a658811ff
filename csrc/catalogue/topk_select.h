// The best items of a row among those seen so far: what is certain about their scores, and how the many are reduced to
// those that can still be among the k best.
#pragma once

#include "catalogue/chunk.h"
#include "catalogue/packed.h"

namespace seqrec_fast::SEQREC_TIER {

// ---- the k-th largest
// -----------------------------------------------------------------------------------------------

// Numbers whose order as integers is that of the scores: fp32 for every input but fp64.
template <class T>
struct ScoreOf {
  using Score = float;
  using Key = int32_t;
};
template <>
struct ScoreOf<double> {
  using Score = double;
  using Key = int64_t;
};

// Its own inverse.
template <class Key>
SEQREC_INLINE Key ordered(Key bits) {
  constexpr Key kSign = static_cast<Key>(static_cast<uint64_t>(1) << (8 * sizeof(Key) - 1));
  return bits ^ ((bits >> (8 * sizeof(Key) - 1)) & ~kSign);
}

// The k-th largest of keys[0 … padded), whose padding holds the smallest key of all; 1 <= k <= the rest. Bit by bit,
// from the counts of keys that are at least as large: no order of the data makes it slow.
template <class Key>
Key kth_largest(const Key* keys, int64_t padded, int64_t k) {
  using Unsigned = uint64_t;
  using Keys [[gnu::vector_size(kVectorBytes)]] = Key;
  constexpr int kStep = kVectorBytes / sizeof(Key);
  constexpr int kBits = 8 * sizeof(Key);
  Key found = static_cast<Key>(static_cast<Unsigned>(1) << (kBits - 1));
  for (int bit = kBits - 1; bit >= 0; --bit) {
    const Key trial = static_cast<Key>(static_cast<Unsigned>(found) + (static_cast<Unsigned>(1) << bit));
    Keys counts{};
    for (int64_t i = 0; i < padded; i += kStep) {
      Keys x;
      __builtin_memcpy(&x, keys + i, sizeof x);
      counts -= x >= trial;
    }
    int64_t count = 0;
    for (int lane = 0; lane < kStep; ++lane) count += counts[lane];
    if (count >= k) found = trial;
  }
  return found;
}
template <class Key>
SEQREC_INLINE int64_t pad_keys(Key* keys, int64_t count) {
  const int64_t padded = round_up(count, kVectorBytes / static_cast<int64_t>(sizeof(Key)));
  for (int64_t i = count; i < padded; ++i) keys[i] = static_cast<Key>(uint64_t{1} << (8 * sizeof(Key) - 1));
  return padded;
}

// ---- candidates
// -----------------------------------------------------------------------------------------------------

// Between two reductions a row admits half as many items as it keeps: with fewer, reductions take longer than what a
// higher bar would keep out.
// Four times as many from codes, whose wider band leaves more of them undecided: with less room they are
// decided in fp64 at nearly every reduction (8 % of the time at d = 256 and 100,000 items, nothing at 64 and a
// million).
constexpr int64_t kLeastRoom = 48;
SEQREC_INLINE int64_t capacity_of(const TopkCall& call) {
  const int64_t room = most(call.kept / 2, kLeastRoom);
  return least(call.kept + (scans_codes(call) ? 4 : 1) * room, call.num_items);
}

constexpr int64_t kAnyId = INT64_MAX;

// By slot: a row of the group.
template <class T>
struct Candidates {
  using Score = typename ScoreOf<T>::Score;
  using Key = typename ScoreOf<T>::Key;
  const TopkCall& call;
  int64_t capacity;  // more than `kept`, or as many as there are items
  int64_t* row;      // [group]
  int64_t* filled;   // [group + kLanes]
  double* bar;       // [group + kLanes] the row's Bar; rises. Unused slots: +inf
  int64_t* bar_id;
  double* norm;  // [group] of the scaled query; at most 2^60 where fp32 is used
  double* underflow;
  float* slope;  // [group] see Limits
  float* low;    // [group] what a score in fp32 must reach at norm 0 to reach the bar; +inf in unused lanes
  // The score of a candidate is between `floor` and `ceiling`; where these are equal, it is known.
  Score* floor;    // [group, capacity]
  Score* ceiling;  // [group, capacity]
  int64_t* id;     // [group, capacity]
  Key* keys;       // [capacity + kLanes]
  int64_t* tied;   // [capacity + kLanes]

  explicit Candidates(const TopkCall& of) : call(of), capacity(capacity_of(of)) {}

  void take(Layout& layout, const ScanPlan& plan) {
    const int64_t group = round_up(plan.group_rows, kBlock), all = plan.group_rows * capacity;
    row = layout.take<int64_t>(group);
    filled = layout.take<int64_t>(group + kLanes);
    bar = layout.take<double>(group + kLanes);
    bar_id = layout.take<int64_t>(group + kLanes);
    norm = layout.take<double>(group);
    underflow = layout.take<double>(group);
    slope = layout.take<float>(group);
    low = layout.take<float>(group);
    floor = layout.take<Score>(all);
    ceiling = layout.take<Score>(all);
    id = layout.take<int64_t>(all);
    keys = layout.take<Key>(capacity + kLanes);
    tied = layout.take<int64_t>(capacity + kLanes);
  }

  void set_bar(int64_t slot, double score, int64_t id_at_most) {
    bar[slot] = score, bar_id[slot] = id_at_most;
    if (norm[slot] <= kNormLimit) low[slot] = limits_of(score, norm[slot], call.width).low;
  }
  void raise(int64_t slot, double score, int64_t id_at_most) {
    if (score > bar[slot] || (score == bar[slot] && id_at_most < bar_id[slot])) set_bar(slot, score, id_at_most);
  }
  // The item that set the bar reaches it, too.
  bool reaches(int64_t slot, double score, int64_t item) const {
    return score > bar[slot] || (score == bar[slot] && item <= bar_id[slot]);
  }

  SEQREC_METHOD bool is_seen(const IdSets& seen, int64_t of_row, int64_t item) const {
    if (!seen.table) return false;
    const int64_t places = seen.begin[of_row + 1] - seen.begin[of_row];
    if (!places) return false;
    const int64_t bit = filter_bit(places, item);
    if (!(seen.filter[filter_words(seen.begin[of_row]) + bit / 64] >> (bit % 64) & 1)) return false;
    const int64_t* table = seen.table + seen.begin[of_row];
    return table[place_of_id(table, places, item)] == item;
  }

  // Seen items are looked for here, among the few that reach the bar, and never raise it.
  void add(int64_t slot, int64_t item, Score at_least, Score at_most) {
    if (is_seen(call.seen, row[slot], item)) return;
    if (filled[slot] == capacity) reduce(slot);
    const int64_t at = slot * capacity + filled[slot]++;
    floor[at] = at_least, ceiling[at] = at_most, id[at] = item;
  }
  void add_exact(int64_t slot, int64_t item, double score) {
    const Score rounded = static_cast<Score>(score + 0.0);  // -0 equals +0
    add(slot, item, rounded, rounded);
  }
  // x: the score in fp32, `error` beside it at most, underflow apart.
  void add_approximate(int64_t slot, int64_t item, float x, double error) {
    const double width = error * 1.000001 + underflow[slot], middle = static_cast<double>(x);
    const float ceiling_of = next_up(static_cast<float>(middle + width)) + 0.0f;
    if (static_cast<double>(ceiling_of) < bar[slot]) return;
    add(slot, item, next_down(static_cast<float>(middle - width)) + 0.0f, ceiling_of);
  }

  // Drops what is certainly not among the k best; more than k must be there.
  __attribute__((noinline)) void reduce(int64_t slot) {
    raise(slot, kth_floor(slot, call.kept), kAnyId);
    keep_if(slot, [&](int64_t at) { return static_cast<double>(ceiling[at]) >= bar[slot]; });
    // Where too many are left (ties, or nearly), they are told apart as the ranking is defined.
    if (filled[slot] > call.kept + (capacity - call.kept) / 2) decide(slot);
  }

  // Leaves the k best, with their scores.
  __attribute__((noinline)) void decide(int64_t slot) {
    score_exactly(slot);
    keep_if(slot, [&](int64_t at) { return reaches(slot, static_cast<double>(floor[at]), id[at]); });
    if (filled[slot] <= call.kept) return;
    const Score kth = kth_floor(slot, call.kept);
    int64_t above = 0, ties = 0;
    for (int64_t at = slot * capacity; at < slot * capacity + filled[slot]; ++at) {
      above += floor[at] > kth;
      if (floor[at] == kth) tied[ties++] = -id[at];
    }
    raise(slot, static_cast<double>(kth), -kth_largest(tied, pad_keys(tied, ties), call.kept - above));
    keep_if(slot, [&](int64_t at) { return reaches(slot, static_cast<double>(floor[at]), id[at]); });
  }

  void finish(int64_t slot) {
    if (filled[slot] > call.kept) reduce(slot);
    decide(slot);
  }

 private:
  Score kth_floor(int64_t slot, int64_t k) {
    const Score* from = floor + slot * capacity;
    for (int64_t i = 0; i < filled[slot]; ++i) {
      Key bits;
      __builtin_memcpy(&bits, from + i, sizeof bits);
      keys[i] = ordered(bits);
    }
    const Key key = ordered(kth_largest(keys, pad_keys(keys, filled[slot]), k));
    Score score;
    __builtin_memcpy(&score, &key, sizeof score);
    return score;
  }

  template <class Keep>
  SEQREC_METHOD void keep_if(int64_t slot, const Keep& keep) {
    const int64_t begin = slot * capacity, end = begin + filled[slot];
    int64_t to = begin;
    for (int64_t at = begin; at < end; ++at) {
      const bool kept = keep(at);
      floor[to] = floor[at], ceiling[to] = ceiling[at], id[to] = id[at];
      to += kept;
    }
    filled[slot] = to - begin;
  }

  void score_exactly(int64_t slot) {
    const int64_t begin = slot * capacity, end = begin + filled[slot];
    Pairs<T> pairs{call, {}, {}};
    int64_t places[kPairs];
    int waiting = 0;
    auto flush = [&] {
      double score[kPairs];
      pairs.score(waiting, score);
      for (int j = 0; j < waiting; ++j) floor[places[j]] = ceiling[places[j]] = static_cast<Score>(score[j] + 0.0);
      waiting = 0;
    };
    for (int64_t at = begin; at < end; ++at) {
      if (at + 2 * kPairs < end) fetch(id[at + 2 * kPairs]);
      if (floor[at] == ceiling[at]) continue;
      pairs.row[waiting] = row[slot], pairs.item[waiting] = id[at], places[waiting++] = at;
      if (waiting == kPairs) flush();
    }
    if (waiting) flush();
  }

  void fetch(int64_t item) const {
    const char* from = reinterpret_cast<const char*>(row_of<T>(call.items, item));
    const int64_t bytes = least(call.width * static_cast<int64_t>(sizeof(T)), 1024);
    if (call.items.column_stride == 1)
      for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(from + byte);
  }
};

}  // namespace seqrec_fast::SEQREC_TIER
