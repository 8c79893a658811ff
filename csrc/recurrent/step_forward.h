// One step of a cell for a batch, on weights as torch keeps them: the sums, then the cell. The backward is in
// step_backward.h.
#pragma once

#include "common/gemm.h"
#include "common/lanes.h"
#include "kernels.h"
#include "sum_gates.h"

namespace seqrec_fast::SEQREC_TIER {

// The sums of one task, [row][sum][unit]. A group of four may be stored for the last single units of a block, hence the
// padding.
template <class S>
struct Sums {
  static constexpr int kUnits = kUnitBlock + 4;
  S of[kRowBlock][kSumCount][kUnits];
};

// The x and h rows of a task as the products read them: fp32 for the 16-bit types (widened once a task), else in place.
template <class S>
struct StepRows {
  const S *x, *h;
};

// The rows of a weight to point at where a sum has no gate: none of them is read.
SEQREC_INLINE int some_gate(int gate) { return gate < 0 ? 0 : gate; }

// kRows rows × four units of kCount sums, from `sum` on; unit_stride 0 computes the same unit four times. What does not
// enter these sums has no depth.
template <class Cell, int kRows, int kCount, class T, class S>
SEQREC_INLINE void make_sums(const StepForward& step, const StepRows<S>& rows, int64_t row, int sum, int64_t depth_x,
                             int64_t depth_h, int64_t unit, int unit_stride, Sums<S>& sums, int64_t to) {
  const auto [batch, input, projected, hidden, scalar] = step.sizes;
  Vector<T> acc[kRows][4 * kCount] = {};
  const T *w_ih[kCount], *w_hh[kCount];
  for (int i = 0; i < kCount; ++i) {
    w_ih[i] = (const T*)step.w_ih + (some_gate(kSumGates<Cell>.input[sum + i]) * hidden + unit) * input;
    w_hh[i] = (const T*)step.w_hh + (some_gate(kSumGates<Cell>.hidden[sum + i]) * hidden + unit) * projected;
  }
  accumulate_dots<kRows, kCount>(acc, rows.x + row * input, input, w_ih, unit_stride * input, depth_x);
  accumulate_dots<kRows, kCount>(acc, rows.h + row * projected, projected, w_hh, unit_stride * projected, depth_h);
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i)
      store_sums(&sums.of[row + r][sum + i][to], acc[r][4 * i], acc[r][4 * i + 1], acc[r][4 * i + 2],
                 acc[r][4 * i + 3]);
}

// As many sums at once as the registers hold: few rows would otherwise leave the multipliers waiting for each other.
// Those that x or h alone enter come one by one.
template <class Cell, int kRows, class T, class S>
SEQREC_INLINE void all_sums(const StepForward& step, const StepRows<S>& rows, int64_t row, int64_t unit,
                            int unit_stride, Sums<S>& sums, int64_t to) {
  constexpr int kAccumulators = kDotRows * 4;
  constexpr int kFit = kRows * 16 <= kAccumulators ? 4 : kRows * 8 <= kAccumulators ? 2 : 1;
  constexpr SumGates<Cell> kGates = kSumGates<Cell>;
  constexpr int kCount = kFit < kGates.shared ? kFit : kGates.shared;
  static_assert(kGates.shared % kCount == 0);
  const int64_t input = step.sizes.input, projected = step.sizes.projected;
  for (int sum = 0; sum < kGates.shared; sum += kCount)
    make_sums<Cell, kRows, kCount, T>(step, rows, row, sum, input, projected, unit, unit_stride, sums, to);
  for (int sum = kGates.shared; sum < kSumCount; ++sum)
    make_sums<Cell, kRows, 1, T>(step, rows, row, sum, kGates.input[sum] < 0 ? 0 : input,
                                 kGates.hidden[sum] < 0 ? 0 : projected, unit, unit_stride, sums, to);
}

