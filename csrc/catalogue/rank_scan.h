// One task of the counting scan: a group of rows meets a run of items, chunk by chunk.
//
// Every pair (row, item) is scored in fp32 FMA and compared with the row's goal; the few inside the error band of
// band.h are decided as the ranking is defined, in fp64. Rows and items outside the band's preconditions are
// decided in fp64 throughout.
#pragma once

#include "catalogue/rank_exact.h"
#include "catalogue/rank_reducer.h"

namespace seqrec_fast::SEQREC_TIER {

constexpr int64_t kPairBuffer = 512;

SEQREC_INLINE int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// ---- scratch
// ----------------------------------------------------------------------------------------------------------

struct Scratch {
  int64_t* packed;  // [1] 1 + the first row of the group the panel holds; 0: none
  int64_t* plain;   // [1] how many rows of the group are scanned; they come first
  int64_t* index;   // [group] place in call.rows
  int64_t* total;   // [group + kLanes] counts of this task
  float* panel;     // see Panel
  Counters counters;
  float* staged;       // [chunk, width] items as contiguous fp32, unless they are that already
  float* start;        // [chunk] bias, or NaN: not scanned
  TileBand* band;      // [chunk / kTile]
  float* squares;      // [chunk] at least the squared norm of each item
  int64_t* special;    // [chunk] items decided in fp64 for every row
  int64_t* pair_slot;  // [kPairBuffer] undecided pairs
  int64_t* pair_item;
  ExactRows* exact_rows;  // [kWide] a block of the scan is kWide blocks in fp64
  ExactItems items;       // [chunk]
};

// With base null only the size is computed.
int64_t carve(const RankCall& call, const RankPlan& plan, void* base, Scratch& s) {
  int64_t used = 0;
  auto take = [&]<class Element>(Element*& pointer, int64_t count) {
    pointer = reinterpret_cast<Element*>(reinterpret_cast<uintptr_t>(base) + static_cast<uintptr_t>(used));
    used += round_up(count * static_cast<int64_t>(sizeof(Element)), 64);
  };
  const int64_t group = plan.group_rows, chunk = round_up(plan.chunk_items, kTile), width = call.width;
  take(s.packed, 1);
  take(s.plain, 1);
  take(s.index, group);
  take(s.total, group + kLanes);
  take(s.panel, group * width);
  take(s.counters.low, group);
  take(s.counters.high, group);
  take(s.counters.slope, group);
  take(s.counters.above, group);
  take(s.staged, chunk * width);
  take(s.start, chunk);
  take(s.band, chunk / kTile);
  take(s.squares, chunk);
  take(s.special, chunk);
  take(s.pair_slot, kPairBuffer);
  take(s.pair_item, kPairBuffer);
  take(s.exact_rows, kWide);
  for (int u = 0; u < kWide; ++u) {
    double* panel;
    take(panel, width * kLanes);
    if (base) s.exact_rows[u].panel = panel;
  }
  take(s.items.weights, chunk * width);
  take(s.items.bias, chunk);
  take(s.items.id, chunk);
  s.items.count = 0;
  return used;
}

// Half of a 1 MiB L2 for the queries of a group, 64 KiB for the items that meet them: on a 2 MiB L2 other sizes from
// half to twice these change the time by less than 2 %.
RankPlan make_plan(const RankCall& call) {
  const int64_t row_bytes = 4 * most(call.width, 1);
  RankPlan plan;
  plan.group_rows =
      least(round_up(most(call.num_rows, 1), kBlock), most((int64_t{1} << 19) / row_bytes / kBlock, 1) * kBlock);
  plan.chunk_items = most(least((int64_t{1} << 16) / row_bytes, 1024) / kTile, 1) * kTile;
  plan.chunk_items = least(plan.chunk_items, round_up(most(call.num_items, 1), kTile));
  Scratch unused;
  plan.scratch_bytes = carve(call, plan, nullptr, unused);
  return plan;
}

// ---- one task: a group of rows × a run of items
// -----------------------------------------------------------------------

template <class T>
struct Task {
  const RankCall& call;
  const RankPlan& plan;
  Scratch s;
  int64_t first_row, num_rows;
  int64_t pairs = 0;
  // The chunk at hand.
  int64_t first_item = 0, count = 0;
  const float* rows = nullptr;
  int64_t stride = 0;
  int64_t num_special = 0;

