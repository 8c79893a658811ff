// One LSTM step for a batch, forward and backward, on weights as torch keeps them.
#pragma once

#include "cells.h"
#include "common/gemm.h"
#include "common/lanes.h"
#include "kernels.h"

namespace seqrec_fast::SEQREC_TIER {

// Pre-activations of one task, [row][gate][unit]. A group of four sums may be stored for the last single units of a
// block, hence the padding.
template <class S>
struct PreActivations {
  static constexpr int kUnits = kUnitBlock + 4;
  S z[kRowBlock][4][kUnits];
};

// The x and h rows of a task as the products read them: fp32 for the 16-bit types (widened once a task), else in place.
template <class S>
struct StepRows {
  const S *x, *h;
};

// z of kRows rows × four units of kBlocks gates each, from gate `gate` on. unit_stride 0 computes the same unit four
// times.
template <int kRows, int kBlocks, class T, class S>
SEQREC_INLINE void gate_sums(const LstmStep& step, const StepRows<S>& rows, int64_t row, int gate, int64_t unit,
                             int unit_stride, S (*z)[4][PreActivations<S>::kUnits], int64_t z_unit) {
  const auto [batch, input, projected, hidden, scalar] = step.sizes;
  Vector<T> acc[kRows][4 * kBlocks] = {};
  const T *w_ih[kBlocks], *w_hh[kBlocks];
  for (int g = 0; g < kBlocks; ++g) {
    w_ih[g] = (const T*)step.w_ih + ((gate + g) * hidden + unit) * input;
    w_hh[g] = (const T*)step.w_hh + ((gate + g) * hidden + unit) * projected;
  }
  accumulate_dots<kRows, kBlocks>(acc, rows.x + row * input, input, w_ih, unit_stride * input, input);
  accumulate_dots<kRows, kBlocks>(acc, rows.h + row * projected, projected, w_hh, unit_stride * projected, projected);
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int g = 0; g < kBlocks; ++g)
      store_sums(&z[row + r][gate + g][z_unit], acc[r][4 * g], acc[r][4 * g + 1], acc[r][4 * g + 2], acc[r][4 * g + 3]);
}

// As many gates at once as the registers hold: few rows would otherwise leave the multipliers waiting for each other.
template <int kRows, class T, class S>
SEQREC_INLINE void all_gate_sums(const LstmStep& step, const StepRows<S>& rows, int64_t row, int64_t unit,
                                 int unit_stride, PreActivations<S>& pre, int64_t z_unit) {
  constexpr int kAccumulators = kDotRows * 4;
  constexpr int kBlocks = kRows * 16 <= kAccumulators ? 4 : kRows * 8 <= kAccumulators ? 2 : 1;
  for (int gate = 0; gate < 4; gate += kBlocks)
    gate_sums<kRows, kBlocks, T>(step, rows, row, gate, unit, unit_stride, pre.z, z_unit);
}

// z of every row of the task for four units (or, with unit_stride 0, for one).
template <class T, class S>
SEQREC_INLINE void unit_sums(const LstmStep& step, const StepRows<S>& rows, int64_t count, int64_t unit,
                             int unit_stride, PreActivations<S>& pre, int64_t z_unit) {
  static_assert(kDotRows <= 6);
  int64_t row = 0;
  for (; row + kDotRows <= count; row += kDotRows)
    all_gate_sums<kDotRows, T>(step, rows, row, unit, unit_stride, pre, z_unit);
  switch (count - row) {
    case 1:
      return all_gate_sums<1, T>(step, rows, row, unit, unit_stride, pre, z_unit);
    case 2:
      return all_gate_sums<2, T>(step, rows, row, unit, unit_stride, pre, z_unit);
#if defined(__AVX512F__) || defined(__aarch64__)
    case 3:
      return all_gate_sums<3, T>(step, rows, row, unit, unit_stride, pre, z_unit);
    case 4:
      return all_gate_sums<4, T>(step, rows, row, unit, unit_stride, pre, z_unit);
    case 5:
      return all_gate_sums<5, T>(step, rows, row, unit, unit_stride, pre, z_unit);
#endif
    default:
      return;
  }
}

