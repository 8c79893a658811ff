// One task of top-k: a group of rows meets a run of chunks.
//
// Every pair (row, item) is scored in fp32 FMA, or from int8 codes, and compared with what it must reach to be among
// the row's k best; the few that may are candidates (topk_select.h). Rows and items outside the preconditions of
// band.h, and tiles where much is equal, are scored in fp64, as the ranking is defined.
#pragma once

#include "catalogue/topk_packed.h"

namespace seqrec_fast::SEQREC_TIER {

// Chunks are visited in an order that jumps about (by the golden ratio), so that a catalogue sorted by score, whose
// every item would be a new best, is as good as a shuffled one.
struct ChunkOrder {
  int64_t chunks, step;
  explicit ChunkOrder(int64_t n) : chunks(n), step(most(static_cast<int64_t>(static_cast<double>(n) * 0.618034), 1)) {
    while (common_divisor(step, n) != 1) ++step;
  }
  int64_t at(int64_t place) const {
    return static_cast<int64_t>(static_cast<unsigned __int128>(place) * static_cast<uint64_t>(step) %
                                static_cast<uint64_t>(chunks));
  }
  static int64_t common_divisor(int64_t a, int64_t b) {
    while (b) {
      const int64_t rest = a % b;
      a = b, b = rest;
    }
    return a;
  }
};

struct TopkPanels {
  int64_t* packed;        // [1] 1 + the first row of the group the panel holds; 0: none
  int64_t* plain;         // [1] how many rows of the group are scanned; they take the first slots
  float* panel;           // see Panel; for at most kDotRows rows [plain][dot_stride]
  ExactRows* exact_rows;  // [kWide] a block of the scan is kWide blocks in fp64
};

// Candidates of a group take at most this much, unless one row alone takes more.
constexpr int64_t kCandidateBytes = int64_t{1} << 25;

template <class T>
struct TopkTask {
  const TopkCall& call;
  const ScanPlan& plan;
  TopkPanels s{};
  PackedScan packed{};
  ScanChunk chunk{};
  Candidates<T> best;

  TopkTask(const TopkCall& of, const ScanPlan& by) : call(of), plan(by), best(of) {}

  static int64_t bytes_of_candidates(const TopkCall& call) {
    return capacity_of(call) * static_cast<int64_t>(2 * sizeof(typename ScoreOf<T>::Score) + sizeof(int64_t));
  }
  static int64_t dot_stride(int64_t width) { return round_up(width, kLanes); }

  // With base null only the size is computed.
  int64_t carve(void* base) {
    Layout layout(base);
    const int64_t group = round_up(plan.group_rows, kBlock), width = call.width;
    s.packed = layout.take<int64_t>(1);
    s.plain = layout.take<int64_t>(1);
    packed.take(layout, call, plan);
    s.panel = layout.take<float>(is_packed() ? 0 : most(packed.used ? 0 : group * width, kDotRows * dot_stride(width)));
    chunk.take(layout, plan.chunk_items, width);
    best.take(layout, plan);
    s.exact_rows = layout.take<ExactRows>(kWide);
    for (int u = 0; u < kWide; ++u) {
      double* panel = layout.take<double>(width * kLanes);
      if (base) s.exact_rows[u].panel = panel;
    }
    return layout.bytes();
  }

  bool is_packed() const { return call.packed.codes != nullptr; }
  bool by_dots() const { return *s.plain <= kDotRows && (is_packed() || call.items.column_stride == 1); }

