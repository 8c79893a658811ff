// A chunk of items on its way through a ranking scan: contiguous fp32 rows, start values, the band of each tile, and
// the items that only fp64 can decide.
#pragma once

#include "catalogue/band.h"
#include "catalogue/exact.h"
#include "common/scratch.h"

namespace seqrec_fast::SEQREC_TIER {

SEQREC_INLINE int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// Half of a 1 MiB L2 for the queries of a group, 64 KiB for the items that meet them: on a 2 MiB L2 other sizes from
// half to twice these change the time by less than 2 %.
SEQREC_INLINE ScanPlan usual_plan(const LogitCall& call, int64_t num_rows) {
  const int64_t row_bytes = 4 * most(call.width, 1);
  ScanPlan plan;
  plan.group_rows =
      least(round_up(most(num_rows, 1), kBlock), most((int64_t{1} << 19) / row_bytes / kBlock, 1) * kBlock);
  plan.chunk_items = most(least((int64_t{1} << 16) / row_bytes, 1024) / kTile, 1) * kTile;
  plan.chunk_items = least(plan.chunk_items, round_up(most(call.num_items, 1), kTile));
  return plan;
}

// |scale·q|, a little more than its rounding to fp32 can have; infinite or NaN where fp64 must decide.
template <class T>
double query_norm(const LogitCall& call, int64_t row) {
  if (kIsDouble<T> || call.width > kScanWidth || !folds<T>(call, row)) return __builtin_inf();
  const T* query = row_of<T>(call.query, row);
  double squares = 0.0;
  for (int64_t k = 0; k < call.width; ++k) {
    const double x = static_cast<double>(value(query[k * call.query.column_stride]));
    squares += x * x;
  }
  return __builtin_sqrt(squares) * magnitude(call.scale * row_scale_of<T>(call, row)) * 1.000001;
}

// What one tile of items adds to the band of every row.
struct TileBand {
  float norm;  // at least the largest norm of its items
  float bias;  // at least c · the largest |bias|
};

struct ScanChunk {
  int64_t first, count;
  const float* rows;  // [count rounded up to kTile] at `stride`
  int64_t stride;
  int64_t num_special;
  // Buffers.
  float* staged;     // [chunk, width] items as contiguous fp32, unless they are that already
  float* start;      // [chunk + kLanes] bias, or NaN: not scanned
  TileBand* band;    // [chunk / kTile]
  float* squares;    // [chunk + kLanes] at least the squared norm of each item
  int64_t* special;  // [chunk] items decided in fp64 for every row
  ExactItems items;  // [chunk] some of them, in fp64