// Activations and state update of `count` units of one row.
template <bool kPartial, class T, class S>
SEQREC_INLINE void update_cell(const LstmStep& step, const S (&z)[4][PreActivations<S>::kUnits], int64_t row,
                               int64_t unit, int64_t z_unit, int count) {
  const int64_t hidden = step.sizes.hidden;
  Vector<T> sums[4];
  for (int gate = 0; gate < 4; ++gate) {
    Vector<T> bias{};
    if (step.b_ih) bias = load_lanes<kPartial>((const T*)step.b_ih + gate * hidden + unit, count);
    if (step.b_hh) bias = bias + load_lanes<kPartial>((const T*)step.b_hh + gate * hidden + unit, count);
    sums[gate] = load_lanes<kPartial>(&z[gate][z_unit], count) + bias;
  }
  const int64_t at = row * hidden + unit;
  const auto [h_next, c_next, activated] =
      lstm_states(sums[0], sums[1], sums[2], sums[3], load_lanes<kPartial>((const T*)step.c + at, count));
  store_lanes<kPartial>((T*)step.c_next + at, count, c_next);
  store_lanes<kPartial>((T*)step.h_next + at, count, h_next);
  if (step.gates == nullptr) return;
  T* gates = (T*)step.gates + row * 4 * hidden + unit;
  store_lanes<kPartial>(gates, count, activated.i);
  store_lanes<kPartial>(gates + hidden, count, activated.f);
  store_lanes<kPartial>(gates + 2 * hidden, count, activated.g);
  store_lanes<kPartial>(gates + 3 * hidden, count, activated.o);
}

template <class T>
void lstm_step(const LstmStep& step, int64_t begin, int64_t end, [[maybe_unused]] float* wide) {
  using S = typename Compute<T>::Scalar;
  constexpr int kWidth = Compute<T>::kWidth;
  const auto [batch, input, projected, hidden, scalar] = step.sizes;
  const int64_t blocks = row_blocks(step.sizes);
  PreActivations<S> pre;
  [[maybe_unused]] int64_t widened = -1;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t row = task % blocks * kRowBlock;
    const int64_t rows = batch - row < kRowBlock ? batch - row : kRowBlock;
    const T* x = (const T*)step.x + row * input;
    const T* h = (const T*)step.h + row * projected;
    StepRows<S> operands;
    if constexpr (kIsHalf<T>) {
      operands = {wide, wide + kRowBlock * input};
      if (widened != row) {
        widen(x, rows * input, wide);
        widen(h, rows * projected, wide + kRowBlock * input);
        widened = row;
      }
    } else {
      operands = {x, h};
    }

    // Products: four units at a time, the last ones of a width that 4 does not divide by themselves.
    const int64_t first = task / blocks * kUnitBlock;
    const int64_t units = hidden - first < kUnitBlock ? hidden - first : kUnitBlock;
    int64_t unit = 0;
    for (; unit + 4 <= units; unit += 4) unit_sums<T>(step, operands, rows, first + unit, 1, pre, unit);
    for (; unit < units; ++unit) unit_sums<T>(step, operands, rows, first + unit, 0, pre, unit);

    // Pointwise, while the sums are in L1.
    for (int64_t r = 0; r < rows; ++r) {
      int64_t u = 0;
      for (; u + kWidth <= units; u += kWidth) update_cell<false, T>(step, pre.z[r], row + r, first + u, u, kWidth);
      if (u < units) update_cell<true, T>(step, pre.z[r], row + r, first + u, u, (int)(units - u));
    }
  }
}

// ---- backward
// ---------------------------------------------------------------------------------------------------------

