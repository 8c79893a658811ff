// What the registration (cpu_rank.cpp) hands to the kernels (tier_rank.cpp). Plain data only, as in call.h.
#pragma once

#include "catalogue/call.h"

namespace seqrec_fast {

struct RankCall : LogitCall {
  VectorView target;              // [B] int64, in range for every row below
  const int64_t* rows = nullptr;  // [num_rows] the rows of query that are ranked: those not ignored
  int64_t num_rows = 0;
  double* goal = nullptr;   // [num_rows] score of the row's target; -inf where it is NaN
  int64_t* rank = nullptr;  // [B] result: counts are added to it
};

struct RankKernels {
  ScanPlan (*plan)(const RankCall&);
  // goal[begin … end).
  void (*target_scores)(const RankCall&, int64_t begin, int64_t end);
  // Writes the excluded ids that rank above the target of rows[index], duplicates included, and returns how many there
  // are. `above` has room for one more than the row's list; `query` for d floats. An id out of range stops it: then
  // *bad is that id, and -1 is returned.
  int64_t (*excluded_above)(const RankCall&, int64_t index, float* query, int64_t* above, int64_t* bad);
  // Adds, for each of rows[first_row …], how many of the items first_item … rank above the row's target.
  void (*count)(const RankCall&, const ScanPlan&, int64_t first_row, int64_t num_rows, int64_t first_item,
                int64_t num_items, void* scratch);
};

SEQREC_TIER_TABLES(RankKernels, rank_kernels)

}  // namespace seqrec_fast