  // Step 1: pack the group. Rows that can be scanned come first, the others are decided in fp64.
  void pack() {
    if (*s.packed == first_row + 1) return;
    int64_t front = 0, back = num_rows;
    for (int64_t r = 0; r < num_rows; ++r) {
      const bool scanned = call.width <= kScanWidth && query_norm(first_row + r) <= kNormLimit;
      s.index[scanned ? front++ : --back] = first_row + r;
    }
    *s.plain = front;
    *s.packed = first_row + 1;
    for (int u = 0; u < kWide; ++u) s.exact_rows[u].first = -1;
    if constexpr (!kIsDouble<T>) {
      const Panel panel{s.panel, call.width, front};
      for (int64_t i = 0; i < round_up(front, kLanes) * call.width; ++i) s.panel[i] = 0.0f;
      for (int64_t slot = 0; slot < round_up(front, kBlock); ++slot) {
        const float infinite = __builtin_inff();
        Limits limits{infinite, infinite, 0.0f};
        if (slot < front) {
          const int64_t row = call.rows[s.index[slot]];
          pack_row(panel, slot, row_of<T>(call.query, row), call.query.column_stride,
                   call.scale * row_scale_of<T>(call, row));
          limits = limits_of(call.goal[s.index[slot]], query_norm(s.index[slot]), call.width);
        }
        s.counters.low[slot] = limits.low, s.counters.high[slot] = limits.high, s.counters.slope[slot] = limits.slope;
        s.counters.above[slot] = 0;
      }
    }
  }

  // |scale·q|, a little more than its rounding to fp32 can have; infinite or NaN where fp64 must decide.
  double query_norm(int64_t index) const {
    if constexpr (kIsDouble<T>) return __builtin_inf();
    const int64_t row = call.rows[index];
    if (!folds<T>(call, row)) return __builtin_inf();
    const T* query = row_of<T>(call.query, row);
    double squares = 0.0;
    for (int64_t k = 0; k < call.width; ++k) {
      const double x = static_cast<double>(value(query[k * call.query.column_stride]));
      squares += x * x;
    }
    return __builtin_sqrt(squares) * magnitude(call.scale * row_scale_of<T>(call, row)) * 1.000001;
  }

  // Step 2: make the chunk ready: contiguous fp32 rows, start values, the band of each tile, items that need fp64.
  void stage() {
    const int64_t padded = round_up(count, kTile), width = call.width;
    rows = s.staged, stride = width;
    bool direct = false;
    if constexpr (__is_same(T, float)) {
      direct = call.items.column_stride == 1 && padded == count;
      if (direct) rows = row_of<float>(call.items, first_item), stride = call.items.row_stride;
    }
    const float not_scanned = __builtin_nanf("");
    for (int64_t i = 0; i < count; ++i)
      s.start[i] = call.bias.data ? static_cast<float>(at<T>(call.bias, first_item + i)) : 0.0f;
    for (int64_t i = count; i < padded; ++i) s.start[i] = not_scanned;
    skip_items();
    num_special = 0;
    // Σw² as computed is within (width + 8)·u of the truth, plus 2^-126 a term that underflowed.
    const float inflate = 1.0f + static_cast<float>(width + 8) * 0x1p-22f,
                underflow = static_cast<float>(width) * 0x1p-126f;
    for (int64_t tile = 0; tile < padded; tile += kTile) {
      float squares = 0.0f, bias = 0.0f;
      for (int64_t i = tile; i < tile + kTile; ++i) {
        if (!direct) {
          if (i < count)
            read_row(row_of<T>(call.items, first_item + i), call.items.column_stride, width, s.staged + i * width);
          else
            for (int64_t k = 0; k < width; ++k) s.staged[i * width + k] = 0.0f;
        }
        const float own = sum_of_squares(rows + i * stride, width) * inflate + underflow;
        const float own_bias = __builtin_fabsf(s.start[i]);
        s.squares[i] = own;
        if (own <= 0x1p120f && own_bias <= kBiasLimit) {
          squares = own > squares ? own : squares;
          bias = own_bias > bias ? own_bias : bias;
          continue;
        }
        // NaN or -inf never ranks, whatever the row. (Skipped and padding items have NaN here.)
        if (s.start[i] > -__builtin_inff()) s.special[num_special++] = first_item + i;
        s.start[i] = not_scanned;
      }
      s.band[tile / kTile] = {__builtin_sqrtf(squares), static_cast<float>(relative_band(width)) * bias};
    }
  }

