// For tests/backends/test_sanitized.py: every recurrent kernel of one CPU tier on arrays of exactly their
// size, to be built with AddressSanitizer and UndefinedBehaviorSanitizer. Prints the number of calls. With any argument
// one array is a value short, which must be noticed.
#include <stdio.h>
#include <stdlib.h>

#include <initializer_list>

#include "recurrent/kernels.h"
#include "recurrent/sequence.h"

using namespace seqrec_fast;

static size_t width(Scalar scalar) { return scalar == Scalar::kDouble ? 8 : scalar == Scalar::kFloat ? 4 : 2; }

// A heap array of small values (0x3c… is about 0.01 in every format), so that a read or write past it is seen.
struct Array {
  Array(int64_t count, size_t bytes) : data((unsigned char*)malloc(count * bytes)) {
    for (size_t i = 0; i < count * bytes; ++i) data[i] = (unsigned char)(i % bytes == bytes - 1 ? 0x3c : i * 37);
  }
  Array(const Array&) = delete;
  ~Array() { free(data); }
  operator void*() const { return data; }
  unsigned char* data;
};

// Forward and backward of a step of a cell with four gates, or with three and no cell state.
static void step(const StepKernels& kernels, const StepSizes& s, bool gru, bool with_bias, int missing) {
  const size_t w = width(s.scalar), wide = w < 4 ? 4 : w;
  const auto [rows, input, projected, hidden, scalar] = s;
  const int64_t gates = (gru ? 3 : 4) * hidden;
  const Array x(rows * input, w), h(rows * projected, w), c(rows * hidden, w), w_ih(gates * input, w),
      w_hh(gates * projected, w), b(gates, w), h_next(rows * hidden, w), c_next(rows * hidden, w),
      saved(rows * 4 * hidden, w), scratch(kRowBlock * (input + projected), 4);
  const auto unless_gru = [&](const Array& array) { return gru ? nullptr : (void*)array; };
  void* const bias = with_bias ? (void*)b : nullptr;
  kernels.forward(
      {s, x, h, unless_gru(c), w_ih, w_hh, bias, bias, h_next, unless_gru(c_next), with_bias ? (void*)saved : nullptr},
      0, step_tasks(s), w == 2 ? (float*)(void*)scratch : nullptr);

  const Array grad_h(rows * hidden, w), grad_c(rows * hidden, w), du(rows * gradient_stride(gates), wide),
      dv(rows * gradient_stride(gates), wide), dx(rows * input, w), dh(rows * projected, w), dc(rows * hidden, w),
      dw_ih(gates * input, w), dw_hh(gates * projected - missing, w), db_ih(gates, w), db_hh(gates, w),
      dh_wide(rows * projected, wide);
  const StepBackward backward{.sizes = s,
                              .grad_h = grad_h,
                              .grad_c = unless_gru(grad_c),
                              .x = x,
                              .h = h,
                              .c = unless_gru(c),
                              .c_next = unless_gru(c_next),
                              .w_ih = w_ih,
                              .w_hh = w_hh,
                              .gates = saved,
                              .du = du,
                              .dv = gru ? (void*)dv : (void*)du,
                              .dx = dx,
                              .dh = dh,
                              .dc = unless_gru(dc),
                              .dw_ih = dw_ih,
                              .dw_hh = dw_hh,
                              .db_ih = db_ih,
                              .db_hh = db_hh,
                              .dh_wide = gru ? (void*)dh_wide : nullptr};
  kernels.sum_gradients(backward, 0, rows);
  kernels.products(backward, 0, kProductParts);
  if (gru) kernels.round_dh(backward, 0, rows);
}

