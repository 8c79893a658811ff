// A recurrent layer over whole sequences, forward. A tile of rows goes through all steps on its own, so there is no
// barrier between steps; step t works on the rows that still run, a prefix of the tile. How the sums of a step are
// formed is a parameter: LaneSums or TileSums.
#pragma once

#include "sequence_lanes.h"
#include "sequence_masks.h"

namespace seqrec_fast::SEQREC_TIER {

// How many rows of a tile run at a step.
SEQREC_INLINE int64_t running(const RowTile& tile, int64_t step, int64_t from) {
  int64_t count = from;
  while (count > 0 && tile.length[count - 1] <= step) --count;
  while (count < tile.count && tile.length[count] > step) ++count;
  return count;
}

// A segment begins here: the step sees zeros instead of the states before it.
SEQREC_INLINE bool segment_begins(const SequenceInputs& in, const RowTile& tile, int64_t place, int64_t step) {
  if (in.reset == nullptr) return false;
  const bool* marks = in.reset + tile.row[place] * in.shape.steps;
  if (!in.shape.reverse) return marks[step];
  return step + 1 < tile.length[place] && marks[step + 1];
}

// The input vector of a token.
template <class T>
SEQREC_INLINE const T* input_vector(const SequenceInputs& in, int64_t token) {
  return (const T*)in.x + (in.ids ? in.ids[token] : token) * in.shape.input;
}

template <class S>
SEQREC_INLINE void copy_rows(const S* from, S* to, int64_t first, int64_t last, int64_t width) {
  for (int64_t i = first * width; i < last * width; ++i) to[i] = from[i];
}

// W_ih·x of several steps at once, before they are taken. Worth it where the weights of a step are read for few rows
// (one row then reads half as much a step), or where both weights together outgrow L2. The sums do not change by a bit.
constexpr int64_t kAheadRows = 16, kAheadBytes = 1 << 20, kAheadTokens = 64;

template <class Sums>
SEQREC_INLINE bool projects_ahead(const SequenceShape& s, int64_t count) {
  return !s.projected && s.steps > 1 && (count <= kAheadRows || Sums::packed_bytes(s) > kAheadBytes);
}

// One tile's states: padded to whole registers, whose further lanes stay 0. A step reads one h and writes the other,
// since every unit needs all of the former h.
template <class T, class Sums>
class ForwardScratch : public Layout {
 public:
  using S = typename Compute<T>::Scalar;
  int64_t width, state_width;
  int64_t capacity;  // tokens that are gathered, and projected, at a time
  bool ahead;
  S *h[2], *c;       // [count, state_width], [count, width]
  S *x, *projected;  // [capacity, I] where x must be widened; [capacity, 4·width] where it is projected ahead
  CellRow<T>* rows;  // [capacity]
  S *sums, *operand, *factors;       // normalised: [count, 4·width]; h as W_hh sees it; see dropout_factors
  uint8_t *drops_of_h, *drops_of_c;  // [count, drop_width(P)], [count, drop_width(H)]
  S *unprojected, *fresh_h;          // with W_hr: [count, width], [count, P]
  CellRow<T>* hidden_rows;           // normalised: [count]: the operands of W_hh alone
  S *zeros, *fresh_c, *output_gate;  // normalised: [4·width], [width] twice