  // Items excluded for every row leave the scan here.
  void skip_items() {
    for (int64_t i = first_skipped(first_item); i < call.num_skipped && call.skipped[i] < first_item + count; ++i)
      s.start[call.skipped[i] - first_item] = __builtin_nanf("");
  }
  int64_t first_skipped(int64_t item) const {
    int64_t low = 0, high = call.num_skipped;
    while (low < high) {
      const int64_t middle = low + (high - low) / 2;
      if (call.skipped[middle] < item)
        low = middle + 1;
      else
        high = middle;
    }
    return low;
  }

  // Step 3: scan, and meanwhile fetch the next chunk.
  void scan(int64_t next_item, int64_t next_count) {
    const int64_t blocks = round_up(*s.plain, kBlock) / kBlock;
    const int64_t tiles = round_up(count, kTile) / kTile;
    const int64_t turns = call.width / kTurn;
    const bool fetch = call.items.column_stride == 1 && next_count > 0 && turns > 0;
    const int64_t bytes = next_count * call.items.row_stride * static_cast<int64_t>(sizeof(T));
    const char* next = reinterpret_cast<const char*>(row_of<T>(call.items, fetch ? next_item : first_item));
    // Rows far apart in memory are not worth fetching the gaps for.
    const bool dense = call.items.row_stride < 2 * call.width;
    const int64_t step = fetch && dense ? bytes / (blocks * tiles * turns) : 0;
    for (int64_t block = 0; block < blocks; ++block)
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const Ahead ahead{next, step};
        next += step * turns;
        if (*s.plain - block * kBlock > kLanes)
          scan_tile<kWide>(block * kBlock, tile, ahead);
        else
          scan_tile<1>(block * kBlock, tile, ahead);
      }
  }

  template <int Vectors>
  SEQREC_METHOD void scan_tile(int64_t slot, int64_t tile, const Ahead& ahead) {
    F32 score[kTile][Vectors];
    score_tile<Vectors>(s.panel + slot * call.width, call.width, rows + tile * kTile * stride, stride,
                        s.start + tile * kTile, ahead, score);
    const Counters counters{s.counters.low + slot, s.counters.high + slot, s.counters.slope + slot,
                            s.counters.above + slot};
    CountAbove<Vectors> reducer;
    if (__builtin_expect(reducer.reduce(score, counters, s.band[tile]), 1)) {
      reducer.add_to(counters);
      return;
    }
    float spilled[kTile * kBlock];
    for (int i = 0; i < kTile; ++i)
      for (int u = 0; u < Vectors; ++u) store(spilled + i * kBlock + u * kLanes, score[i][u]);
    decide(spilled, Vectors, slot, tile);
  }

  // Step 4, rarely: a tile with pairs inside its band. It is gone through again, item by item, with the band of the
  // item's own norm; the pairs left are noted for fp64. Where they are many (ties everywhere, say) the whole tile is
  // counted in fp64.
  __attribute__((noinline, cold)) void decide(const float* score, int vectors, int64_t slot, int64_t tile) {
    const int64_t limit = kTile * vectors * kLanes / 4;
    if (pairs + limit > kPairBuffer) flush();
    const int64_t before = pairs;
    I32 above[kWide]{};
    for (int64_t i = 0; i < kTile; ++i) {
      const int64_t item = tile * kTile + i;
      const F32 norm = broadcast(__builtin_sqrtf(s.squares[item])), bias = broadcast(s.band[tile].bias);
      for (int u = 0; u < vectors; ++u) {
        const int64_t first = slot + u * kLanes;
        const F32 x = load(score + i * kBlock + u * kLanes), width = fma(load(s.counters.slope + first), norm, bias);
        const I32 over = (I32)(x > load(s.counters.high + first) + width);
        above[u] -= over;
        uint32_t bits = mask_bits((I32)(x >= load(s.counters.low + first) - width) & ~over);
        for (; bits; bits &= bits - 1) {
          if (pairs - before == limit) {
            pairs = before;
            recount(slot, vectors, tile);
            return;
          }
          s.pair_slot[pairs] = first + __builtin_ctz(bits);
          s.pair_item[pairs++] = first_item + item;
        }
      }
    }
    for (int u = 0; u < vectors; ++u) {
      int32_t* to = s.counters.above + slot + u * kLanes;
      store(to, load(to) + above[u]);
    }
  }