template <bool kPartial, class T>
SEQREC_INLINE void gate_gradients(const LstmStepBackward& step, int64_t row, int64_t unit, int count) {
  using S = typename Compute<T>::Scalar;
  const int64_t hidden = step.sizes.hidden, at = row * hidden + unit, dz_stride = gradient_stride(hidden);
  const T* gates = (const T*)step.gates + row * 4 * hidden + unit;
  const LstmGates<Vector<T>> activated{load_lanes<kPartial>(gates, count), load_lanes<kPartial>(gates + hidden, count),
                                       load_lanes<kPartial>(gates + 2 * hidden, count),
                                       load_lanes<kPartial>(gates + 3 * hidden, count)};
  const auto gradient = lstm_cell_backward(activated, load_lanes<kPartial>((const T*)step.c + at, count),
                                           load_lanes<kPartial>((const T*)step.c_next + at, count),
                                           load_lanes<kPartial>((const T*)step.grad_h + at, count),
                                           load_lanes<kPartial>((const T*)step.grad_c + at, count));
  S* dz = (S*)step.dz + row * dz_stride + unit;
  store_lanes<kPartial>(dz, count, gradient.dz.i);
  store_lanes<kPartial>(dz + hidden, count, gradient.dz.f);
  store_lanes<kPartial>(dz + 2 * hidden, count, gradient.dz.g);
  store_lanes<kPartial>(dz + 3 * hidden, count, gradient.dz.o);
  if (step.dc) store_lanes<kPartial>((T*)step.dc + at, count, gradient.dc);
}

template <class T>
void lstm_step_gate_gradients(const LstmStepBackward& step, int64_t begin, int64_t end) {
  constexpr int kWidth = Compute<T>::kWidth;
  const int64_t hidden = step.sizes.hidden;
  for (int64_t row = begin; row < end; ++row) {
    int64_t unit = 0;
    for (; unit + kWidth <= hidden; unit += kWidth) gate_gradients<false, T>(step, row, unit, kWidth);
    if (unit < hidden) gate_gradients<true, T>(step, row, unit, (int)(hidden - unit));
  }
}

template <class T>
void lstm_step_products(const LstmStepBackward& step, int64_t begin, int64_t end) {
  using S = typename Compute<T>::Scalar;
  constexpr int kWidth = Compute<T>::kWidth;
  const auto [rows, input, projected, hidden, scalar] = step.sizes;
  const int64_t gates = 4 * hidden, stride = gradient_stride(hidden);
  const S* dz = (const S*)step.dz;
  const T *x = (const T*)step.x, *h = (const T*)step.h, *w_ih = (const T*)step.w_ih, *w_hh = (const T*)step.w_hh;
  const Product<T> products[4] = {
      {dz, stride, 1, w_ih, (T*)step.dx, rows, input, gates},      // dx = dz·W_ih
      {dz, stride, 1, w_hh, (T*)step.dh, rows, projected, gates},  // dh = dz·W_hh
      {dz, 1, stride, x, (T*)step.dw_ih, gates, input, rows},      // dW_ih = dzᵀ·x
      {dz, 1, stride, h, (T*)step.dw_hh, gates, projected, rows},  // dW_hh = dzᵀ·h
  };
  for (const Product<T>& product : products)
    if (product.out) product_part(product, begin, end, kProductParts);
  if (step.db == nullptr) return;
  const int64_t vectors = (gates + kWidth - 1) / kWidth;
  for (int64_t v = vectors * begin / kProductParts; v < vectors * end / kProductParts; ++v) {
    const int64_t gate = v * kWidth;
    if (gate + kWidth <= gates)
      store((T*)step.db + gate, sum_rows<false, Vector<T>>(dz + gate, stride, rows, kWidth));
    else
      store_first((T*)step.db + gate, (int)(gates - gate),
                  sum_rows<true, Vector<T>>(dz + gate, stride, rows, (int)(gates - gate)));
  }
}

}  // namespace seqrec_fast::SEQREC_TIER