  ForwardScratch(const SequenceShape& s, int64_t count, void* memory)
      : Layout(memory),
        width(PackedWeights<T>(s).blocks() * Compute<T>::kWidth),
        state_width((s.state + Compute<T>::kWidth - 1) / Compute<T>::kWidth * Compute<T>::kWidth) {
    ahead = s.has_norm || projects_ahead<Sums>(s, count);
    capacity = ahead && count < kAheadTokens ? kAheadTokens : count;
    h[0] = take<S>(count * state_width);
    h[1] = take<S>(count * state_width);
    c = take<S>(count * width);
    x = take<S>(kIsHalf<T> && !s.projected ? capacity * s.input : 0);
    projected = take<S>(ahead ? (capacity + Sums::kSpareRows) * kSumCount * width : 0);
    rows = take<CellRow<T>>(capacity);
    sums = take<S>(s.has_norm ? count * kSumCount * width : 0);
    operand = take<S>(s.recurrent_dropout ? count * state_width : 0);
    factors = take<S>(s.recurrent_dropout ? count * drop_width(s.state) : 0);
    drops_of_h = take<uint8_t>(has_options(s) ? count * drop_width(s.state) : 0);
    drops_of_c = take<uint8_t>(s.zoneout ? count * drop_width(s.hidden) : 0);
    unprojected = take<S>(s.has_w_hr ? count * width : 0);
    fresh_h = take<S>(s.has_w_hr ? count * s.state : 0);
    hidden_rows = take<CellRow<T>>(s.has_norm ? count : 0);
    zeros = take<S>(s.has_norm ? kSumCount * width : 0);
    fresh_c = take<S>(s.has_norm ? width : 0);
    output_gate = take<S>(s.has_norm ? width : 0);
  }
};

template <class T, class Sums>
struct SequenceWalk {
  using Cell = typename Sums::Cell;
  using S = typename Compute<T>::Scalar;
  static constexpr int kWidth = Compute<T>::kWidth;
  const SequenceForward& call;
  const SequenceShape& shape;
  const RowTile& tile;
  ForwardScratch<T, Sums> scratch;
  const Sums sums;
  int now = 0;  // which h is read

  SequenceWalk(const SequenceForward& call, const RowTile& tile, void* memory)
      : call(call),
        shape(call.in.shape),
        tile(tile),
        scratch(shape, tile.count, memory),
        sums(shape, call.packed, scratch) {}

  int64_t step_at(int64_t i) const { return shape.reverse ? shape.steps - 1 - i : i; }

  // The input of `count` rows at a step, as rows first … of the scratch.
  void gather(int64_t first, int64_t count, int64_t step) {
    for (int64_t p = 0; p < count; ++p) {
      const T* x = input_vector<T>(call.in, token_index(shape, step, tile.row[p]));
      CellRow<T>& row = scratch.rows[first + p];
      row = {nullptr, shape.projected ? x : nullptr, nullptr, nullptr};
      if (shape.projected) continue;
      if constexpr (kIsHalf<T>) {
        S* const wide = scratch.x + (first + p) * shape.input;
        widen(x, shape.input, wide);
        row.x = wide;
      } else {
        row.x = x;
      }
    }
  }

  virtual void project_ahead(int64_t tokens) {
    sums(scratch.rows, tokens,
         [&](int64_t p, int64_t unit, const Vector<T>(&found)[kSumCount]) __attribute__((always_inline)) {
           S* const to = scratch.projected + (p * scratch.width + unit) * kSumCount;
           for (int s = 0; s < kSumCount; ++s) store(to + s * kWidth, found[s]);
         });
    for (int64_t p = 0; p < tokens; ++p)
      scratch.rows[p] = {nullptr, nullptr, scratch.projected + p * scratch.width * kSumCount, nullptr};
  }

  // The states that a step of `count` rows starts from, as its operands.
  void begin_step(CellRow<T>* rows, int64_t count, int64_t step) {
    for (int64_t p = 0; p < count; ++p) {
      S *const h = scratch.h[now] + p * scratch.state_width, *const c = scratch.c + p * scratch.width;
      rows[p].h = h;
      if (!segment_begins(call.in, tile, p, step)) continue;
      for (int64_t i = 0; i < scratch.state_width; ++i) h[i] = 0;
      for (int64_t i = 0; i < scratch.width; ++i) c[i] = 0;
    }
  }

