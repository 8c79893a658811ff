// The gradient of a recurrent layer: a tile of rows goes back through its steps; the gradients of the sums of some
// hundred tokens are kept and then enter dx and the weights' gradients as a few products over tokens.
//
// Within a step: pointwise from the gradients of h and c to those of the four sums, then dh = dsums·W_hh. The gates
// come from the forward, or are made again from the states that it saved.
#pragma once

#include "sequence_forward.h"

namespace seqrec_fast::SEQREC_TIER {

template <class T>
class BackwardScratch : public Layout {
 public:
  using S = typename Compute<T>::Scalar;
  struct Token {
    int64_t step, place;
  };
  int64_t capacity;  // tokens
  int64_t sums_stride;
  S *dh, *dc;            // [count, P], [count, H]
  S* gates;              // [count, 4H] of one step, where they are made again
  S *sums, *x, *h, *dx;  // [capacity, …]: gradients of the sums, input vectors, former states, gradients of the inputs
  S* operand;            // [capacity, P]: h as W_hh sees it
  // With options: gradients of h as the cell makes it [capacity, P], of what W_hr makes that from [count, H] and it
  // itself [capacity, H], of W_hh's operand [count, P]; see dropout_factors; [count, drop_width(P or H)].
  S *fresh_dh, *past_w_hr, *unprojected, *past_w_hh, *factors;
  uint8_t *drops_of_h, *drops_of_c;
  CellRow<T>* rows;
  Token* token;
  // Gradients of W_ih·x and of W_hh·h [capacity, as sums]: normalised, their own; else those of the sums.
  S *input_sums, *hidden_sums;
  // Normalised: the gradients of the sums times what was normalised [capacity, as sums]; that of y, and it times what
  // was normalised [capacity, H].
  S *input_gain, *hidden_gain, *dy, *cell_gain;
  CellRow<T>* single_rows;         // [count]: with the operand of one weight alone
  S *zeros, *u, *v;                // [4·width], [count, 4·width] twice: W_ih·x and W_hh·h, normalised
  S *rstd_of_u, *rstd_of_v;        // [count]
  S *norm_grad, *unit_c, *tanh_y;  // of one row: [4·width], [width] twice

  BackwardScratch(const SequenceShape& s, int64_t count, void* memory)
      : Layout(memory),
        capacity(chunk_tokens(s) > count ? chunk_tokens(s) : count),
        sums_stride(gradient_stride(kSumCount * s.hidden)) {
    dh = take<S>(count * s.state);
    dc = take<S>(count * s.hidden);
    gates = take<S>(count * kSumCount * s.hidden);
    sums = take<S>(capacity * sums_stride);
    x = take<S>(s.projected ? 0 : capacity * s.input);
    h = take<S>(capacity * s.state);
    dx = take<S>(s.projected ? 0 : capacity * s.input);
    rows = take<CellRow<T>>(count);
    token = take<Token>(capacity);
    operand = s.recurrent_dropout ? take<S>(capacity * s.state) : h;
    fresh_dh = take<S>(has_options(s) ? capacity * s.state : 0);
    past_w_hr = take<S>(s.has_w_hr ? count * s.hidden : 0);
    unprojected = take<S>(s.has_w_hr ? capacity * s.hidden : 0);
    past_w_hh = take<S>(has_options(s) ? count * s.state : 0);
    factors = take<S>(s.recurrent_dropout ? count * drop_width(s.state) : 0);
    drops_of_h = take<uint8_t>(has_options(s) ? count * drop_width(s.state) : 0);
    drops_of_c = take<uint8_t>(s.zoneout ? count * drop_width(s.hidden) : 0);
    input_sums = s.has_norm ? take<S>(capacity * sums_stride) : sums;
    hidden_sums = s.has_norm ? take<S>(capacity * sums_stride) : sums;
    if (!s.has_norm) return;
    const int64_t width = PackedWeights<T>(s).blocks() * Compute<T>::kWidth;
    input_gain = take<S>(capacity * sums_stride);
    hidden_gain = take<S>(capacity * sums_stride);
    dy = take<S>(capacity * s.hidden);
    cell_gain = take<S>(capacity * s.hidden);
    single_rows = take<CellRow<T>>(count);
    zeros = take<S>(kSumCount * width);
    u = take<S>(count * kSumCount * width);
    v = take<S>(count * kSumCount * width);
    rstd_of_u = take<S>(count);
    rstd_of_v = take<S>(count);
    norm_grad = take<S>(kSumCount * width);
    unit_c = take<S>(width);
    tanh_y = take<S>(width);
  }
};

template <class T, class Sums, class Products>
struct SequenceGradient {
  using Cell = typename Sums::Cell;
  using S = typename Compute<T>::Scalar;
  static constexpr int kWidth = Compute<T>::kWidth;
  const SequenceBackward& call;
  const SequenceInputs& in;
  const SequenceShape& shape;
  const RowTile& tile;
  const SequencePartial& partial;
  BackwardScratch<T> scratch;
  const Sums sums;
  const Products products;
  int64_t kept = 0;  // tokens of the chunk

