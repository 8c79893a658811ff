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
SEQREC_INLINE V lstm_cell(const LstmGates<V>& a, V c) {
  return fma(a.f, c, a.i * a.g);
}

template <class V>
struct LstmStates {
  V h, c;
  LstmGates<V> gates;
};

SEQREC_INLINE LstmStates<F64> lstm_states(F64 zi, F64 zf, F64 zg, F64 zo, F64 c) {
  const LstmGates<F64> a{sigmoid(zi), sigmoid(zf), tanh(zg), sigmoid(zo)};
  const F64 c_next = lstm_cell(a, c);
  return {a.o * tanh(c_next), c_next, a};
}

// i·g and o·tanh(c) are one quotient each: three divisions instead of five. The gates, where they are saved, are
// quotients of their own, so that a NaN in one does not reach another. The limits keep the product of two denominators
// finite; below e^-60 a gate is closed for every c that fp32 can tell apart from what it adds to.
SEQREC_INLINE LstmStates<F32> lstm_states(F32 zi, F32 zf, F32 zg, F32 zo, F32 c) {
  const F32 one_i = one_plus_exp(-zi, 60.0f), one_f = one_plus_exp(-zf, 88.0f), one_o = one_plus_exp(-zo, 60.0f);
  const F32 minus_g = expm1_of(zg * -2.0f), two_g = minus_g + 2.0f;
  const F32 f = 1.0f / one_f, in = 1.0f / (one_i * two_g);
  const F32 c_next = fma(f, c, -minus_g * in);
  const F32 minus_c = expm1_of(c_next * -2.0f), two_c = minus_c + 2.0f;
  const F32 out = 1.0f / (one_o * two_c);
  return {-minus_c * out, c_next, {1.0f / one_i, f, -minus_g / two_g, 1.0f / one_o}};
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
