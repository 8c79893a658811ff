// A step back with zoneout, recurrent dropout, a projection or layer normalisation, in passes over the rows; notation
// as in seqrec_fast/backends/reference/lstm_backward.py.
#pragma once

#include "sequence_backward.h"
#include "sequence_norm.h"

namespace seqrec_fast::SEQREC_TIER {

template <class T, class Cell>
struct OptionGradient final : SequenceGradient<T, LaneSums<T, Cell>, LaneProducts<T, Cell>> {
  using Base = SequenceGradient<T, LaneSums<T, Cell>, LaneProducts<T, Cell>>;
  using Base::call, Base::in, Base::shape, Base::tile, Base::scratch, Base::kept, Base::kWidth;
  using typename Base::S;
  Zoneout<T> zoneout_of_h, zoneout_of_c;
  const NormedSums<T, Cell> norm;
  const NormRow<T, 1> norm_of_c;

  OptionGradient(const SequenceBackward& call, const RowTile& tile, const SequencePartial& partial, void* memory)
      : Base(call, tile, partial, memory),
        zoneout_of_h(in.noise, MaskKind::kHiddenZoneout, shape.state, scratch.drops_of_h),
        zoneout_of_c(in.noise, MaskKind::kCellZoneout, shape.hidden, scratch.drops_of_c),
        norm(in),
        norm_of_c(kAlone, 1, shape.hidden) {
    if (shape.recurrent_dropout) dropout_factors<T>(in.noise, tile, shape.state, scratch.drops_of_h, scratch.factors);
    if (!shape.has_norm) return;
    for (int64_t i = 0; i < kSumCount * padded(); ++i) scratch.zeros[i] = 0;
    // Of the four sums a weight has but three in a GRU.
    for (int64_t i = 0; i < scratch.capacity * scratch.sums_stride; ++i)
      scratch.input_gain[i] = scratch.hidden_gain[i] = 0;
  }

  void back(int64_t count, int64_t step) override {
    if (kept + count > scratch.capacity) this->flush();
    this->gather(count, step);
    if (shape.recurrent_dropout) drop_operands(count);
    if (shape.has_norm) {
      make_normalised(count, step);
    } else if (call.gates == nullptr) {
      this->make_gates(count, step);
    }
    if (shape.zoneout) {
      zoneout_of_h.begin_step(tile, count, step);
      if (Cell::kHasCellState) zoneout_of_c.begin_step(tile, count, step);
    }
    for (int64_t p = 0; p < count; ++p) past_output(p, step);
    if (shape.has_w_hr) past_projection(count);
    for (int64_t p = 0; p < count; ++p) {
      if (call.gates)
        past_cell(p, step, (const T*)call.gates + saved_index(shape, step, tile.row[p]) * kSumCount * shape.hidden);
      else
        past_cell(p, step, (const S*)scratch.gates + p * kSumCount * shape.hidden);
      if (shape.has_norm) past_norms(p);
    }
    this->past_hidden_weights(count, scratch.past_w_hh, false);
    for (int64_t p = 0; p < count; ++p) add_hidden(p);
    this->end_step(count, step);
  }

  int64_t padded() const { return (shape.hidden + kWidth - 1) / kWidth * kWidth; }
  int units_from(int64_t unit, int64_t end) const { return end - unit < kWidth ? (int)(end - unit) : kWidth; }
  const S* factors(int64_t p) const { return scratch.factors + p * drop_width(shape.state); }

  void drop_operands(int64_t count) {
    const int64_t state = shape.state;
    for (int64_t p = 0; p < count; ++p)
      for (int64_t i = 0; i < state; ++i)
        scratch.operand[(kept + p) * state + i] = scratch.h[(kept + p) * state + i] * factors(p)[i];
  }

  // From dh after the step and that of the output to that of what the cell makes; dh becomes what passes it by.
  void past_output(int64_t p, int64_t step) {
    const int64_t state = shape.state;
    const T* const grad_output =
        call.grad_output ? (const T*)call.grad_output + token_index(shape, step, tile.row[p]) * state : nullptr;
    S *const dh = scratch.dh + p * state, *const fresh = scratch.fresh_dh + (kept + p) * state;
    for (int64_t unit = 0; unit < state; unit += kWidth) {
      const int units = units_from(unit, state);
      Vector<T> grad = load_first(dh + unit, units), past{};
      if (grad_output) grad = grad + load_first(grad_output + unit, units);
      if (shape.zoneout) grad = zoneout_of_h.gradient(p, unit, grad, past);
      store_first(fresh + unit, units, grad);
      store_first(dh + unit, units, past);
    }
  }

  void past_projection(int64_t count) {
    product_part(Product<T, S>{scratch.fresh_dh + kept * shape.state, shape.state, 1, (const T*)in.w_hr,
                               scratch.past_w_hr, count, shape.hidden, shape.state},
                 0, 1, 1);
  }

