// A step forward with zoneout or recurrent dropout. The sums of all rows go to memory, and the pointwise part passes
// over each row: the plain step, which keeps them in registers, has nothing of this in its loops.
#pragma once

#include "sequence_forward.h"

namespace seqrec_fast::SEQREC_TIER {

template <class T, class Cell>
struct OptionWalk final : SequenceWalk<T, Cell> {
  using Base = SequenceWalk<T, Cell>;
  using Base::call, Base::shape, Base::tile, Base::layout, Base::scratch, Base::now, Base::kWidth;
  using typename Base::S;
  Zoneout<T> zoneout_of_h, zoneout_of_c;

  OptionWalk(const SequenceForward& call, const RowTile& tile, void* memory)
      : Base(call, tile, memory),
        zoneout_of_h(call.in.noise, MaskKind::kHiddenZoneout, shape.hidden, scratch.drops_of_h),
        zoneout_of_c(call.in.noise, MaskKind::kCellZoneout, shape.hidden, scratch.drops_of_c) {
    if (shape.recurrent_dropout)
      dropout_factors<T>(call.in.noise, tile, shape.hidden, scratch.drops_of_h, scratch.factors);
  }

  void take_step(int64_t first, int64_t count, int64_t step) override {
    CellRow<T>* const rows = scratch.rows + first;
    this->begin_step(rows, count, step);
    if (shape.recurrent_dropout) drop_operands(rows, count);
    write_sums<T, Cell>(rows, count, layout, call.packed, scratch.sums);
    if (shape.zoneout) {
      zoneout_of_h.begin_step(tile, count, step);
      if (Cell::kHasCellState) zoneout_of_c.begin_step(tile, count, step);
    }
    for (int64_t p = 0; p < count; ++p) finish(p, step);
    now = 1 - now;
  }

  void drop_operands(CellRow<T>* rows, int64_t count) {
    for (int64_t p = 0; p < count; ++p) {
      S* const operand = scratch.operand + p * scratch.width;
      const S* const factors = scratch.factors + p * drop_width(shape.hidden);
      for (int64_t i = 0; i < scratch.width; i += kWidth) store(operand + i, load(rows[p].h + i) * load(factors + i));
      rows[p].h = operand;
    }
  }

  // The pointwise part of row p, from its sums.
  void finish(int64_t p, int64_t step) {
    const int64_t width = scratch.width;
    const S *sums = scratch.sums + p * width * kSumCount, *h = scratch.h[now] + p * width;
    S *c = scratch.c + p * width, *h_next = scratch.h[1 - now] + p * width;
    for (int64_t unit = 0; unit < width; unit += kWidth, sums += kSumCount * kWidth) {
      const Vector<T> of_unit[kSumCount] = {load(sums), load(sums + kWidth), load(sums + 2 * kWidth),
                                            load(sums + 3 * kWidth)};
      const Vector<T> former_h = load(h + unit), former_c = load(c + unit);
      auto next = Cell::step(of_unit, former_h, former_c);
      if (shape.zoneout) {
        next.h = zoneout_of_h.state(p, unit, former_h, next.h);
        if constexpr (Cell::kHasCellState) next.c = zoneout_of_c.state(p, unit, former_c, next.c);
      }
      store(h_next + unit, rounded<T>(next.h));
      if constexpr (Cell::kHasCellState) store(c + unit, next.c);
      this->keep(step, tile.row[p], unit, next);
    }
  }
};

template <class T, class Cell>
void sequence_forward(const SequenceForward& call, const RowTile& tile, void* memory) {
  if (has_options(call.in.shape))
    OptionWalk<T, Cell>(call, tile, memory).run();
  else
    SequenceWalk<T, Cell>(call, tile, memory).run();
}

}  // namespace seqrec_fast::SEQREC_TIER
