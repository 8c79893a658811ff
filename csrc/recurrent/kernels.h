// What registration code knows of the kernels of a single step: plain structs of raw pointers and, per CPU tier, a
// table of functions.
#pragma once

#include <stdint.h>

#include "common/cpu_tier.h"

namespace seqrec_fast {

enum class Scalar : int { kFloat, kDouble, kBFloat16, kHalf };

struct StepSizes {
  int64_t rows, input, projected, hidden;  // B, I, P, H; P = H for GRU
  Scalar scalar;
};

// Contiguous arrays of sizes.scalar; G is 4 for LSTM and 3 for GRU. h_next may not overlap h; c_next may be c.
struct StepForward {
  StepSizes sizes;
  const void *x, *h, *c;          // [B, I]  [B, P]  [B, H], null for GRU
  const void *w_ih, *w_hh;        // [G·H, I]  [G·H, P]
  const void *b_ih, *b_hh;        // [G·H] or null
  void *h_next, *c_next, *gates;  // [B, H]  [B, H], null for GRU  [B, 4H] or null
};

// Between the rows of du and dv. A power of two would put one column of them into two sets of L1, and duᵀ·x walks down
// columns.
static inline int64_t gradient_stride(int64_t columns) { return (columns + 15) / 16 * 16 + 16; }

// Results that are null are not computed; what has to do with c is null for GRU. S is what sizes.scalar is computed in:
// fp32, or fp64 for fp64.
struct StepBackward {
  StepSizes sizes;
  // [B, H], and as above; gates [B, 4H]
  const void *grad_h = nullptr, *grad_c = nullptr;
  const void *x = nullptr, *h = nullptr, *c = nullptr, *c_next = nullptr;
  const void *w_ih = nullptr, *w_hh = nullptr, *gates = nullptr;
  // the gradients of W_ih·x and of W_hh·h, S [B, gradient_stride(G·H)]; one array for LSTM
  void *du = nullptr, *dv = nullptr;
  void *dx = nullptr, *dh = nullptr, *dc = nullptr;
  void *dw_ih = nullptr, *dw_hh = nullptr, *db_ih = nullptr, *db_hh = nullptr;
  // GRU: S [B, H], where dh grows; dh itself where that is of S
  void* dh_wide = nullptr;
};

// A step is cut into tasks of kRowBlock rows × kUnitBlock units; task = unit block · row blocks + row block, so that a
// run of tasks touches few weights. 48 rows × 4 sums × 16 units (15 KiB) and four units' weights stay in L1.
constexpr int kRowBlock = 48;
constexpr int kUnitBlock = 16;

static inline int64_t row_blocks(const StepSizes& s) { return (s.rows + kRowBlock - 1) / kRowBlock; }
static inline int64_t step_tasks(const StepSizes& s) {
  return row_blocks(s) * ((s.hidden + kUnitBlock - 1) / kUnitBlock);
}

// Every product of the backward is cut into this many parts, whatever the threads.
constexpr int64_t kProductParts = 256;

// The kernels of one cell.
struct StepKernels {
  // Tasks begin…end-1. wide: kRowBlock·(I + P) floats of scratch for bf16 and fp16, else unused.
  void (*forward)(const StepForward&, int64_t begin, int64_t end, float* wide);
  // The backward, one after the other. du, dv, dc and what begins dh, of rows begin…end-1.
  void (*sum_gradients)(const StepBackward&, int64_t begin, int64_t end);
  // Everything that is a product with du or dv, or a sum of them; the parts begin…end-1 of kProductParts.
  void (*products)(const StepBackward&, int64_t begin, int64_t end);
  // dh of rows begin…end-1, where it is not dh_wide itself.
  void (*round_dh)(const StepBackward&, int64_t begin, int64_t end);
};

struct RecurrentKernels {
  StepKernels lstm, gru;
};

SEQREC_TIER_TABLES(RecurrentKernels, recurrent_kernels)

}  // namespace seqrec_fast