  void recount(int64_t slot, int vectors, int64_t tile) {
    s.items.count = 0;
    for (int64_t i = tile * kTile; i < (tile + 1) * kTile; ++i)
      if (s.start[i] == s.start[i]) push_exact_item<T>(call, first_item + i, s.items);
    pad_exact_items(s.items, call.width);
    for (int u = 0; u < vectors && slot + u * kLanes < *s.plain; ++u) count_block(slot + u * kLanes, *s.plain);
  }

  void flush() {
    double score[kPairs];
    for (int64_t p = 0; p < pairs; p += kPairs) {
      const int n = static_cast<int>(least(kPairs, pairs - p));
      Pairs<T> batch{call, {}, {}};
      for (int j = 0; j < n; ++j) {
        batch.row[j] = call.rows[s.index[s.pair_slot[p + j]]];
        batch.item[j] = s.pair_item[p + j];
      }
      batch.score(n, score);
      for (int j = 0; j < n; ++j) {
        const int64_t slot = s.pair_slot[p + j];
        s.total[slot] += ranks_above(score[j], s.pair_item[p + j], goal_of<T>(call, s.index[slot]));
      }
    }
    pairs = 0;
  }

  // ---- fp64 for whole blocks ----

  // s.items against the rows from `slot` to `end`, at most kLanes of them.
  void count_block(int64_t slot, int64_t end) {
    ExactRows& rows = s.exact_rows[slot / kLanes % kWide];
    if (rows.first != slot) {
      pack_exact_rows<T>(call, s.index + slot, static_cast<int>(least(kLanes, end - slot)), rows);
      rows.first = slot;
    }
    count_exact<T>(call, rows, s.items, s.total + slot);
  }
  void count_blocks(int64_t begin, int64_t end) {
    pad_exact_items(s.items, call.width);
    for (int64_t slot = begin; slot < end; slot += kLanes) count_block(slot, end);
  }

  void all_items_in_fp64() {
    s.items.count = 0;
    int64_t skip = first_skipped(first_item);
    for (int64_t id = first_item; id < first_item + count; ++id) {
      if (skip < call.num_skipped && call.skipped[skip] == id)
        ++skip;
      else
        push_exact_item<T>(call, id, s.items);
    }
    count_blocks(*s.plain, num_rows);
  }

  void run(int64_t begin, int64_t end) {
    pack();
    for (int64_t slot = 0; slot < num_rows + kLanes; ++slot) s.total[slot] = 0;
    for (int64_t slot = 0; slot < plan.group_rows; ++slot) s.counters.above[slot] = 0;
    for (first_item = begin; first_item < end; first_item += count) {
      count = least(plan.chunk_items, end - first_item);
      if constexpr (!kIsDouble<T>) {
        if (*s.plain) {
          stage();
          const int64_t next = first_item + count;
          scan(next, least(plan.chunk_items, end - next));
          s.items.count = 0;
          for (int64_t i = 0; i < num_special; ++i) push_exact_item<T>(call, s.special[i], s.items);
          if (num_special) count_blocks(0, *s.plain);
        }
      }
      if (*s.plain < num_rows) all_items_in_fp64();
    }
    flush();
    for (int64_t slot = 0; slot < num_rows; ++slot) {
      const int64_t above = s.total[slot] + (slot < *s.plain ? s.counters.above[slot] : 0);
      // Whole numbers: the sum does not depend on which task adds first.
      __atomic_fetch_add(call.rank + call.rows[s.index[slot]], above, __ATOMIC_RELAXED);
    }
  }
};

}  // namespace seqrec_fast::SEQREC_TIER
