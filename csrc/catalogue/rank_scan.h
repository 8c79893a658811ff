// One task of the counting scan: a group of rows meets a run of items, chunk by chunk.
//
// Every pair (row, item) is scored in fp32 FMA and compared with the row's goal; the few inside the error band of
// band.h are decided as the ranking is defined, in fp64. Rows and items outside the band's preconditions are
// decided in fp64 throughout.
#pragma once

#include "catalogue/chunk.h"
#include "catalogue/rank_exact.h"
#include "catalogue/rank_reducer.h"

namespace seqrec_fast::SEQREC_TIER {

constexpr int64_t kPairBuffer = 512;

struct Scratch {
  int64_t* packed;  // [1] 1 + the first row of the group the panel holds; 0: none
  int64_t* plain;   // [1] how many rows of the group are scanned; they come first
  int64_t* index;   // [group] place in call.rows
  int64_t* total;   // [group + kLanes] counts of this task
  float* panel;     // see Panel
  Counters counters;
  ScanChunk chunk;
  int64_t* pair_slot;  // [kPairBuffer] undecided pairs
  int64_t* pair_item;
  ExactRows* exact_rows;  // [kWide] a block of the scan is kWide blocks in fp64
  ExactGoals* exact_goals;
};

// With base null only the size is computed.
int64_t carve(const RankCall& call, const ScanPlan& plan, void* base, Scratch& s) {
  Layout layout(base);
  const int64_t group = plan.group_rows, width = call.width;
  s.packed = layout.take<int64_t>(1);
  s.plain = layout.take<int64_t>(1);
  s.index = layout.take<int64_t>(group);
  s.total = layout.take<int64_t>(group + kLanes);
  s.panel = layout.take<float>(group * width);
  s.counters.low = layout.take<float>(group);
  s.counters.high = layout.take<float>(group);
  s.counters.slope = layout.take<float>(group);
  s.counters.above = layout.take<int32_t>(group);
  s.chunk.take(layout, plan.chunk_items, width);
  s.pair_slot = layout.take<int64_t>(kPairBuffer);
  s.pair_item = layout.take<int64_t>(kPairBuffer);
  s.exact_rows = layout.take<ExactRows>(kWide);
  s.exact_goals = layout.take<ExactGoals>(kWide);
  for (int u = 0; u < kWide; ++u) {
    double* panel = layout.take<double>(width * kLanes);
    if (base) s.exact_rows[u].panel = panel;
  }
  return layout.bytes();
}

ScanPlan make_plan(const RankCall& call) {
  ScanPlan plan = usual_plan(call, call.num_rows);
  Scratch unused;
  plan.scratch_bytes = carve(call, plan, nullptr, unused);
  return plan;
}

// ---- one task: a group of rows × a run of items
// -----------------------------------------------------------------------

template <class T>
struct Task {
  const RankCall& call;
  const ScanPlan& plan;
  Scratch s;
  int64_t first_row, num_rows;
  int64_t pairs = 0;