  // One step of `count` rows, whose inputs are rows first … of the scratch.
  virtual void take_step(int64_t first, int64_t count, int64_t step) {
    const int64_t width = scratch.width;
    CellRow<T>* const rows = scratch.rows + first;
    begin_step(rows, count, step);
    S* const h_next = scratch.h[1 - now];
    sums(rows, count, [&](int64_t p, int64_t unit, const Vector<T>(&found)[kSumCount]) __attribute__((always_inline)) {
      S* const c = scratch.c + p * width + unit;
      const auto next = Cell::step(found, load(scratch.h[now] + p * width + unit), load(c));
      store(h_next + p * width + unit, rounded<T>(next.h));
      if constexpr (Cell::kHasCellState) store(c, next.c);
      keep_output(step, tile.row[p], unit, next.h);
      keep_saved(step, tile.row[p], unit, next);
    });
    now = 1 - now;
  }

  __attribute__((always_inline)) void keep_output(int64_t step, int64_t row, int64_t unit, Vector<T> h) const {
    const int64_t state = shape.state;
    const int units = state - unit < kWidth ? (int)(state - unit) : kWidth;
    if (call.output) store_first((T*)call.output + token_index(shape, step, row) * state + unit, units, h);
  }
  __attribute__((always_inline)) void keep_saved(int64_t step, int64_t row, int64_t unit,
                                                 const CellStates<Vector<T>>& next) const {
    const int64_t hidden = shape.hidden;
    const int units = hidden - unit < kWidth ? (int)(hidden - unit) : kWidth;
    if (Cell::kHasCellState && call.cells)
      store_first((S*)call.cells + saved_index(shape, step, row) * hidden + unit, units, next.c);
    if (call.gates == nullptr) return;
    T* gates = (T*)call.gates + saved_index(shape, step, row) * kSumCount * hidden + unit;
    for (int s = 0; s < kSumCount; ++s) store_first(gates + s * hidden, units, next.saved[s]);
  }

  // Rows that do not run have their state in h[0]: rows former … count begin here, or count … former end here.
  void change_rows(int64_t former, int64_t count) {
    if (now == 0) return;
    copy_rows(scratch.h[1], scratch.h[0], count, former, scratch.state_width);
    copy_rows(scratch.h[0], scratch.h[1], former, count, scratch.state_width);
  }

  void run() {
    const int64_t hidden = shape.hidden, width = scratch.width, state = shape.state, state_width = scratch.state_width;
    for (int64_t i = 0; i < tile.count * state_width; ++i) scratch.h[0][i] = scratch.h[1][i] = 0;
    for (int64_t i = 0; i < tile.count * width; ++i) scratch.c[i] = 0;
    for (int64_t p = 0; p < tile.count; ++p) {
      widen((const T*)call.in.h + tile.row[p] * state, state, scratch.h[0] + p * state_width);
      if (Cell::kHasCellState) widen((const T*)call.in.c + tile.row[p] * hidden, hidden, scratch.c + p * width);
    }
    int64_t count = 0, gathered = 0;  // rows that run; rows that ran at the last gathered step
    for (int64_t begin = 0, end = 0; begin < shape.steps; begin = end) {
      int64_t tokens = 0;
      for (; end < shape.steps; ++end) {
        const int64_t here = running(tile, step_at(end), gathered);
        if (end > begin && tokens + here > scratch.capacity) break;
        gather(tokens, here, step_at(end));
        tokens += here;
        gathered = here;
        if (!scratch.ahead) {
          ++end;
          break;
        }
      }
      if (scratch.ahead) project_ahead(tokens);
      for (int64_t i = begin, first = 0; i < end; first += count, ++i) {
        const int64_t former = count;
        count = running(tile, step_at(i), former);
        change_rows(former, count);
        take_step(first, count, step_at(i));
      }
    }
    change_rows(count, 0);
    for (int64_t p = 0; p < tile.count; ++p) {
      narrow(scratch.h[0] + p * state_width, state, (T*)call.h_n + tile.row[p] * state);
      if (Cell::kHasCellState) narrow(scratch.c + p * width, hidden, (T*)call.c_n + tile.row[p] * hidden);
    }
  }
};

}  // namespace seqrec_fast::SEQREC_TIER
