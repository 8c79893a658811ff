// The two cells as the whole-sequence kernels see them: which sum a gate's products go to, the pointwise part, and how
// the gradient of the sums reaches both weights. Formulas as in seqrec_fast/backends/reference/{lstm,gru}.py.
#pragma once

#include "cells.h"
#include "sequence.h"

namespace seqrec_fast::SEQREC_TIER {

template <class V>
struct CellStates {
  V h, c;
  V saved[kSumCount];  // for the backward
};

template <class V>
struct CellGradients {
  V sums[kSumCount];  // with respect to the four sums
  V dh, dc;           // with respect to the former states, without what comes through W_hh
};

// A range of a weight's rows and where the gradients of the sums that they make begin, both in units of H.
struct GateRange {
  int row, sum, count;
};

struct LstmCell {
  static constexpr CellKind kKind = CellKind::kLstm;
  static constexpr int kGates = 4;
  static constexpr int kInputSum[kGates] = {0, 1, 2, 3};
  static constexpr int kHiddenSum[kGates] = {0, 1, 2, 3};
  static constexpr int kHiddenRanges = 1;
  static constexpr GateRange kHidden[kHiddenRanges] = {{0, 0, 4}};
  static constexpr bool kHasCellState = true;

  template <class V>
  SEQREC_INLINE CellStates<V> step(const V (&sums)[kSumCount], V, V c) {
    const auto [h_next, c_next, gates] = lstm_states(sums[0], sums[1], sums[2], sums[3], c);
    return {h_next, c_next, {gates.i, gates.f, gates.g, gates.o}};
  }

  template <class V>
  SEQREC_INLINE CellGradients<V> backward(const V (&saved)[kSumCount], V, V c, V c_next, V grad_h, V grad_c) {
    const auto found =
        lstm_cell_backward(LstmGates<V>{saved[0], saved[1], saved[2], saved[3]}, c, c_next, grad_h, grad_c);
    return {{found.dz.i, found.dz.f, found.dz.g, found.dz.o}, V{}, found.dc};
  }
};

// Sums: r, z, W_in·x + b_in, W_hn·h + b_hn.
struct GruCell {
  static constexpr CellKind kKind = CellKind::kGru;
  static constexpr int kGates = 3;
  static constexpr int kInputSum[kGates] = {0, 1, 2};
  static constexpr int kHiddenSum[kGates] = {0, 1, 3};
  static constexpr int kHiddenRanges = 2;
  static constexpr GateRange kHidden[kHiddenRanges] = {{0, 0, 2}, {2, 3, 1}};
  static constexpr bool kHasCellState = false;

  template <class V>
  SEQREC_INLINE CellStates<V> step(const V (&sums)[kSumCount], V h, V) {
    const V r = sigmoid(sums[0]), z = sigmoid(sums[1]), n = tanh(fma(r, sums[3], sums[2]));
    return {fma(z, h - n, n), V{}, {r, z, n, sums[3]}};  // (1 - z)·n + z·h
  }

  template <class V>
  SEQREC_INLINE CellGradients<V> backward(const V (&saved)[kSumCount], V h, V, V, V grad_h, V) {
    const auto [r, z, n, from_h] = saved;
    const V dn = grad_h * (1 - z) * tanh_slope(n);
    const V dz = grad_h * (h - n) * (z * (1 - z));
    const V dr = dn * from_h * (r * (1 - r));
    return {{dr, dz, dn, dn * r}, grad_h * z, V{}};
  }
};

}  // namespace seqrec_fast::SEQREC_TIER
