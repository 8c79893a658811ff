// A step back with zoneout or recurrent dropout, in passes over the rows; notation as in
// seqrec_fast/backends/reference/lstm_backward.py.
#pragma once

#include "sequence_backward.h"

namespace seqrec_fast::SEQREC_TIER {

template <class T, class Cell>
struct OptionGradient final : SequenceGradient<T, Cell> {
  using Base = SequenceGradient<T, Cell>;
  using Base::call, Base::in, Base::shape, Base::tile, Base::scratch, Base::kept, Base::kWidth;
  using typename Base::S;
  Zoneout<T> zoneout_of_h, zoneout_of_c;

  OptionGradient(const SequenceBackward& call, const RowTile& tile, const SequencePartial& partial, void* memory)
      : Base(call, tile, partial, memory),
        zoneout_of_h(in.noise, MaskKind::kHiddenZoneout, shape.hidden, scratch.drops_of_h),
        zoneout_of_c(in.noise, MaskKind::kCellZoneout, shape.hidden, scratch.drops_of_c) {
    if (shape.recurrent_dropout) dropout_factors<T>(in.noise, tile, shape.hidden, scratch.drops_of_h, scratch.factors);
  }

  void back(int64_t count, int64_t step) override {
    if (kept + count > scratch.capacity) this->flush();
    this->gather(count, step);
    if (shape.recurrent_dropout) drop_operands(count);
    if (call.gates == nullptr) this->make_gates(count, step);
    if (shape.zoneout) {
      zoneout_of_h.begin_step(tile, count, step);
      if (Cell::kHasCellState) zoneout_of_c.begin_step(tile, count, step);
    }
    for (int64_t p = 0; p < count; ++p) {
      past_output(p, step);
      if (call.gates)
        past_cell(p, step, (const T*)call.gates + saved_index(shape, step, tile.row[p]) * kSumCount * shape.hidden);
      else
        past_cell(p, step, (const S*)scratch.gates + p * kSumCount * shape.hidden);
    }
    this->past_hidden_weights(count, scratch.past_w_hh, false);
    for (int64_t p = 0; p < count; ++p) add_hidden(p);
    this->end_step(count, step);
  }

  int units_from(int64_t unit, int64_t end) const { return end - unit < kWidth ? (int)(end - unit) : kWidth; }
  const S* factors(int64_t p) const { return scratch.factors + p * drop_width(shape.hidden); }

  void drop_operands(int64_t count) {
    const int64_t hidden = shape.hidden;
    for (int64_t p = 0; p < count; ++p)
      for (int64_t i = 0; i < hidden; ++i)
        scratch.operand[(kept + p) * hidden + i] = scratch.h[(kept + p) * hidden + i] * factors(p)[i];
  }

  // From dh after the step and that of the output to that of what the cell makes; dh becomes what passes it by.
  void past_output(int64_t p, int64_t step) {
    const int64_t hidden = shape.hidden;
    const T* const grad_output =
        call.grad_output ? (const T*)call.grad_output + token_index(shape, step, tile.row[p]) * hidden : nullptr;
    S *const dh = scratch.dh + p * hidden, *const fresh = scratch.fresh_dh + p * hidden;
    for (int64_t unit = 0; unit < hidden; unit += kWidth) {
      const int units = units_from(unit, hidden);
      Vector<T> grad = load_first(dh + unit, units), past{};
      if (grad_output) grad = grad + load_first(grad_output + unit, units);
      if (shape.zoneout) grad = zoneout_of_h.gradient(p, unit, grad, past);
      store_first(fresh + unit, units, grad);
      store_first(dh + unit, units, past);
    }
  }

  // From the gradient of what the cell makes to that of the four sums and, in part, of the former states.
  template <class G>
  void past_cell(int64_t p, int64_t step, const G* gates) {
    const int64_t hidden = shape.hidden, row = tile.row[p], at = kept + p;
    S *dh = scratch.dh + p * hidden, *dc = scratch.dc + p * hidden, *sums = scratch.sums + at * scratch.sums_stride;
    for (int64_t unit = 0; unit < hidden; unit += kWidth) {
      const int units = units_from(unit, hidden);
      Vector<T> saved[kSumCount];
      for (int s = 0; s < kSumCount; ++s) saved[s] = load_first(gates + s * hidden + unit, units);
      Vector<T> c{}, c_next{}, grad_c{}, past{};
      if constexpr (Cell::kHasCellState) {
        c = this->former_cell(p, step, unit, units);
        grad_c = load_first(dc + unit, units);
        if (shape.zoneout) {
          // The saved cell state is no longer what went into tanh.
          c_next = lstm_cell(LstmGates<Vector<T>>{saved[0], saved[1], saved[2], saved[3]}, c);
          grad_c = zoneout_of_c.gradient(p, unit, grad_c, past);
        } else {
          c_next = load_first((const S*)call.cells + saved_index(shape, step, row) * hidden + unit, units);
        }
      }
      const auto found = Cell::backward(saved, load_first(scratch.h + at * hidden + unit, units), c, c_next,
                                        load_first(scratch.fresh_dh + p * hidden + unit, units), grad_c);
      for (int s = 0; s < kSumCount; ++s) store_first(sums + s * hidden + unit, units, found.sums[s]);
      if constexpr (Cell::kHasCellState)
        store_first(dc + unit, units, found.dc + past);
      else
        store_first(dh + unit, units, load_first(dh + unit, units) + found.dh);
    }
  }

  void add_hidden(int64_t p) {
    const int64_t hidden = shape.hidden;
    S* const dh = scratch.dh + p * hidden;
    for (int64_t unit = 0; unit < hidden; unit += kWidth) {
      const int units = units_from(unit, hidden);
      Vector<T> grad = load_first(scratch.past_w_hh + p * hidden + unit, units);
      if (shape.recurrent_dropout) grad = grad * load_first(factors(p) + unit, units);
      store_first(dh + unit, units, load_first(dh + unit, units) + grad);
    }
  }
};

template <class T, class Cell>
void sequence_backward(const SequenceBackward& call, const RowTile& tile, const SequencePartial& partial,
                       void* memory) {
  if (has_options(call.in.shape))
    OptionGradient<T, Cell>(call, tile, partial, memory).run();
  else
    SequenceGradient<T, Cell>(call, tile, partial, memory).run();
}

}  // namespace seqrec_fast::SEQREC_TIER