  SequenceGradient(const SequenceBackward& call, const RowTile& tile, const SequencePartial& partial, void* memory)
      : call(call),
        in(call.in),
        shape(call.in.shape),
        tile(tile),
        partial(partial),
        scratch(call.in.shape, tile.count, memory),
        sums(shape, call.packed, scratch),
        products(in, call.packed_back, scratch.capacity, scratch) {}

  // The step whose results the given one started from, or -1 where that is the initial state.
  int64_t step_before(int64_t place, int64_t step) const {
    if (!shape.reverse) return step - 1;
    return step + 1 < tile.length[place] ? step + 1 : -1;
  }

  // The vectors that the step of `count` rows read, as tokens kept … kept + count - 1.
  void gather(int64_t count, int64_t step) {
    const int64_t state = shape.state;
    for (int64_t p = 0; p < count; ++p) {
      const int64_t at = kept + p, row = tile.row[p], before = step_before(p, step);
      scratch.token[at] = {step, p};
      if (!shape.projected)
        widen(input_vector<T>(in, token_index(shape, step, row)), shape.input, scratch.x + at * shape.input);
      S* h = scratch.h + at * state;
      if (segment_begins(in, tile, p, step)) {
        for (int64_t i = 0; i < state; ++i) h[i] = 0;
      } else {
        widen(
            before < 0 ? (const T*)in.h + row * state : (const T*)call.output + token_index(shape, before, row) * state,
            state, h);
      }
    }
  }

  void make_gates(int64_t count, int64_t step) {
    const int64_t hidden = shape.hidden;
    for (int64_t p = 0; p < count; ++p) {
      const int64_t at = kept + p;
      scratch.rows[p] = {shape.projected ? nullptr : scratch.x + at * shape.input,
                         shape.projected ? input_vector<T>(in, token_index(shape, step, tile.row[p])) : nullptr,
                         nullptr, scratch.operand + at * shape.state};
    }
    sums(scratch.rows, count,
         [&](int64_t p, int64_t unit, const Vector<T>(&found)[kSumCount]) __attribute__((always_inline)) {
           const int units = hidden - unit < kWidth ? (int)(hidden - unit) : kWidth;
           const auto next = Cell::step(found, Vector<T>{}, Vector<T>{});
           for (int s = 0; s < kSumCount; ++s)
             store_first(scratch.gates + (p * kSumCount + s) * hidden + unit, units, next.saved[s]);
         });
  }

