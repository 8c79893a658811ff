// What the registration (cpu_topk.cpp) hands to the kernels (tier_topk.cpp). Plain data only, as in call.h.
#pragma once

#include "catalogue/call.h"
#include "catalogue/id_set.h"

namespace seqrec_fast {

// One set of ids per row: table[begin[r]] … table[begin[r + 1] - 1], a power of two of places or none.
struct IdSets {
  const int64_t* table = nullptr;    // null: every set is empty
  const int64_t* begin = nullptr;    // [B + 1]
  const uint64_t* filter = nullptr;  // from filter_words(begin[r]) on
};

// A copy of the items in int8, each with its scale, the norm of its error and its own norm (packed.h).
struct PackedItems {
  const int8_t* codes = nullptr;  // [I] rows of packed_stride(d) bytes; null: the scan reads the items themselves
  const float* facts = nullptr;   // [3, I]
  int64_t facts_stride = 0;
};
// Whole registers of any tier, once widened to int16.
static inline int64_t packed_stride(int64_t width) { return (width + 31) / 32 * 32; }

struct TopkCall : LogitCall {
  PackedItems packed;
  int64_t num_rows = 0;  // B
  int64_t kept = 0;      // min(k, I), at least 1
  IdSets seen;           // the ids in `excluded`, checked
};

// An item must reach a score of `least`, and there have an id of at most `last`. What never ranks (NaN, -inf) does not
// reach the start value either.
struct Bar {
  double least = -__builtin_inf();
  int64_t last = -1;
};

// Of one row, in no particular order.
struct Found {
  const void* scores;  // float, or double for fp64 input
  const int64_t* ids;
  int64_t count;  // at most `kept`
};

struct TopkKernels {
  ScanPlan (*plan)(const TopkCall&);
  // The best of the items in chunks[first_chunk …] (see chunk_at) that reach the row's bar, for each of the rows.
  // `found` points into the scratch.
  void (*scan)(const TopkCall&, const ScanPlan&, int64_t first_row, int64_t num_rows, int64_t first_chunk,
               int64_t num_chunks, const Bar* bars, void* scratch, Found* found);
  // Writes the codes and facts of some items.
  void (*pack)(const LogitCall&, int64_t first, int64_t count, const PackedItems& to);
};

SEQREC_TIER_TABLES(TopkKernels, topk_kernels)

}  // namespace seqrec_fast
