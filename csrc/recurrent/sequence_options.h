// A step forward with zoneout, recurrent dropout, a projection or layer normalisation, apart from the plain step, whose
// loops have nothing of this. Layer normalisation needs all sums of a row before the first gate: they go to memory.
#pragma once

#include "sequence_forward.h"
#include "sequence_norm.h"

namespace seqrec_fast::SEQREC_TIER {

template <class T, class Cell>
struct OptionWalk final : SequenceWalk<T, LaneSums<T, Cell>> {
  using Base = SequenceWalk<T, LaneSums<T, Cell>>;
  using Base::call, Base::shape, Base::tile, Base::scratch, Base::now, Base::kWidth;
  using typename Base::S;
  const PackedWeights<T> layout;
  Zoneout<T> zoneout_of_h, zoneout_of_c;
  const NormedSums<T, Cell> norm;
  const NormRow<T, 1> norm_of_c;

  OptionWalk(const SequenceForward& call, const RowTile& tile, void* memory)
      : Base(call, tile, memory),
        layout(shape),
        zoneout_of_h(call.in.noise, MaskKind::kHiddenZoneout, shape.state, scratch.drops_of_h),
        zoneout_of_c(call.in.noise, MaskKind::kCellZoneout, shape.hidden, scratch.drops_of_c),
        norm(call.in),
        norm_of_c(kAlone, 1, shape.hidden) {
    if (shape.recurrent_dropout)
      dropout_factors<T>(call.in.noise, tile, shape.state, scratch.drops_of_h, scratch.factors);
    if (shape.has_norm)
      for (int64_t i = 0; i < kSumCount * scratch.width; ++i) scratch.zeros[i] = 0;
  }

  void take_step(int64_t first, int64_t count, int64_t step) override {
    CellRow<T>* const rows = scratch.rows + first;
    this->begin_step(rows, count, step);
    if (shape.recurrent_dropout) drop_operands(rows, count);
    if (shape.zoneout) {
      zoneout_of_h.begin_step(tile, count, step);
      if (Cell::kHasCellState) zoneout_of_c.begin_step(tile, count, step);
    }
    if (shape.has_norm)
      finish_normed(rows, count, step);
    else
      all_sums<T, Cell>(rows, count, layout, call.packed,
                        [&](int64_t p, int64_t unit, const Vector<T>(&sums)[kSumCount])
                            __attribute__((always_inline)) { finish<false>(p, step, unit, sums); });
    if (shape.has_w_hr) project(count, step);
    now = 1 - now;
  }

  void drop_operands(CellRow<T>* rows, int64_t count) {
    const int64_t width = scratch.state_width;
    for (int64_t p = 0; p < count; ++p) {
      S* const operand = scratch.operand + p * width;
      const S* const factors = scratch.factors + p * drop_width(shape.state);
      for (int64_t i = 0; i < width; i += kWidth) store(operand + i, load(rows[p].h + i) * load(factors + i));
      rows[p].h = operand;
    }
  }

  // W_ih·x and, where it is normalised, what joins W_hh·h.
  void project_ahead(int64_t tokens) override {
    Base::project_ahead(tokens);
    if (!shape.has_norm) return;
    for (int64_t t = 0; t < tokens; ++t) {
      S* row = scratch.projected + t * scratch.width * kSumCount;
      norm.input.normalise(row);
      for (int64_t unit = 0; unit < scratch.width; unit += kWidth, row += kSumCount * kWidth) {
        Vector<T> sums[kSumCount];
        norm.from_input(row, unit, sums);
        for (int s = 0; s < kSumCount; ++s) store(row + s * kWidth, sums[s]);
      }
    }
  }

