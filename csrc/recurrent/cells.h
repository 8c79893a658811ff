// The pointwise part of a cell, on one register of units.
#pragma once

#include "common/vector_math.h"

namespace seqrec_fast::SEQREC_TIER {

// Gates after their activation, in torch's order.
template <class V>
struct LstmGates {
  V i, f, g, o;
};

template <class V>
SEQREC_INLINE LstmGates<V> lstm_activate(V zi, V zf, V zg, V zo) {
  return {sigmoid(zi), sigmoid(zf), tanh(zg), sigmoid(zo)};
}

template <class V>
SEQREC_INLINE V lstm_cell(const LstmGates<V>& a, V c) {
  return fma(a.f, c, a.i * a.g);
}

template <class V>
SEQREC_INLINE V lstm_hidden(const LstmGates<V>& a, V c_next) {
  return a.o * tanh(c_next);
}

// tanh' = 1 - tanh², rounded once: near saturation the square alone would lose most of it.
template <class V>
SEQREC_INLINE V tanh_slope(V tanh_x) {
  return fma(-tanh_x, tanh_x, V{} + 1);
}

template <class V>
struct LstmGateGradients {
  LstmGates<V> dz;  // with respect to the pre-activations
  V dc;             // with respect to the former cell state
};

// From the gradients of h = o·t and of c_next. σ' = σ(1 - σ).
template <class V>
SEQREC_INLINE LstmGateGradients<V> lstm_gate_gradients(const LstmGates<V>& a, V c, V t, V grad_h, V dc) {
  return {{
              dc * a.g * (a.i * (1 - a.i)),
              dc * c * (a.f * (1 - a.f)),
              dc * a.i * tanh_slope(a.g),
              grad_h * t * (a.o * (1 - a.o)),
          },
          dc * a.f};
}

template <class V>
SEQREC_INLINE LstmGateGradients<V> lstm_cell_backward(const LstmGates<V>& a, V c, V c_next, V grad_h, V grad_c) {
  const V t = tanh(c_next);
  return lstm_gate_gradients(a, c, t, grad_h, fma(grad_h * a.o, tanh_slope(t), grad_c));
}

}  // namespace seqrec_fast::SEQREC_TIER
