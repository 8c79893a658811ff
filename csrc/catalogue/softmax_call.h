// What the registration (cpu_softmax.cpp) hands to the softmax kernels (tier_softmax.cpp). Plain data only, as in
// call.h. One call is one head: heads are independent problems on slices of the widths.
#pragma once

#include "catalogue/call.h"

namespace seqrec_fast {

// Ids by row, ascending within a row: ids[begin[r]] … ids[begin[r + 1] - 1].
struct SortedLists {
  const int64_t* ids = nullptr;
  const int64_t* begin = nullptr;  // null: no lists
};

struct SoftmaxCall : LogitCall {
  int64_t num_rows = 0;                // B
  Format scale_format = Format::kF32;  // of row_scale
  Format bias_format = Format::kF32;
  MatrixView values;        // [I, d_v]; the items where there are no values of their own
  int64_t value_width = 0;  // d_v
  bool own_values = false;
  SortedLists lists;                   // pairs that are excluded
  SortedLists kept;                    // pairs that no exclusion touches
  const int64_t* kept_slot = nullptr;  // where what belongs to a kept pair lies
};

// How a scan is cut up. Leaves and their order depend on the number of items and the widths alone, so that a row's bits
// do not depend on what is computed beside it, nor by whom.
struct SoftmaxPlan {
  int64_t group_rows = 0;   // rows that meet a chunk together
  int64_t chunk_items = 0;  // items that stay in L1 meanwhile
  int64_t chunks = 0;
  int64_t leaves = 1;         // a power of two: runs of chunks whose sums are added by halves
  int64_t scratch_bytes = 0;  // for a thread
};

// Softmax sums of a group of rows over some items, [rows] each. The context is not divided by the total.
struct SoftmaxSums {
  float* shift = nullptr;    // the largest finite score; -inf where there was none
  float* total = nullptr;    // Σ exp(s - shift)
  float* context = nullptr;  // [rows, d_v] Σ exp(s - shift)·v; null where not asked for
};

struct SoftmaxResults {
  float* shift = nullptr;      // [B] as above, 0 where there was no score
  float* log_total = nullptr;  // [B]
  float* lse = nullptr;        // [B], stride lse_stride; null where not asked for
  int64_t lse_stride = 1;
  void* context = nullptr;  // [B, d_v] Σ p·v
  Format context_format = Format::kF32;
  int64_t context_stride = 0;
};

// The backward: ds = p·(g·v - g·c + w), p = exp(s - shift), c the context. Rows in the order of the query.
struct SoftmaxGradient {
  const float* shift = nullptr;          // [B] lse, finite
  const float* weight = nullptr;         // [B] w
  MatrixView direction;                  // [B, d_v] g, fp32; no data: none
  MatrixView context;                    // [B, d_v] c, fp32
  const float* kept_gradient = nullptr;  // by slot: taken off ds of a kept pair
  // What is wanted; null where not. Rows of items have item_stride elements, those of values value_stride.
  void* items = nullptr;              // Σ_r ds·q' (and, where there are no values of their own, Σ_r p·g)
  void* values = nullptr;             // Σ_r p·g
  Format item_format = Format::kF32;  // of both
  int64_t item_stride = 0, value_stride = 0;
  float* bias = nullptr;  // [I] Σ_r ds
  bool add_bias = false;  // to what is there
  bool query = false;     // Σᵢ ds·k, see SoftmaxKernels::backward
  // Without directions: chunks of items may be left out for a group of rows, as long as the probability that a leaf
  // leaves out of each of them stays within skip_mass. skipped: by leaf, [leaves, B].
  float skip_mass = 0.0f;
  float* skipped = nullptr;
};

// The rows of a backward, made ready once for all threads: as numbers or pairs of them (softmax_numbers.h), which take
// no more memory than fp32.
struct SoftmaxRows {
  void* queries = nullptr;     // scaled, as a Panel; pairs are not scaled
  void* query_rows = nullptr;  // [B, d] the same by row, to be summed over rows; 0 where special
  void* directions = nullptr;  // as a Panel, or null
  void* direction_rows = nullptr;
  float* factors = nullptr;    // [B] of the queries
  float* offsets = nullptr;    // [B] g·c
  uint8_t* special = nullptr;  // [B] rows that hold NaN or ±∞
};

struct SoftmaxKernels {
  // At most about most_rows in a group.
  SoftmaxPlan (*plan)(const SoftmaxCall&, int64_t most_rows);
  SoftmaxPlan (*plan_backward)(const SoftmaxCall&, const SoftmaxGradient&);
  // Sums of rows first_row … over the leaves first_leaf …, a power of two of them. kept_score: by slot.
  void (*forward)(const SoftmaxCall&, const SoftmaxPlan&, int64_t first_row, int64_t num_rows, int64_t first_leaf,
                  int64_t num_leaves, const SoftmaxSums&, float* kept_score, void* scratch);
  // Adds up the sums of `runs` (a power of two) runs of leaves, in place, and finishes rows first_row ….
  void (*finish)(const SoftmaxCall&, int64_t first_row, int64_t num_rows, SoftmaxSums* sums, int64_t runs,
                 const SoftmaxResults&);
  // to [d] = the vector of an item.
  void (*read_item)(const SoftmaxCall&, int64_t item, float* to);
  void (*prepare)(const SoftmaxCall&, const SoftmaxGradient&, int64_t first_row, int64_t num_rows, const SoftmaxRows&);
  // Gradients of the items of the chunks [first, last).
  void (*backward_chunks)(const SoftmaxCall&, const SoftmaxPlan&, const SoftmaxGradient&, const SoftmaxRows&,
                          int64_t first, int64_t last, void* scratch);
  // Gradients of the items of `num_leaves` leaves, a power of two, and, with gradient.query, Σᵢ ds·k of these items in
  // query_sums [B, d].
  void (*backward_leaves)(const SoftmaxCall&, const SoftmaxPlan&, const SoftmaxGradient&, const SoftmaxRows&,
                          int64_t first_leaf, int64_t num_leaves, float* query_sums, void* scratch);
};

SEQREC_TIER_TABLES(SoftmaxKernels, softmax_kernels)

}  // namespace seqrec_fast