  // Step 1: pack the group. Rows that can be scanned come first, the others are decided in fp64.
  void pack(int64_t first_row, int64_t num_rows) {
    if (*s.packed == first_row + 1) return;
    int64_t front = 0, back = num_rows;
    for (int64_t row = first_row; row < first_row + num_rows; ++row) {
      const double norm = query_norm<T>(call, row);
      const int64_t slot = norm <= kNormLimit ? front++ : --back;
      best.row[slot] = row, best.norm[slot] = norm, best.underflow[slot] = underflow_of(norm, call.width);
      best.slope[slot] = slot < front ? limits_of(0.0, norm, call.width).slope : 0.0f;
    }
    *s.plain = front;
    *s.packed = first_row + 1;
    for (int u = 0; u < kWide; ++u) s.exact_rows[u].first = -1;
    if (is_packed() || (packed.used && !by_dots())) {
      pack_queries(best, packed, front, by_dots());
    } else if constexpr (!kIsDouble<T>) {
      // Rows of dot products are packed as one row each.
      const bool dots = by_dots();
      const int64_t stride = dot_stride(call.width);
      const int64_t size = dots ? front * stride : round_up(front, kLanes) * call.width;
      for (int64_t i = 0; i < size; ++i) s.panel[i] = 0.0f;
      for (int64_t slot = 0; slot < front; ++slot) {
        const int64_t row = best.row[slot];
        const T* query = row_of<T>(call.query, row);
        const double scale = call.scale * row_scale_of<T>(call, row);
        if (!dots) pack_row(Panel{s.panel, call.width, front}, slot, query, call.query.column_stride, scale);
        for (int64_t k = 0; dots && k < call.width; ++k)
          s.panel[slot * stride + k] =
              static_cast<float>(static_cast<double>(value(query[k * call.query.column_stride])) * scale);
      }
    }
  }

  void set_bars(int64_t first_row, int64_t num_rows, const Bar* bars) {
    const int64_t group = round_up(plan.group_rows, kBlock);
    for (int64_t slot = 0; slot < group; ++slot) best.low[slot] = __builtin_inff();
    for (int64_t slot = 0; slot < group + kLanes; ++slot) {
      best.filled[slot] = 0;
      if (slot >= num_rows) best.bar[slot] = __builtin_inf(), best.bar_id[slot] = -1;
    }
    for (int64_t slot = 0; slot < num_rows; ++slot) {
      const Bar& bar = bars[best.row[slot] - first_row];
      best.set_bar(slot, bar.least, bar.last);
    }
  }

  // Step 2: scan, and meanwhile fetch the next chunk.
  void scan(int64_t next, int64_t next_count) {
    if (by_dots()) {
      with_rows(*s.plain, [&]<int rows>() {
        const int64_t ahead = next_count ? next - chunk.first : 0;
        if (is_packed())
          scan_packed_dots<rows>(best, chunk, packed, ahead);
        else
          scan_dots<rows>(best, chunk, s.panel, dot_stride(call.width), ahead);
      });
      return;
    }
    const int64_t blocks = round_up(*s.plain, kBlock) / kBlock;
    if (is_packed()) {
      stage_packed<T>(call, chunk, packed);
      const char* from = reinterpret_cast<const char*>(call.packed.codes + next * packed.stride);
      walk_tiles(blocks, chunk.tiles(), packed.products / kTurn, from, next_count * packed.stride,
                 [&](int64_t block, int64_t tile, const Ahead& ahead) { scan_block<true>(block, tile, ahead); });
    } else if (packed.used) {
      stage_coded<T>(call, chunk, packed);
      walk<T>(call, chunk, blocks, packed.products / kTurn, next, next_count,
              [&](int64_t block, int64_t tile, const Ahead& ahead) { scan_block<true>(block, tile, ahead); });
    } else {
      stage<T>(call, chunk);
      walk<T>(call, chunk, blocks, call.width / kTurn, next, next_count,
              [&](int64_t block, int64_t tile, const Ahead& ahead) { scan_block<false>(block, tile, ahead); });
    }
  }

  // Calls work.operator()<rows>().
  template <class Work>
  SEQREC_METHOD static void with_rows(int64_t rows, const Work& work) {
    static_assert(kDotRows == 4);
    if (rows == 1)
      work.template operator()<1>();
    else if (rows == 2)
      work.template operator()<2>();
    else if (rows == 3)
      work.template operator()<3>();
    else
      work.template operator()<4>();
  }

  template <bool kPacked>
  SEQREC_METHOD void scan_block(int64_t block, int64_t tile, const Ahead& ahead) {
    if (*s.plain - block * kBlock > kLanes)
      scan_tile<kPacked, kWide>(block * kBlock, tile, ahead);
    else
      scan_tile<kPacked, 1>(block * kBlock, tile, ahead);
  }

