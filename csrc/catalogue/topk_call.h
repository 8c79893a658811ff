// What the registration (cpu_topk.cpp) hands to the kernels (tier_topk.cpp). Plain data only, as in call.h.
#pragma once

#include "catalogue/call.h"
#include "catalogue/id_set.h"

namespace seqrec_fast {

// One set of ids per row: table[begin[r]] … table[begin[r + 1] - 1], a power of two of places or none.
struct IdSets {
  const int64_t* table = nullptr;  // null: every set is empty
  const int64_t* begin = nullptr;  // [B + 1]
};

struct TopkCall : LogitCall {
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
};

SEQREC_TIER_TABLES(TopkKernels, topk_kernels)

}  // namespace seqrec_fast
