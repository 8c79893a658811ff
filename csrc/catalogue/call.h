// What the registration (cpu.cpp) hands to the kernels (tier.cpp). Plain data only: this header is compiled into every
// CPU tier, so it must not hold a function that could be shared between them.
#pragma once

#include <stdint.h>

#include "common/cpu_tier.h"

namespace seqrec_fast {

enum class Format : int { kF32, kF64, kBF16, kF16 };

// Strides are in elements and may be anything, so that views need no copy.
struct MatrixView {
  const void* data = nullptr;
  int64_t row_stride = 0;
  int64_t column_stride = 0;
};
struct VectorView {
  const void* data = nullptr;  // null: absent
  int64_t stride = 0;
};

// One list of ids per row: ids[begin[r]] … ids[begin[r + 1] - 1]; or, where `begin` is null, `width` ids a row with -1
// as padding.
struct IdLists {
  const void* ids = nullptr;  // null: no lists
  bool ids_are_64 = true;
  const void* begin = nullptr;
  bool begin_is_64 = true;
  int64_t width = 0;
};

struct RankCall {
  Format format = Format::kF32;  // of query, items, row_scale and bias
  int64_t width = 0;             // d
  int64_t num_items = 0;         // I
  MatrixView query;              // [B, d]
  MatrixView items;              // [I, d]
  double scale = 1.0;
  VectorView row_scale;           // [B] times scale
  VectorView bias;                // [I]
  VectorView target;              // [B] int64, in range for every row below
  const int64_t* rows = nullptr;  // [num_rows] the rows of query that are ranked: those not ignored
  int64_t num_rows = 0;
  const int64_t* skipped = nullptr;  // [num_skipped] ascending ids that are excluded for every row
  int64_t num_skipped = 0;
  IdLists excluded;         // by row of query
  double* goal = nullptr;   // [num_rows] score of the row's target; -inf where it is NaN
  int64_t* rank = nullptr;  // [B] result: counts are added to it
};

// How a call is cut up. Nothing here depends on the number of items, except that short catalogues make short chunks.
struct RankPlan {
  int64_t group_rows = 0;     // rows whose packed queries fit half of a small L2 cache
  int64_t chunk_items = 0;    // items that stay in L1/L2 while every row of a group meets them
  int64_t scratch_bytes = 0;  // per thread; 64-byte aligned, zero-filled at first
};

struct RankKernels {
  RankPlan (*plan)(const RankCall&);
  // goal[begin … end).
  void (*target_scores)(const RankCall&, int64_t begin, int64_t end);
  // Writes the excluded ids that rank above the target of rows[index], duplicates included, and returns how many there
  // are. `above` has room for one more than the row's list; `query` for d floats. An id out of range stops it: then
  // *bad is that id, and -1 is returned.
  int64_t (*excluded_above)(const RankCall&, int64_t index, float* query, int64_t* above, int64_t* bad);
  // Adds, for each of rows[first_row …], how many of the items first_item … rank above the row's target.
  void (*count)(const RankCall&, const RankPlan&, int64_t first_row, int64_t num_rows, int64_t first_item,
                int64_t num_items, void* scratch);
};

SEQREC_TIER_TABLES(RankKernels, rank_kernels)

}  // namespace seqrec_fast