  // The band of kLanes rows for an item (or for none worse) of that norm and that error of its codes.
  template <bool kPacked>
  SEQREC_METHOD F32 band_of(int64_t slot, float norm, float error, float bias) const {
    const F32 band = fma(load(best.slope + slot), broadcast(norm), broadcast(bias));
    if constexpr (kPacked) return fma(load(packed.coarse + slot), broadcast(error), band);
    return band;
  }

  // The largest score of each row tells whether one of the tile can be a candidate.
  template <bool kPacked, int Vectors>
  SEQREC_METHOD void scan_tile(int64_t slot, int64_t tile, const Ahead& ahead) {
    F32 score[kTile][Vectors];
    if constexpr (kPacked) {
      const int64_t stride = packed.stride / kTileCodes;
      score_packed_tile<Vectors>(packed.rows(slot), packed.products, packed.codes + tile * kTile * stride, stride,
                                 packed.item_scale + tile * kTile, chunk.start + tile * kTile, ahead, score);
    } else {
      score_tile<Vectors>(s.panel + slot * call.width, call.width, chunk.rows + tile * kTile * chunk.stride,
                          chunk.stride, chunk.start + tile * kTile, ahead, score);
    }
    const TileBand band = chunk.band[tile];
    const float coarse = kPacked ? packed.tile_error[tile] : 0.0f;
    I32 reached{};
#pragma GCC unroll 4
    for (int u = 0; u < Vectors; ++u) {
      const F32 error = band_of<kPacked>(slot + u * kLanes, band.norm, coarse, band.bias);
      // max leaves out a NaN in its first operand, the start value of items that are not scanned.
      F32 largest = broadcast(-__builtin_inff());
#pragma GCC unroll 16
      for (int i = 0; i < kTile; ++i) largest = max(score[i][u], largest);
      reached |= (I32)(largest >= load(best.low + slot + u * kLanes) - error);
    }
    if (__builtin_expect(!any(reached), 1)) return;
    float spilled[kTile * kBlock];
    for (int i = 0; i < kTile; ++i)
      for (int u = 0; u < Vectors; ++u) store(spilled + i * kBlock + u * kLanes, score[i][u]);
    admit<kPacked>(spilled, Vectors, slot, tile);
  }

  // Step 3, rarely: a tile with candidates. It is gone through again, with the band of each item's own norm. Where the
  // candidates are many (ties everywhere, say, or the first items of all), the whole tile is scored in fp64.
  template <bool kPacked>
  __attribute__((noinline, cold)) void admit(const float* score, int vectors, int64_t slot, int64_t tile) {
    const float bias = chunk.band[tile].bias;
    F32 band[kTile][kWide];
    uint32_t bits[kTile * kWide];
    int64_t count = 0;
    for (int i = 0; i < kTile; ++i) {
      const int64_t at = tile * kTile + i;
      const float norm = kPacked ? packed.norm[at] : __builtin_sqrtf(chunk.squares[at]);
      const float coarse = kPacked ? packed.error[at] : 0.0f;
      for (int u = 0; u < vectors; ++u) {
        const int64_t first = slot + u * kLanes;
        band[i][u] = band_of<kPacked>(first, norm, coarse, bias);
        bits[i * kWide + u] =
            mask_bits((I32)(load(score + i * kBlock + u * kLanes) >= load(best.low + first) - band[i][u]));
        count += __builtin_popcount(bits[i * kWide + u]);
      }
    }
    if (count > kTile * vectors * kLanes / 4) {
      scanned_tile_in_fp64<T>(call, chunk, tile);
      for (int u = 0; u < vectors && slot + u * kLanes < *s.plain; ++u) exact_block(slot + u * kLanes, *s.plain);
      return;
    }
    for (int i = 0; i < kTile; ++i)
      for (int u = 0; u < vectors; ++u)
        for (uint32_t left = bits[i * kWide + u]; left; left &= left - 1) {
          const int64_t lane = u * kLanes + __builtin_ctz(left);
          const double error = static_cast<double>(band[i][u][__builtin_ctz(left)]);
          best.add_approximate(slot + lane, chunk.first + tile * kTile + i, score[i * kBlock + lane], error);
        }
  }