  // The cell state that the step of row p started from, of some units.
  __attribute__((always_inline)) Vector<T> former_cell(int64_t p, int64_t step, int64_t unit, int units) const {
    const int64_t hidden = shape.hidden, row = tile.row[p], before = step_before(p, step);
    if (segment_begins(in, tile, p, step)) return Vector<T>{};
    return before < 0 ? load_first((const T*)in.c + row * hidden + unit, units)
                      : load_first((const S*)call.cells + saved_index(shape, before, row) * hidden + unit, units);
  }

  // From dh and dc after the step of row p to those before it (dh without what comes through W_hh) and the sums' own.
  template <class G>
  void pointwise(int64_t p, int64_t step, const G* gates) {
    const int64_t hidden = shape.hidden, row = tile.row[p], at = kept + p;
    const T* grad_output =
        call.grad_output ? (const T*)call.grad_output + token_index(shape, step, row) * hidden : nullptr;
    S *dh = scratch.dh + p * hidden, *dc = scratch.dc + p * hidden,
      *grad_sums = scratch.sums + at * scratch.sums_stride;
    for (int64_t unit = 0; unit < hidden; unit += kWidth) {
      const int units = hidden - unit < kWidth ? (int)(hidden - unit) : kWidth;
      Vector<T> saved[kSumCount];
      for (int s = 0; s < kSumCount; ++s) saved[s] = load_first(gates + s * hidden + unit, units);
      Vector<T> c{}, c_next{}, grad_c{}, grad_h = load_first(dh + unit, units);
      if (grad_output) grad_h = grad_h + load_first(grad_output + unit, units);
      if constexpr (Cell::kHasCellState) {
        c_next = load_first((const S*)call.cells + saved_index(shape, step, row) * hidden + unit, units);
        grad_c = load_first(dc + unit, units);
        c = former_cell(p, step, unit, units);
      }
      const auto found =
          Cell::backward(saved, load_first(scratch.h + at * hidden + unit, units), c, c_next, grad_h, grad_c);
      for (int s = 0; s < kSumCount; ++s) store_first(grad_sums + s * hidden + unit, units, found.sums[s]);
      store_first(dh + unit, units, found.dh);
      if constexpr (Cell::kHasCellState) store_first(dc + unit, units, found.dc);
    }
  }

  // to = the gradient of W_hh's operand, or what is there and it.
  void past_hidden_weights(int64_t count, S* to, bool accumulate) {
    products.to_hidden(scratch.hidden_sums + kept * scratch.sums_stride, scratch.sums_stride, count, to, accumulate);
  }

  // Nothing passes the begin of a segment.
  void end_step(int64_t count, int64_t step) {
    const int64_t hidden = shape.hidden, state = shape.state;
    for (int64_t p = 0; p < count; ++p) {
      if (!segment_begins(in, tile, p, step)) continue;
      for (int64_t i = p * state; i < (p + 1) * state; ++i) scratch.dh[i] = 0;
      for (int64_t i = p * hidden; i < (p + 1) * hidden; ++i) scratch.dc[i] = 0;
    }
    kept += count;
  }

  virtual void back(int64_t count, int64_t step) {
    const int64_t hidden = shape.hidden;
    if (kept + count > scratch.capacity) flush();
    gather(count, step);
    if (call.gates == nullptr) make_gates(count, step);
    for (int64_t p = 0; p < count; ++p) {
      if (call.gates)
        pointwise(p, step, (const T*)call.gates + saved_index(shape, step, tile.row[p]) * kSumCount * hidden);
      else
        pointwise(p, step, (const S*)scratch.gates + p * kSumCount * hidden);
    }
    past_hidden_weights(count, scratch.dh, !Cell::kHasCellState);
    end_step(count, step);
  }