  void take(Layout& layout, int64_t chunk_items, int64_t width) {
    const int64_t chunk = round_up(chunk_items, kTile);
    staged = layout.take<float>(chunk * width);
    start = layout.take<float>(chunk + kLanes);
    band = layout.take<TileBand>(chunk / kTile);
    squares = layout.take<float>(chunk + kLanes);
    special = layout.take<int64_t>(chunk);
    items.weights = layout.take<double>(chunk * width);
    items.bias = layout.take<double>(chunk);
    items.id = layout.take<int64_t>(chunk);
    items.count = 0;
  }
  int64_t tiles() const { return round_up(count, kTile) / kTile; }
};

// The first place in call.skipped whose id is not below `item`.
SEQREC_INLINE int64_t first_skipped(const LogitCall& call, int64_t item) {
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

// Biases; NaN for the items excluded for every row, which leave the scan here, and for what follows the last.
template <class T>
void set_start(const LogitCall& call, ScanChunk& chunk, int64_t padded) {
  const float not_scanned = __builtin_nanf("");
  for (int64_t i = 0; i < chunk.count; ++i)
    chunk.start[i] = call.bias.data ? static_cast<float>(at<T>(call.bias, chunk.first + i)) : 0.0f;
  for (int64_t i = chunk.count; i < padded; ++i) chunk.start[i] = not_scanned;
  const int64_t end = chunk.first + chunk.count;
  for (int64_t i = first_skipped(call, chunk.first); i < call.num_skipped && call.skipped[i] < end; ++i)
    chunk.start[call.skipped[i] - chunk.first] = not_scanned;
}

// Σw² as computed in fp32 is within (width + 8)·u of the truth, plus 2^-126 a term that underflowed.
struct SquareBound {
  float inflate, underflow;
  explicit SquareBound(int64_t width)
      : inflate(1.0f + static_cast<float>(width + 8) * 0x1p-22f), underflow(static_cast<float>(width) * 0x1p-126f) {}
};
constexpr float kSquareLimit = 0x1p120f;

// Takes an item out of the scan that is not within the band's preconditions.
SEQREC_INLINE void make_special(ScanChunk& chunk, int64_t i) {
  // NaN or -inf never ranks, whatever the row. (Skipped and padding items have NaN here.)
  if (chunk.start[i] > -__builtin_inff()) chunk.special[chunk.num_special++] = chunk.first + i;
  chunk.start[i] = __builtin_nanf("");
}

template <class T>
void stage(const LogitCall& call, ScanChunk& chunk) {
  const int64_t padded = round_up(chunk.count, kTile), width = call.width;
  chunk.rows = chunk.staged, chunk.stride = width;
  bool direct = false;
  if constexpr (__is_same(T, float)) {
    direct = call.items.column_stride == 1 && padded == chunk.count;
    if (direct) chunk.rows = row_of<float>(call.items, chunk.first), chunk.stride = call.items.row_stride;
  }
  set_start<T>(call, chunk, padded);
  chunk.num_special = 0;
  const SquareBound bound(width);
  for (int64_t tile = 0; tile < padded; tile += kTile) {
    float squares = 0.0f, bias = 0.0f;
    for (int64_t i = tile; i < tile + kTile; ++i) {
      if (!direct) {
        float* to = chunk.staged + i * width;
        if (i < chunk.count)
          read_row(row_of<T>(call.items, chunk.first + i), call.items.column_stride, width, to);
        else
          for (int64_t k = 0; k < width; ++k) to[k] = 0.0f;
      }
      const float own = sum_of_squares(chunk.rows + i * chunk.stride, width) * bound.inflate + bound.underflow;
      const float own_bias = __builtin_fabsf(chunk.start[i]);
      chunk.squares[i] = own;
      if (own <= kSquareLimit && own_bias <= kBiasLimit) {
        squares = own > squares ? own : squares;
        bias = own_bias > bias ? own_bias : bias;
      } else {
        make_special(chunk, i);
      }
    }
    chunk.band[tile / kTile] = {__builtin_sqrtf(squares), static_cast<float>(relative_band(width)) * bias};
  }
}

// Some of the chunk's items in fp64.
template <class T>
void special_items_in_fp64(const LogitCall& call, ScanChunk& chunk) {
  chunk.items.count = 0;
  for (int64_t i = 0; i < chunk.num_special; ++i) push_exact_item<T>(call, chunk.special[i], chunk.items);
  pad_exact_items(chunk.items, call.width);
}
template <class T>
void scanned_tile_in_fp64(const LogitCall& call, ScanChunk& chunk, int64_t tile) {
  chunk.items.count = 0;
  for (int64_t i = tile * kTile; i < (tile + 1) * kTile; ++i)
    if (chunk.start[i] == chunk.start[i]) push_exact_item<T>(call, chunk.first + i, chunk.items);
  pad_exact_items(chunk.items, call.width);
}
template <class T>
void all_items_in_fp64(const LogitCall& call, ScanChunk& chunk) {
  chunk.items.count = 0;
  int64_t skip = first_skipped(call, chunk.first);
  for (int64_t id = chunk.first; id < chunk.first + chunk.count; ++id) {
    if (skip < call.num_skipped && call.skipped[skip] == id)
      ++skip;
    else
      push_exact_item<T>(call, id, chunk.items);
  }
  pad_exact_items(chunk.items, call.width);
}

// Calls scan(block, tile, ahead) for `blocks` blocks of rows and `tiles` tiles of `turns` turns each, which between
// them fetch the `bytes` bytes from `from` on.
template <class Scan>
SEQREC_METHOD void walk_tiles(int64_t blocks, int64_t tiles, int64_t turns, const char* from, int64_t bytes,
                              const Scan& scan) {
  const int64_t step = turns > 0 ? bytes / (blocks * tiles * turns) : 0;
  for (int64_t block = 0; block < blocks; ++block)
    for (int64_t tile = 0; tile < tiles; ++tile) {
      scan(block, tile, Ahead{from, step});
      from += step * turns;
    }
}

// The same for the chunk; the items from `next` on, which will be the next chunk, are fetched.
template <class T, class Scan>
SEQREC_METHOD void walk(const LogitCall& call, const ScanChunk& chunk, int64_t blocks, int64_t turns, int64_t next,
                        int64_t next_count, const Scan& scan) {
  // Rows far apart in memory are not worth fetching the gaps for.
  const bool dense = call.items.row_stride < 2 * call.width;
  const bool fetch = call.items.column_stride == 1 && next_count > 0 && dense;
  const int64_t bytes = fetch ? next_count * call.items.row_stride * static_cast<int64_t>(sizeof(T)) : 0;
  const char* from = reinterpret_cast<const char*>(row_of<T>(call.items, fetch ? next : chunk.first));
  walk_tiles(blocks, chunk.tiles(), turns, from, bytes, scan);
}

}  // namespace seqrec_fast::SEQREC_TIER
