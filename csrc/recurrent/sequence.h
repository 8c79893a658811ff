// What registration code knows of the whole-sequence kernels: plain structs of raw pointers. Every array is contiguous
// and of shape.scalar unless said otherwise; S is what that scalar is computed in (float, or double for double).
#pragma once

#include "kernels.h"

namespace seqrec_fast {

enum class CellKind : int { kLstm, kGru };

// Rows of a weight belong to this many gates. Four numbers a unit come out of a step's products: GRU keeps the parts of
// n that x and h make apart.
static constexpr int64_t gate_count(CellKind kind) { return kind == CellKind::kLstm ? 4 : 3; }
constexpr int64_t kSumCount = 4;

struct SequenceShape {
  CellKind kind;
  Scalar scalar;
  int64_t steps, rows, input, hidden, state;  // T, B, I, H, P: the width of h
  bool batch_first, reverse;
  bool projected;                                       // x is W_ih·x already: I = gates·H, and there is no W_ih
  bool zoneout, recurrent_dropout, has_w_hr, has_norm;  // without W_hr P = H
  int precision;  // of products of fp32 numbers, as in seqrec_fast/_precision.py: 0 highest, 1 high, 2 medium
};

// Some option is on: what the plain step does not know of.
static inline bool has_options(const SequenceShape& s) {
  return s.zoneout || s.recurrent_dropout || s.has_w_hr || s.has_norm;
}

static inline int64_t gate_rows(const SequenceShape& s) { return gate_count(s.kind) * s.hidden; }
// Index of a token in x, ids, output and their gradients; the saved states are time-major.
static inline int64_t token_index(const SequenceShape& s, int64_t step, int64_t row) {
  return s.batch_first ? row * s.steps + step : step * s.rows + row;
}
static inline int64_t saved_index(const SequenceShape& s, int64_t step, int64_t row) { return step * s.rows + row; }

// Numbers within a stream of masks, as in seqrec_fast/backends/reference/_philox.py.
enum class MaskKind : int { kHiddenZoneout, kCellZoneout, kRecurrentDropout };

struct SequenceNoise {
  bool drawn;  // there is a seed; otherwise zoneout takes its mean, and nothing drops
  uint64_t seed;
  uint32_t stream;                       // of the layer and direction
  double zoneout;                        // chance that a unit keeps its former state
  int32_t zoneout_below, dropout_below;  // a draw of 16 bits below these drops
  double kept_factor;                    // on what recurrent dropout leaves of h
};

struct SequenceInputs {
  SequenceShape shape;
  const void* x;                          // [T·B, I], or with ids a table [N, I]
  const int64_t* ids;                     // [T·B] or null
  const void *h, *c;                      // [B, P], [B, H]; c null for GRU
  const void *w_ih, *w_hh, *b_ih, *b_hh;  // [gates·H, I], [gates·H, P], [gates·H]; null where there is none
  const bool* reset;                      // [B, T] or null
  SequenceNoise noise;
  const void* w_hr;                              // [P, H] or null
  const void *ln_ih, *ln_hh, *ln_c, *ln_c_bias;  // [gates·H] twice, [H] twice; ln_c for LSTM alone
};

// Some rows of the batch, those of greater length first. A thread takes one through all steps by itself.
struct RowTile {
  const int64_t *row, *length;
  int64_t count;
};

struct SequenceForward {
  SequenceInputs in;
  const void* packed;        // what pack_sequence made of the weights
  void *output, *h_n, *c_n;  // [T·B, P] or null, [B, P], [B, H]
  void *cells, *gates;       // S [T·B, H], [T·B, 4H]; null where nothing is saved
};

struct SequenceBackward {
  SequenceInputs in;
  const void* packed;       // as in the forward; null where nothing is made again
  const void* packed_back;  // what pack_back made of the weights
  const void *output, *cells, *gates;
  const void *grad_output, *grad_h_n, *grad_c_n;  // each may be null
  void* dx;                                       // [T·B, I] or null: one vector a token, also with ids
  bool wide_dx;                                   // dx is of S
  void *dh, *dc;                                  // [B, P], [B, H] or null
};

// One tile's part of the gradients that sum over rows, in S; null where not wanted.
struct SequencePartial {
  void *dw_ih, *dw_hh;       // [gates·H, I], [gates·H, P]
  void* db;                  // [4·H], by sums
  void* dw_hr;               // [P, H]
  void *dln_ih, *dln_hh;     // [4·H], by sums
  void *dln_c, *dln_c_bias;  // [H]
};

// Tokens whose gradients are kept before they go into the products over tokens. Few, so that they stay in L2 beside the
// weights; but where the gradients of the weights outgrow L2 as well, they are read and written from beyond for every
// chunk: at 128 tokens and H = 256 that takes a third of the time of the products.
static inline int64_t chunk_tokens(const SequenceShape& s) {
  return gate_rows(s) * (s.input + s.state) > (1 << 18) ? 512 : 128;
}

struct SequenceKernels {
  int64_t (*packed_bytes)(const SequenceShape&);
  // Blocks begin…end-1 of pack_blocks.
  int64_t (*pack_blocks)(const SequenceShape&);
  void (*pack)(const SequenceInputs&, void* packed, int64_t begin, int64_t end);
  // The same for the products of the backward; they may need nothing.
  int64_t (*packed_back_bytes)(const SequenceShape&);
  int64_t (*pack_back_blocks)(const SequenceShape&);
  void (*pack_back)(const SequenceInputs&, void* packed, int64_t begin, int64_t end);
  int64_t (*forward_scratch)(const SequenceShape&, int64_t count);  // bytes
  void (*forward)(const SequenceForward&, const RowTile&, void* scratch);
  int64_t (*backward_scratch)(const SequenceShape&, int64_t count);
  void (*backward)(const SequenceBackward&, const RowTile&, const SequencePartial&, void* scratch);
  // out[i] = the sum of parts[·][i], in that order, for begin <= i < end: from S to the scalar.
  void (*add_parts)(Scalar, const void* const* parts, int64_t count, void* out, int64_t begin, int64_t end);
};

SEQREC_TIER_TABLES(SequenceKernels, sequence_kernels)

}  // namespace seqrec_fast