  // ---- fp64 for whole blocks ----

  // chunk.items against the rows from `slot` to `end`, at most kLanes of them.
  void exact_block(int64_t slot, int64_t end) {
    ExactRows& rows = s.exact_rows[slot / kLanes % kWide];
    if (rows.first != slot) {
      const int count = static_cast<int>(least(kLanes, end - slot));
      for (int lane = 0; lane < count; ++lane) pack_exact_row<T>(call, best.row[slot + lane], lane, rows);
      pad_exact_rows(call.width, count, rows);
      rows.first = slot;
    }
    for (int64_t first = 0; first < chunk.items.count; first += kTile) exact_tile(rows, slot, first);
  }
  void exact_blocks(int64_t begin, int64_t end) {
    for (int64_t slot = begin; slot < end; slot += kLanes) exact_block(slot, end);
  }

  __attribute__((noinline)) void exact_tile(const ExactRows& rows, int64_t slot, int64_t first) {
    F64 score[kTile][kExactVectors];
    score_exact_tile<T>(call, rows, chunk.items, first, score);
    const uint32_t used = (1u << rows.count) - 1u;
    for (int i = 0; i < kTile; ++i) {
      const int64_t item = chunk.items.id[first + i];
      uint32_t bits = 0;
      double spilled[kLanes];
      for (int u = 0; u < kExactVectors; ++u) {
        const F64 x = score[i][u], bar = load(best.bar + slot + u * kLanes64);
        I64 bar_id;
        __builtin_memcpy(&bar_id, best.bar_id + slot + u * kLanes64, sizeof bar_id);
        const I64 reached = (I64)(x > bar) | ((I64)(x == bar) & (I64)(item <= bar_id));
        bits |= mask_bits(reached) << (u * kLanes64);
        store(spilled + u * kLanes64, x);
      }
      for (bits &= used; bits; bits &= bits - 1) {
        const int lane = __builtin_ctz(bits);
        best.add_exact(slot + lane, item, spilled[lane]);
      }
    }
  }

  // ---- the task ----

  void run(int64_t first_row, int64_t num_rows, int64_t first_chunk, int64_t num_chunks, const Bar* bars,
           Found* found) {
    pack(first_row, num_rows);
    set_bars(first_row, num_rows, bars);
    const ChunkOrder order((call.num_items + plan.chunk_items - 1) / plan.chunk_items);
    const int64_t last_chunk = first_chunk + num_chunks;
    auto count_from = [&](int64_t item) { return least(plan.chunk_items, call.num_items - item); };
    for (int64_t place = first_chunk; place < last_chunk; ++place) {
      chunk.first = order.at(place) * plan.chunk_items;
      chunk.count = count_from(chunk.first);
      if constexpr (!kIsDouble<T>) {
        if (*s.plain) {
          const bool more = place + 1 < last_chunk;
          const int64_t next = more ? order.at(place + 1) * plan.chunk_items : 0;
          scan(next, more ? count_from(next) : 0);
          if (chunk.num_special) {
            special_items_in_fp64<T>(call, chunk);
            exact_blocks(0, *s.plain);
          }
        }
      }
      if (*s.plain < num_rows) {
        all_items_in_fp64<T>(call, chunk);
        exact_blocks(*s.plain, num_rows);
      }
    }
    for (int64_t slot = 0; slot < num_rows; ++slot) {
      best.finish(slot);
      const int64_t at = slot * best.capacity;
      found[best.row[slot] - first_row] = {best.floor + at, best.id + at, best.filled[slot]};
    }
  }
};

template <class T>
ScanPlan topk_plan(const TopkCall& call) {
  ScanPlan plan = usual_plan(call, call.num_rows);
  const int64_t rows = most(kCandidateBytes / TopkTask<T>::bytes_of_candidates(call), 1);
  if (rows < plan.group_rows) plan.group_rows = rows < kBlock ? rows : rows / kBlock * kBlock;
  plan.scratch_bytes = TopkTask<T>(call, plan).carve(nullptr);
  return plan;
}

}  // namespace seqrec_fast::SEQREC_TIER