  // Step 1: pack the group. Rows that can be scanned come first, the others are decided in fp64.
  void pack() {
    if (*s.packed == first_row + 1) return;
    int64_t front = 0, back = num_rows;
    for (int64_t r = 0; r < num_rows; ++r) {
      const bool scanned = norm_of(first_row + r) <= kNormLimit;
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
          limits = limits_of(call.goal[s.index[slot]], norm_of(s.index[slot]), call.width);
        }
        s.counters.low[slot] = limits.low, s.counters.high[slot] = limits.high, s.counters.slope[slot] = limits.slope;
        s.counters.above[slot] = 0;
      }
    }
  }

  double norm_of(int64_t index) const { return query_norm<T>(call, call.rows[index]); }

  // Step 2: scan, and meanwhile fetch the next chunk.
  void scan(int64_t next_item, int64_t next_count) {
    const int64_t blocks = round_up(*s.plain, kBlock) / kBlock;
    walk<T>(call, s.chunk, blocks, call.width / kTurn, next_item, next_count,
            [&](int64_t block, int64_t tile, const Ahead& ahead) {
              if (*s.plain - block * kBlock > kLanes)
                scan_tile<kWide>(block * kBlock, tile, ahead);
              else
                scan_tile<1>(block * kBlock, tile, ahead);
            });
  }

  template <int Vectors>
  SEQREC_METHOD void scan_tile(int64_t slot, int64_t tile, const Ahead& ahead) {
    F32 score[kTile][Vectors];
    score_tile<Vectors>(s.panel + slot * call.width, call.width, s.chunk.rows + tile * kTile * s.chunk.stride,
                        s.chunk.stride, s.chunk.start + tile * kTile, ahead, score);
    const Counters counters{s.counters.low + slot, s.counters.high + slot, s.counters.slope + slot,
                            s.counters.above + slot};
    CountAbove<Vectors> reducer;
    if (__builtin_expect(reducer.reduce(score, counters, s.chunk.band[tile]), 1)) {
      reducer.add_to(counters);
      return;
    }
    float spilled[kTile * kBlock];
    for (int i = 0; i < kTile; ++i)
      for (int u = 0; u < Vectors; ++u) store(spilled + i * kBlock + u * kLanes, score[i][u]);
    decide(spilled, Vectors, slot, tile);
  }

  // Step 3, rarely: a tile with pairs inside its band. It is gone through again, item by item, with the band of the
  // item's own norm; the pairs left are noted for fp64. Where they are many (ties everywhere, say) the whole tile is
  // counted in fp64.
  __attribute__((noinline, cold)) void decide(const float* score, int vectors, int64_t slot, int64_t tile) {
    const int64_t limit = kTile * vectors * kLanes / 4;
    if (pairs + limit > kPairBuffer) flush();
    const int64_t before = pairs;
    I32 above[kWide]{};
    for (int64_t i = 0; i < kTile; ++i) {
      const int64_t item = tile * kTile + i;
      const F32 norm = broadcast(__builtin_sqrtf(s.chunk.squares[item])), bias = broadcast(s.chunk.band[tile].bias);
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
          s.pair_item[pairs++] = s.chunk.first + item;
        }
      }
    }
    for (int u = 0; u < vectors; ++u) {
      int32_t* to = s.counters.above + slot + u * kLanes;
      store(to, load(to) + above[u]);
    }
  }

  void recount(int64_t slot, int vectors, int64_t tile) {
    scanned_tile_in_fp64<T>(call, s.chunk, tile);
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

  // chunk.items against the rows from `slot` to `end`, at most kLanes of them.
  void count_block(int64_t slot, int64_t end) {
    ExactRows& rows = s.exact_rows[slot / kLanes % kWide];
    ExactGoals& goals = s.exact_goals[slot / kLanes % kWide];
    if (rows.first != slot) {
      pack_exact_rows<T>(call, s.index + slot, static_cast<int>(least(kLanes, end - slot)), rows, goals);
      rows.first = slot;
    }
    count_exact<T>(call, rows, goals, s.chunk.items, s.total + slot);
  }
  void count_blocks(int64_t begin, int64_t end) {
    for (int64_t slot = begin; slot < end; slot += kLanes) count_block(slot, end);
  }

  void run(int64_t begin, int64_t end) {
    pack();
    for (int64_t slot = 0; slot < num_rows + kLanes; ++slot) s.total[slot] = 0;
    for (int64_t slot = 0; slot < plan.group_rows; ++slot) s.counters.above[slot] = 0;
    ScanChunk& chunk = s.chunk;
    for (chunk.first = begin; chunk.first < end; chunk.first += chunk.count) {
      chunk.count = least(plan.chunk_items, end - chunk.first);
      if constexpr (!kIsDouble<T>) {
        if (*s.plain) {
          stage<T>(call, chunk);
          const int64_t next = chunk.first + chunk.count;
          scan(next, least(plan.chunk_items, end - next));
          if (chunk.num_special) {
            special_items_in_fp64<T>(call, chunk);
            count_blocks(0, *s.plain);
          }
        }
      }
      if (*s.plain < num_rows) {
        all_items_in_fp64<T>(call, chunk);
        count_blocks(*s.plain, num_rows);
      }
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