// Forward and backward of a tile of `count` rows of falling length, with resets and in both directions.
static void sequence(const SequenceKernels& kernels, const SequenceShape& s, bool save_gates) {
  const size_t w = width(s.scalar), wide = w < 4 ? 4 : w;
  const int64_t tokens = s.steps * s.rows, gates = gate_rows(s), input = s.projected ? gates : s.input;
  const Array x(tokens * input, w), h(s.rows * s.state, w), c(s.rows * s.hidden, w), w_ih(gates * input, w),
      w_hh(gates * s.state, w), b(gates, w), output(tokens * s.state, w), h_n(s.rows * s.state, w),
      c_n(s.rows * s.hidden, w), cells(tokens * s.hidden, wide), saved(tokens * 4 * s.hidden, w),
      w_hr(s.state * s.hidden, w), gain(gates, w), gain_of_c(s.hidden, w);
  const Array reset(tokens, 1), row(s.rows, 8), length(s.rows, 8);
  for (int64_t i = 0; i < tokens; ++i) reset.data[i] = i % 3 == 0;
  for (int64_t i = 0; i < s.rows; ++i) {
    ((int64_t*)row.data)[i] = s.rows - 1 - i;
    ((int64_t*)length.data)[i] = s.steps - s.steps * i / s.rows;
  }
  const RowTile tile{(int64_t*)row.data, (int64_t*)length.data, s.rows};
  SequenceShape shape = s;
  shape.input = input;
  const SequenceNoise noise{s.recurrent_dropout, 0x123456789abcdef, 8, 0.3, 19661, 26214, 1 / 0.6};
  const SequenceInputs in{shape,     x,
                          nullptr,   h,
                          c,         s.projected ? nullptr : (void*)w_ih,
                          w_hh,      b,
                          b,         (const bool*)reset.data,
                          noise,     s.has_w_hr ? (void*)w_hr : nullptr,
                          gain,      gain,
                          gain_of_c, gain_of_c};
  const Array packed(kernels.packed_bytes(shape), 1), forward(kernels.forward_scratch(shape, s.rows), 1),
      backward(kernels.backward_scratch(shape, s.rows), 1);
  const Array packed_back(kernels.packed_back_bytes(shape), 1);
  kernels.pack(in, packed, 0, kernels.pack_blocks(shape));
  kernels.pack_back(in, packed_back, 0, kernels.pack_back_blocks(shape));
  kernels.forward({in, packed, output, h_n, c_n, cells, save_gates ? (void*)saved : nullptr}, tile, forward);

  const Array dx(tokens * input, w), dh(s.rows * s.state, w), dc(s.rows * s.hidden, w), dw_ih(gates * input, wide),
      dw_hh(gates * s.state, wide), db(4 * s.hidden, wide), dw_hr(s.state * s.hidden, wide), dgain(4 * s.hidden, wide),
      dgain_of_c(s.hidden, wide), total(gates * s.state, w);
  const auto if_has = [](bool has, const Array& array) { return has ? (void*)array : nullptr; };
  kernels.backward(
      {in, packed, packed_back, output, cells, save_gates ? (void*)saved : nullptr, output, h_n, c_n, dx, false, dh, dc}, tile,
      {if_has(!s.projected, dw_ih), dw_hh, db, if_has(s.has_w_hr, dw_hr), if_has(s.has_norm, dgain),
       if_has(s.has_norm, dgain), if_has(s.has_norm && s.kind == CellKind::kLstm, dgain_of_c),
       if_has(s.has_norm && s.kind == CellKind::kLstm, dgain_of_c)},
      backward);
  const void* const parts[] = {dw_hh, dw_hh};
  kernels.add_parts(s.scalar, parts, 2, total, 0, gates * s.state);
}

int main(int arguments, char**) {
  const int64_t shapes[][4] = {{1, 1, 1, 1},     {2, 3, 5, 7},    {3, 0, 4, 4},     {5, 17, 16, 15}, {7, 64, 65, 3},
                               {13, 33, 31, 18}, {50, 8, 19, 33}, {259, 5, 6, 130}, {6, 70, 4, 16},  {1, 130, 129, 20}};
  int calls = 0;
  for (const auto& [rows, input, projected, hidden] : shapes)
    for (const Scalar scalar : {Scalar::kFloat, Scalar::kDouble, Scalar::kBFloat16, Scalar::kHalf})
      for (const bool with_bias : {false, true}) {
        const auto& [lstm, gru] = SEQREC_TIER::recurrent_kernels;
        step(lstm, {rows, input, projected, hidden, scalar}, false, with_bias, arguments - 1);
        step(gru, {rows, input, hidden, hidden, scalar}, true, with_bias, arguments - 1);
        calls += 2;
      }
  const int64_t sequences[][4] = {{1, 1, 1, 1},  {3, 1, 5, 70}, {2, 7, 17, 16},
                                  {4, 9, 3, 33}, {50, 3, 4, 6}, {2, 13, 129, 18}};
  for (const auto& [steps, rows, input, hidden] : sequences)
    for (const Scalar scalar : {Scalar::kFloat, Scalar::kDouble, Scalar::kBFloat16, Scalar::kHalf})
      for (const CellKind kind : {CellKind::kLstm, CellKind::kGru})
        for (const bool flag : {false, true}) {
          const SequenceShape plain{kind, scalar, steps, rows, input, hidden, hidden, flag, !flag, flag && rows > 5};
          SequenceShape noisy = plain, normed = plain, projected = plain;
          noisy.zoneout = noisy.recurrent_dropout = normed.has_norm = true;
          projected.zoneout = projected.recurrent_dropout = projected.has_norm = true;
          projected.has_w_hr = kind == CellKind::kLstm;
          if (projected.has_w_hr) projected.state = (hidden + 2) / 3;
          for (const SequenceShape& shape : {plain, noisy, normed, projected}) {
            sequence(SEQREC_TIER::sequence_kernels, shape, flag);
            ++calls;
          }
        }
  printf("%d\n", calls);
}
