// What every catalogue operator is given: the part of a call that says what a score is. Plain data only: this header is
// compiled into every CPU tier, so it must not hold a function that could be shared between them.
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

// s[r, i] = scale · row_scale[r] · (q_r · v_i) + bias[i], for the pairs that are not excluded.
struct LogitCall {
  Format format = Format::kF32;  // of query, items, row_scale and bias
  int64_t width = 0;             // d
  int64_t num_items = 0;         // I
  MatrixView query;              // [B, d]
  MatrixView items;              // [I, d]
  double scale = 1.0;
  VectorView row_scale;              // [B] times scale
  VectorView bias;                   // [I]
  const int64_t* skipped = nullptr;  // [num_skipped] ascending ids that are excluded for every row
  int64_t num_skipped = 0;
  IdLists excluded;  // by row of query
};

// How a call is cut up. Nothing here depends on the number of items, except that short catalogues make short chunks.
struct ScanPlan {
  int64_t group_rows = 0;     // rows whose packed queries fit half of a small L2 cache
  int64_t chunk_items = 0;    // items that stay in L1/L2 while every row of a group meets them
  int64_t scratch_bytes = 0;  // per thread; 64-byte aligned, zero-filled at first
};

}  // namespace seqrec_fast