  struct Saved {
    Vector<T> of[kSumCount];
  };
  template <class G>
  __attribute__((always_inline)) Saved saved_gates(const G* gates, int64_t unit, int units) const {
    Saved saved;
    for (int s = 0; s < kSumCount; ++s) saved.of[s] = load_first(gates + s * shape.hidden + unit, units);
    return saved;
  }

  // The cell state before zoneout, of some units.
  __attribute__((always_inline)) Vector<T> fresh_cell(const LstmGates<Vector<T>>& a, Vector<T> c, int64_t p,
                                                      int64_t step, int64_t unit, int units) const {
    // After zoneout the saved cell state is another one.
    if (shape.zoneout) return lstm_cell(a, c);
    return load_first((const S*)call.cells + saved_index(shape, step, tile.row[p]) * shape.hidden + unit, units);
  }

  // From the gradient of what the cell makes to that of the four sums and, in part, of the former states.
  template <class G>
  void past_cell(int64_t p, int64_t step, const G* gates) {
    const int64_t hidden = shape.hidden, at = kept + p;
    const S* grad_h = shape.has_w_hr ? scratch.past_w_hr + p * hidden : scratch.fresh_dh + at * hidden;
    if (shape.has_norm && Cell::kHasCellState) past_norm_of_c(p, step, gates, grad_h);
    S *dh = scratch.dh + p * hidden, *dc = scratch.dc + p * hidden, *sums = scratch.sums + at * scratch.sums_stride;
    for (int64_t unit = 0; unit < hidden; unit += kWidth) {
      const int units = units_from(unit, hidden);
      const Vector<T> grad = load_first(grad_h + unit, units);
      const auto saved = saved_gates(gates, unit, units);
      if constexpr (Cell::kHasCellState) {
        const LstmGates<Vector<T>> a{saved.of[0], saved.of[1], saved.of[2], saved.of[3]};
        const Vector<T> c = this->former_cell(p, step, unit, units);
        Vector<T> past{}, t, grad_c = load_first(dc + unit, units);
        if (shape.zoneout) grad_c = zoneout_of_c.gradient(p, unit, grad_c, past);
        if (shape.has_norm) {
          t = load(scratch.tanh_y + unit);
          grad_c = grad_c + load(scratch.norm_grad + unit);
        } else {
          t = tanh(fresh_cell(a, c, p, step, unit, units));
          grad_c = fma(grad * a.o, tanh_slope(t), grad_c);
        }
        const auto found = lstm_gate_gradients(a, c, t, grad, grad_c);
        store_first(sums + unit, units, found.dz.i);
        store_first(sums + hidden + unit, units, found.dz.f);
        store_first(sums + 2 * hidden + unit, units, found.dz.g);
        store_first(sums + 3 * hidden + unit, units, found.dz.o);
        store_first(dc + unit, units, found.dc + past);
        if (shape.has_w_hr) store_first(scratch.unprojected + at * hidden + unit, units, a.o * t);
      } else {
        const Vector<T> h = load_first(scratch.h + at * hidden + unit, units), none{};
        const auto found = Cell::backward(saved.of, h, none, none, grad, none);
        for (int s = 0; s < kSumCount; ++s) store_first(sums + s * hidden + unit, units, found.sums[s]);
        store_first(dh + unit, units, load_first(dh + unit, units) + found.dh);
      }
    }
  }

  // ---- layer normalisation

  // u and v, normalised, of the step's rows and, where they were not saved, the gates.
  void make_normalised(int64_t count, int64_t step) {
    const int64_t size = padded() * kSumCount;
    CellRow<T>* const rows = scratch.single_rows;
    const PackedWeights<T> layout(shape);
    for (int64_t p = 0; p < count; ++p)
      rows[p] = {shape.projected ? nullptr : scratch.x + (kept + p) * shape.input,
                 shape.projected ? input_vector<T>(in, token_index(shape, step, tile.row[p])) : nullptr, nullptr,
                 nullptr};
    write_sums<T, Cell>(rows, count, layout, call.packed, scratch.u);
    for (int64_t p = 0; p < count; ++p)
      rows[p] = {nullptr, nullptr, scratch.zeros, scratch.operand + (kept + p) * shape.state};
    write_sums<T, Cell>(rows, count, layout, call.packed, scratch.v);
    for (int64_t p = 0; p < count; ++p) {
      S *const u = scratch.u + p * size, *const v = scratch.v + p * size;
      scratch.rstd_of_u[p] = norm.input.normalise(u);
      scratch.rstd_of_v[p] = norm.hidden.normalise(v);
      for (int64_t unit = 0; call.gates == nullptr && unit < shape.hidden; unit += kWidth) {
        Vector<T> sums[kSumCount];
        norm.from_input(u + unit * kSumCount, unit, sums);
        norm.add_hidden(v + unit * kSumCount, unit, sums);
        const auto next = Cell::step(sums, Vector<T>{}, Vector<T>{});
        for (int s = 0; s < kSumCount; ++s)
          store_first(scratch.gates + (p * kSumCount + s) * shape.hidden + unit, units_from(unit, shape.hidden),
                      next.saved[s]);
      }
    }
  }