  // The products over the chunk's tokens.
  void flush() {
    if (kept == 0) return;
    const int64_t hidden = shape.hidden, state = shape.state, input = shape.input;
    if (call.dx) {
      if (!shape.projected) products.to_input(scratch.input_sums, scratch.sums_stride, kept, scratch.dx);
      for (int64_t at = 0; at < kept; ++at) {
        const auto [step, place] = scratch.token[at];
        const S* from = shape.projected ? scratch.input_sums + at * scratch.sums_stride : scratch.dx + at * input;
        const int64_t to = token_index(shape, step, tile.row[place]) * input;
        if (call.wide_dx)
          narrow(from, input, (S*)call.dx + to);
        else
          narrow(from, input, (T*)call.dx + to);
      }
    }
    if (partial.dw_ih)
      products.to_input_weight(scratch.input_sums, scratch.sums_stride, kept, scratch.x, (S*)partial.dw_ih);
    if (partial.dw_hh)
      products.to_hidden_weight(scratch.hidden_sums, scratch.sums_stride, kept, scratch.operand, (S*)partial.dw_hh);
    if (partial.dw_hr)
      product_part(
          Product<S>{scratch.fresh_dh, 1, state, scratch.unprojected, (S*)partial.dw_hr, state, hidden, kept, true}, 0,
          1, 1);
    sum_tokens(partial.db, scratch.sums, scratch.sums_stride, kSumCount * hidden);
    sum_tokens(partial.dln_ih, scratch.input_gain, scratch.sums_stride, kSumCount * hidden);
    sum_tokens(partial.dln_hh, scratch.hidden_gain, scratch.sums_stride, kSumCount * hidden);
    sum_tokens(partial.dln_c, scratch.cell_gain, hidden, hidden);
    sum_tokens(partial.dln_c_bias, scratch.dy, hidden, hidden);
    kept = 0;
  }

  // to += the rows of the chunk's tokens.
  void sum_tokens(void* to, const S* from, int64_t stride, int64_t width) const {
    if (to == nullptr) return;
    for (int64_t i = 0; i < width; i += kWidth) {
      const int lanes = width - i < kWidth ? (int)(width - i) : kWidth;
      S* const out = (S*)to + i;
      store_first(out, lanes, load_first(out, lanes) + sum_rows<true, Vector<T>>(from + i, stride, kept, lanes));
    }
  }

  void run() {
    const int64_t hidden = shape.hidden, state = shape.state;
    for (int64_t i = 0; i < tile.count * state; ++i) scratch.dh[i] = 0;
    for (int64_t i = 0; i < tile.count * hidden; ++i) scratch.dc[i] = 0;
    for (int64_t p = 0; p < tile.count; ++p) {
      if (call.grad_h_n) widen((const T*)call.grad_h_n + tile.row[p] * state, state, scratch.dh + p * state);
      if (call.grad_c_n) widen((const T*)call.grad_c_n + tile.row[p] * hidden, hidden, scratch.dc + p * hidden);
    }
    int64_t count = 0;
    for (int64_t i = 0; i < shape.steps; ++i) {
      const int64_t at = shape.reverse ? i : shape.steps - 1 - i;
      count = running(tile, at, count);
      if (count) back(count, at);
    }
    flush();
    for (int64_t p = 0; p < tile.count; ++p) {
      if (call.dh) narrow(scratch.dh + p * state, state, (T*)call.dh + tile.row[p] * state);
      if (call.dc) narrow(scratch.dc + p * hidden, hidden, (T*)call.dc + tile.row[p] * hidden);
    }
  }
};

// See SequenceKernels.
template <class T>
void add_parts(const void* const* parts, int64_t count, void* out, int64_t begin, int64_t end) {
  using S = typename Compute<T>::Scalar;
  constexpr int kWidth = Compute<T>::kWidth;
  for (int64_t i = begin; i < end; i += kWidth) {
    const int lanes = end - i < kWidth ? (int)(end - i) : kWidth;
    Vector<T> sum = load_first((const S*)parts[0] + i, lanes);
    for (int64_t p = 1; p < count; ++p) sum = sum + load_first((const S*)parts[p] + i, lanes);
    store_first((T*)out + i, lanes, sum);
  }
}

}  // namespace seqrec_fast::SEQREC_TIER
