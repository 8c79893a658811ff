// What registration code knows of the recurrent kernels: plain structs of raw pointers and, per CPU tier, a table of
// functions.
#pragma once

#include <stdint.h>

namespace seqrec_fast {

enum class Scalar : int { kFloat, kDouble, kBFloat16, kHalf };

struct StepSizes {
  int64_t rows, input, projected, hidden;  // B, I, P, H
  Scalar scalar;
};

// Contiguous arrays of sizes.scalar. h_next may not overlap h; c_next may be c.
struct LstmStep {
  StepSizes sizes;
  const void *x, *h, *c;          // [B, I]  [B, P]  [B, H]
  const void *w_ih, *w_hh;        // [4H, I]  [4H, P]
  const void *b_ih, *b_hh;        // [4H] or null
  void *h_next, *c_next, *gates;  // [B, H]  [B, H]  [B, 4H] or null
};

// Between the rows of dz. A power of two would put one column of it into two sets of L1, and dzᵀ·x walks down columns.
static inline int64_t gradient_stride(int64_t hidden) { return (4 * hidden + 15) / 16 * 16 + 16; }

// Results that are null are not computed; dz holds what all of them need.
struct LstmStepBackward {
  StepSizes sizes;
  const void *grad_h, *grad_c;                   // [B, H]
  const void *x, *h, *c, *c_next, *w_ih, *w_hh;  // as above
  const void* gates;                             // [B, 4H]
  void* dz;                                      // [B, gradient_stride(H)] in fp32 (fp64 for fp64)
  void *dx, *dh, *dc, *dw_ih, *dw_hh, *db;
};

// A step is cut into tasks of kRowBlock rows × kUnitBlock units; task = unit block · row blocks + row block, so that a
// run of tasks touches few weights. 48 rows × 4 gates × 16 units of pre-activations (15 KiB) and four units' weights
// stay in L1.
constexpr int kRowBlock = 48;
constexpr int kUnitBlock = 16;

static inline int64_t row_blocks(const StepSizes& s) { return (s.rows + kRowBlock - 1) / kRowBlock; }
static inline int64_t step_tasks(const StepSizes& s) {
  return row_blocks(s) * ((s.hidden + kUnitBlock - 1) / kUnitBlock);
}

// Every product of the backward is cut into this many parts, whatever the threads.
constexpr int64_t kProductParts = 256;

struct RecurrentKernels {
  // Tasks begin…end-1. wide: kRowBlock·(I + P) floats of scratch for bf16 and fp16, else unused.
  void (*lstm_step)(const LstmStep&, int64_t begin, int64_t end, float* wide);
  // dz and dc of rows begin…end-1.
  void (*lstm_step_gate_gradients)(const LstmStepBackward&, int64_t begin, int64_t end);
  // Everything that is a product with dz, or a sum of it; the parts begin…end-1 of kProductParts.
  void (*lstm_step_products)(const LstmStepBackward&, int64_t begin, int64_t end);
};

namespace tier_default {
extern const RecurrentKernels recurrent_kernels;
}
#if defined(__x86_64__)
namespace tier_avx2 {
extern const RecurrentKernels recurrent_kernels;
}
namespace tier_avx512 {
extern const RecurrentKernels recurrent_kernels;
}
namespace tier_amx {
extern const RecurrentKernels recurrent_kernels;
}
#endif

}  // namespace seqrec_fast