  // The pointwise part of some units of row p, but for h of a normalised LSTM. Not inlined: all_sums would have a copy
  // of it for every row of every group.
  template <bool kNormed>
  __attribute__((noinline)) void finish(int64_t p, int64_t step, int64_t unit, const Vector<T> (&sums)[kSumCount]) {
    // An LSTM does not read its h here, and projected it is narrower.
    const Vector<T> h = Cell::kHasCellState ? Vector<T>{} : load(scratch.h[now] + p * scratch.state_width + unit);
    S* const c = scratch.c + p * scratch.width + unit;
    auto next = Cell::step(sums, h, load(c));
    if constexpr (kNormed && Cell::kHasCellState) {
      store(scratch.fresh_c + unit, next.c);
      store(scratch.output_gate + unit, next.saved[3]);
    } else {
      made(p, step, unit, next.h);
    }
    if constexpr (Cell::kHasCellState) {
      if (shape.zoneout) next.c = zoneout_of_c.state(p, unit, load(c), next.c);
      store(c, next.c);
    }
    this->keep_saved(step, tile.row[p], unit, next);
  }

  // A row at a time: the input's part of its sums is normalised already, W_hh·h alone is made here.
  void finish_normed(const CellRow<T>* rows, int64_t count, int64_t step) {
    for (int64_t p = 0; p < count; ++p) scratch.hidden_rows[p] = {nullptr, nullptr, scratch.zeros, rows[p].h};
    write_sums<T, Cell>(scratch.hidden_rows, count, layout, call.packed, scratch.sums);
    for (int64_t p = 0; p < count; ++p) {
      S* const v = scratch.sums + p * scratch.width * kSumCount;
      norm.hidden.normalise(v);
      for (int64_t unit = 0; unit < shape.hidden; unit += kWidth) {
        Vector<T> sums[kSumCount];
        for (int s = 0; s < kSumCount; ++s) sums[s] = load(rows[p].ahead + unit * kSumCount + s * kWidth);
        norm.add_hidden(v + unit * kSumCount, unit, sums);
        finish<true>(p, step, unit, sums);
      }
      if constexpr (!Cell::kHasCellState) continue;
      // o·tanh(γ_c ⊙ n(c̃) + β_c), for which all units must be there.
      norm_of_c.normalise(scratch.fresh_c);
      for (int64_t unit = 0; unit < shape.hidden; unit += kWidth)
        made(p, step, unit,
             load(scratch.output_gate + unit) * tanh(normed_cell<T>(call.in, load(scratch.fresh_c + unit), unit)));
    }
  }

  // What the cell makes of row p: before W_hr, if there is one.
  void made(int64_t p, int64_t step, int64_t unit, Vector<T> h) {
    if (shape.has_w_hr)
      store(scratch.unprojected + p * scratch.width + unit, h);
    else
      set_hidden(p, step, unit, h);
  }

  // h of row p after the step, from what the cell makes.
  void set_hidden(int64_t p, int64_t step, int64_t unit, Vector<T> fresh) {
    const int64_t at = p * scratch.state_width + unit;
    const Vector<T> h = shape.zoneout ? zoneout_of_h.state(p, unit, load(scratch.h[now] + at), fresh) : fresh;
    store(scratch.h[1 - now] + at, rounded<T>(h));
    this->keep_output(step, tile.row[p], unit, h);
  }

  void project(int64_t count, int64_t step) {
    const int64_t state = shape.state;
    product_part(Product<T, S>{scratch.unprojected, scratch.width, 1, layout.transposed_w_hr(call.packed),
                               scratch.fresh_h, count, state, shape.hidden},
                 0, 1, 1);
    for (int64_t p = 0; p < count; ++p)
      for (int64_t unit = 0; unit < state; unit += kWidth) {
        const int units = state - unit < kWidth ? (int)(state - unit) : kWidth;
        set_hidden(p, step, unit, load_first(scratch.fresh_h + p * state + unit, units));
      }
  }
};

template <class T, class Sums>
int64_t forward_bytes(const SequenceShape& shape, int64_t count) {
  ForwardScratch<T, Sums> scratch(shape, count, nullptr);
  Sums(shape, nullptr, scratch);
  return scratch.bytes();
}

// Sums: of the plain step; options have LaneSums.
template <class T, class Sums>
void sequence_forward(const SequenceForward& call, const RowTile& tile, void* memory) {
  if (has_options(call.in.shape))
    OptionWalk<T, typename Sums::Cell>(call, tile, memory).run();
  else
    SequenceWalk<T, Sums>(call, tile, memory).run();
}

}  // namespace seqrec_fast::SEQREC_TIER