// Every row of the task for four units (or, with unit_stride 0, for one).
template <class Cell, class T, class S>
SEQREC_INLINE void unit_sums(const StepForward& step, const StepRows<S>& rows, int64_t count, int64_t unit,
                             int unit_stride, Sums<S>& sums, int64_t to) {
  static_assert(kDotRows <= 6);
  int64_t row = 0;
  for (; row + kDotRows <= count; row += kDotRows)
    all_sums<Cell, kDotRows, T>(step, rows, row, unit, unit_stride, sums, to);
  switch (count - row) {
    case 1:
      return all_sums<Cell, 1, T>(step, rows, row, unit, unit_stride, sums, to);
    case 2:
      return all_sums<Cell, 2, T>(step, rows, row, unit, unit_stride, sums, to);
#if defined(__AVX512F__) || defined(__aarch64__)
    case 3:
      return all_sums<Cell, 3, T>(step, rows, row, unit, unit_stride, sums, to);
    case 4:
      return all_sums<Cell, 4, T>(step, rows, row, unit, unit_stride, sums, to);
    case 5:
      return all_sums<Cell, 5, T>(step, rows, row, unit, unit_stride, sums, to);
#endif
    default:
      return;
  }
}

// Activations and state update of `count` units of one row.
template <bool kPartial, class Cell, class T, class S>
SEQREC_INLINE void update_cell(const StepForward& step, const S (&made)[kSumCount][Sums<S>::kUnits], int64_t row,
                               int64_t unit, int64_t from, int count) {
  const int64_t hidden = step.sizes.hidden, at = row * hidden + unit;
  Vector<T> sums[kSumCount];
  for (int sum = 0; sum < kSumCount; ++sum) {
    const int input_gate = kSumGates<Cell>.input[sum], hidden_gate = kSumGates<Cell>.hidden[sum];
    Vector<T> bias{};
    if (input_gate >= 0 && step.b_ih)
      bias = load_lanes<kPartial>((const T*)step.b_ih + input_gate * hidden + unit, count);
    if (hidden_gate >= 0 && step.b_hh)
      bias = bias + load_lanes<kPartial>((const T*)step.b_hh + hidden_gate * hidden + unit, count);
    sums[sum] = load_lanes<kPartial>(&made[sum][from], count) + bias;
  }
  Vector<T> h{}, c{};  // a cell without cell state carries h itself
  if constexpr (Cell::kHasCellState)
    c = load_lanes<kPartial>((const T*)step.c + at, count);
  else
    h = load_lanes<kPartial>((const T*)step.h + at, count);
  const auto next = Cell::step(sums, h, c);
  if constexpr (Cell::kHasCellState) store_lanes<kPartial>((T*)step.c_next + at, count, next.c);
  store_lanes<kPartial>((T*)step.h_next + at, count, next.h);
  if (step.gates == nullptr) return;
  T* gates = (T*)step.gates + row * kSumCount * hidden + unit;
  for (int i = 0; i < kSumCount; ++i) store_lanes<kPartial>(gates + i * hidden, count, next.saved[i]);
}

template <class Cell, class T>
void step_forward(const StepForward& step, int64_t begin, int64_t end, [[maybe_unused]] float* wide) {
  using S = typename Compute<T>::Scalar;
  constexpr int kWidth = Compute<T>::kWidth;
  const auto [batch, input, projected, hidden, scalar] = step.sizes;
  const int64_t blocks = row_blocks(step.sizes);
  Sums<S> sums;
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
    for (; unit + 4 <= units; unit += 4) unit_sums<Cell, T>(step, operands, rows, first + unit, 1, sums, unit);
    for (; unit < units; ++unit) unit_sums<Cell, T>(step, operands, rows, first + unit, 0, sums, unit);

    // Pointwise, while the sums are in L1.
    for (int64_t r = 0; r < rows; ++r) {
      int64_t u = 0;
      for (; u + kWidth <= units; u += kWidth)
        update_cell<false, Cell, T>(step, sums.of[r], row + r, first + u, u, kWidth);
      if (u < units) update_cell<true, Cell, T>(step, sums.of[r], row + r, first + u, u, (int)(units - u));
    }
  }
}

}  // namespace seqrec_fast::SEQREC_TIER
