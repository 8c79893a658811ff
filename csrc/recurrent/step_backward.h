// The backward of one step: the gradients of the sums, row by row, then the products with them.
//
// du and dv hold, gate by gate in the order of the weights' rows, the gradients of W_ih·x and of W_hh·h. They are one
// array where no gate keeps the two apart.
#pragma once

#include "common/gemm.h"
#include "common/lanes.h"
#include "kernels.h"
#include "sum_gates.h"

namespace seqrec_fast::SEQREC_TIER {

template <bool kPartial, class Cell, class T>
SEQREC_INLINE void sum_gradients(const StepBackward& step, int64_t row, int64_t unit, int count) {
  using S = typename Compute<T>::Scalar;
  const int64_t hidden = step.sizes.hidden, at = row * hidden + unit;
  const auto state = [&](const void* array) { return load_lanes<kPartial>((const T*)array + at, count); };
  Vector<T> saved[kSumCount];
  for (int i = 0; i < kSumCount; ++i)
    saved[i] = load_lanes<kPartial>((const T*)step.gates + (row * kSumCount + i) * hidden + unit, count);
  Vector<T> h{}, c{}, c_next{}, grad_c{};
  if constexpr (Cell::kHasCellState) {
    c = state(step.c);
    c_next = state(step.c_next);
    grad_c = state(step.grad_c);
  } else {
    h = state(step.h);
  }
  const auto gradient = Cell::backward(saved, h, c, c_next, state(step.grad_h), grad_c);

  const int64_t gates = row * gradient_stride(Cell::kGates * hidden) + unit;
  for (int gate = 0; gate < Cell::kGates; ++gate)
    store_lanes<kPartial>((S*)step.du + gates + gate * hidden, count, gradient.sums[Cell::kInputSum[gate]]);
  if constexpr (kSumGates<Cell>.apart())
    for (int gate = 0; gate < Cell::kGates; ++gate)
      store_lanes<kPartial>((S*)step.dv + gates + gate * hidden, count, gradient.sums[Cell::kHiddenSum[gate]]);
  if constexpr (Cell::kHasCellState) {
    if (step.dc) store_lanes<kPartial>((T*)step.dc + at, count, gradient.dc);
  } else {
    if (step.dh) store_lanes<kPartial>((S*)step.dh_wide + at, count, gradient.dh);
  }
}

template <class Cell, class T>
void step_sum_gradients(const StepBackward& step, int64_t begin, int64_t end) {
  constexpr int kWidth = Compute<T>::kWidth;
  const int64_t hidden = step.sizes.hidden;
  for (int64_t row = begin; row < end; ++row) {
    int64_t unit = 0;
    for (; unit + kWidth <= hidden; unit += kWidth) sum_gradients<false, Cell, T>(step, row, unit, kWidth);
    if (unit < hidden) sum_gradients<true, Cell, T>(step, row, unit, (int)(hidden - unit));
  }
}

// db[n] = Σ_m d[m][n], the vectors of its part.
template <class T, class S>
SEQREC_INLINE void bias_gradient(const S* d, int64_t rows, int64_t columns, T* db, int64_t begin, int64_t end) {
  constexpr int kWidth = Compute<T>::kWidth;
  const int64_t vectors = (columns + kWidth - 1) / kWidth, stride = gradient_stride(columns);
  for (int64_t v = vectors * begin / kProductParts; v < vectors * end / kProductParts; ++v) {
    const int64_t column = v * kWidth;
    if (column + kWidth <= columns)
      store(db + column, sum_rows<false, Vector<T>>(d + column, stride, rows, kWidth));
    else
      store_first(db + column, (int)(columns - column),
                  sum_rows<true, Vector<T>>(d + column, stride, rows, (int)(columns - column)));
  }
}

template <class Cell, class T>
void step_products(const StepBackward& step, int64_t begin, int64_t end) {
  using S = typename Compute<T>::Scalar;
  const auto [rows, input, projected, hidden, scalar] = step.sizes;
  const int64_t gates = Cell::kGates * hidden, stride = gradient_stride(gates);
  const S *du = (const S*)step.du, *dv = (const S*)step.dv;
  const T *x = (const T*)step.x, *h = (const T*)step.h, *w_ih = (const T*)step.w_ih, *w_hh = (const T*)step.w_hh;
  const auto part = [&](const auto& product) {
    if (product.out) product_part(product, begin, end, kProductParts);
  };
  part(Product<T>{du, stride, 1, w_ih, (T*)step.dx, rows, input, gates});  // dx = du·W_ih
  if constexpr (Cell::kHasCellState)
    part(Product<T>{dv, stride, 1, w_hh, (T*)step.dh, rows, projected, gates});  // dh = dv·W_hh
  else if (step.dh)
    part(Product<T, S>{dv, stride, 1, w_hh, (S*)step.dh_wide, rows, projected, gates, true});  // onto what h' carries
  part(Product<T>{du, 1, stride, x, (T*)step.dw_ih, gates, input, rows});                      // dW_ih = duᵀ·x
  part(Product<T>{dv, 1, stride, h, (T*)step.dw_hh, gates, projected, rows});                  // dW_hh = dvᵀ·h
  if (step.db_ih) bias_gradient(du, rows, gates, (T*)step.db_ih, begin, end);
  if (step.db_hh) bias_gradient(dv, rows, gates, (T*)step.db_hh, begin, end);
}

// dh from dh_wide, for the types that are computed in another.
template <class T>
void step_round_dh(const StepBackward& step, int64_t begin, int64_t end) {
  using S = typename Compute<T>::Scalar;
  const int64_t hidden = step.sizes.hidden;
  narrow((const S*)step.dh_wide + begin * hidden, (end - begin) * hidden, (T*)step.dh + begin * hidden);
}

}  // namespace seqrec_fast::SEQREC_TIER