  // Of row p: tanh y, and from the gradient of h the gradient of c̃ through y, to be added to its own.
  template <class G>
  void past_norm_of_c(int64_t p, int64_t step, const G* gates, const S* grad_h) {
    const int64_t hidden = shape.hidden, at = (kept + p) * hidden;
    S *const c = scratch.unit_c, *const grad = scratch.norm_grad;
    for (int64_t unit = 0; unit < hidden; unit += kWidth) {
      const int units = units_from(unit, hidden);
      const auto saved = saved_gates(gates, unit, units);
      const LstmGates<Vector<T>> a{saved.of[0], saved.of[1], saved.of[2], saved.of[3]};
      store(c + unit, fresh_cell(a, this->former_cell(p, step, unit, units), p, step, unit, units));
    }
    const S rstd = norm_of_c.normalise(c);
    for (int64_t unit = 0; unit < hidden; unit += kWidth) {
      const int units = units_from(unit, hidden);
      const Vector<T> normed = load(c + unit), t = tanh(normed_cell<T>(in, normed, unit));
      const Vector<T> o = load_first(gates + 3 * hidden + unit, units);
      const Vector<T> dy = load_first(grad_h + unit, units) * o * tanh_slope(t);
      store(scratch.tanh_y + unit, t);
      store_first(scratch.dy + at + unit, units, dy);
      store_first(scratch.cell_gain + at + unit, units, dy * normed);
      store(grad + unit, dy * load_first((const T*)in.ln_c + unit, units));
    }
    norm_of_c.gradient(grad, c, rstd);
  }

  // From the gradients of row p's sums to those of both products, and to what γ_ih and γ_hh need.
  void past_norms(int64_t p) {
    const int64_t size = padded() * kSumCount, at = (kept + p) * scratch.sums_stride;
    past_norm(norm.input, Cell::kInputSum, in.ln_ih, scratch.u + p * size, scratch.rstd_of_u[p], scratch.sums + at,
              scratch.input_gain + at, scratch.input_sums + at);
    past_norm(norm.hidden, Cell::kHiddenSum, in.ln_hh, scratch.v + p * size, scratch.rstd_of_v[p], scratch.sums + at,
              scratch.hidden_gain + at, scratch.hidden_sums + at);
  }

  void past_norm(const NormRow<T, Cell::kGates>& row, const int (&sum_of)[Cell::kGates], const void* gamma,
                 const S* normed, S rstd, const S* sums, S* gain, S* to) {
    const int64_t hidden = shape.hidden;
    S* const grad = scratch.norm_grad;
    for (int64_t unit = 0; unit < hidden; unit += kWidth)
      for (int g = 0; g < Cell::kGates; ++g) {
        const int64_t block = unit * kSumCount + sum_of[g] * kWidth, at = sum_of[g] * hidden + unit;
        const int units = units_from(unit, hidden);
        const Vector<T> dz = load_first(sums + at, units);
        store_first(gain + at, units, dz * load(normed + block));
        store(grad + block, dz * load_first((const T*)gamma + g * hidden + unit, units));
      }
    row.gradient(grad, normed, rstd);
    for (int64_t unit = 0; unit < hidden; unit += kWidth)
      for (int g = 0; g < Cell::kGates; ++g)
        store_first(to + sum_of[g] * hidden + unit, units_from(unit, hidden),
                    load(grad + unit * kSumCount + sum_of[g] * kWidth));
  }

  void add_hidden(int64_t p) {
    const int64_t state = shape.state;
    S* const dh = scratch.dh + p * state;
    for (int64_t unit = 0; unit < state; unit += kWidth) {
      const int units = units_from(unit, state);
      Vector<T> grad = load_first(scratch.past_w_hh + p * state + unit, units);
      if (shape.recurrent_dropout) grad = grad * load_first(factors(p) + unit, units);
      store_first(dh + unit, units, load_first(dh + unit, units) + grad);
    }
  }
};

template <class T, class Sums, class Products>
int64_t backward_bytes(const SequenceShape& shape, int64_t count) {
  BackwardScratch<T> scratch(shape, count, nullptr);
  SequenceInputs in{};
  in.shape = shape;
  Sums(shape, nullptr, scratch);
  Products(in, nullptr, scratch.capacity, scratch);
  return scratch.bytes();
}

// Sums and Products: of the plain step; options have those by lanes.
template <class T, class Sums, class Products>
void sequence_backward(const SequenceBackward& call, const RowTile& tile, const SequencePartial& partial,
                       void* memory) {
  if (has_options(call.in.shape))
    OptionGradient<T, typename Sums::Cell>(call, tile, partial, memory).run();
  else
    SequenceGradient<T, Sums, Products>(call, tile, partial, memory).run();
}

}  // namespace seqrec_fast::SEQREC_TIER
