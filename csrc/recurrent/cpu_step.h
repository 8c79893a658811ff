// What the registrations of the single steps for CPU tensors share: checks, threads, choice of the tier. Python
// explains a wrong argument better; the checks here keep a direct call of the operator within its arrays.
#pragma once

#include <memory>
#include <vector>

#include "recurrent/cpu_call.h"

namespace seqrec_fast {

struct StepCell {
  const char* name;  // of its operator
  int64_t gates;     // whose rows the weights hold
  bool has_cell_state;
  const StepKernels RecurrentKernels::* kernels;

  const StepKernels& chosen() const { return SEQREC_CHOSEN_TABLE(recurrent_kernels).*kernels; }
};

// The arguments of a step, of every form of it.
struct StepArguments {
  const StepCell& cell;
  const Tensor &x, &h;
  const Tensor* c;  // null for GRU
  const Tensor &w_ih, &w_hh;
};

inline void check_matrix(const StepArguments& a, const char* name, const Tensor& tensor, int64_t rows,
                         int64_t columns) {
  check_value(tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == columns, a.cell.name, ": ", name,
              " must have shape [", rows, ", ", columns, "]");
  check_value(tensor.scalar_type() == a.x.scalar_type(), a.cell.name, ": all tensors must share one dtype");
}

inline StepSizes check_sizes(const StepArguments& a) {
  check_value(a.x.dim() == 2 && a.h.dim() == 2 && (!a.c || a.c->dim() == 2), a.cell.name,
              ": x and the states must be matrices");
  const StepSizes sizes{a.x.size(0), a.x.size(1), a.h.size(1), (a.c ? *a.c : a.h).size(1), scalar_of(a.x)};
  check_matrix(a, "h", a.h, sizes.rows, sizes.projected);
  if (a.c) check_matrix(a, "c", *a.c, sizes.rows, sizes.hidden);
  check_matrix(a, "w_ih", a.w_ih, a.cell.gates * sizes.hidden, sizes.input);
  check_matrix(a, "w_hh", a.w_hh, a.cell.gates * sizes.hidden, sizes.projected);
  return sizes;
}

// Of the forward.
struct StepBiases {
  const std::optional<Tensor>&b_ih, &b_hh;
};

inline void check_biases(const StepArguments& a, const StepBiases& biases, int64_t hidden) {
  const int64_t length = a.cell.gates * hidden;
  for (const std::optional<Tensor>* bias : {&biases.b_ih, &biases.b_hh})
    check_value(
        !*bias || ((*bias)->dim() == 1 && (*bias)->size(0) == length && (*bias)->scalar_type() == a.x.scalar_type()),
        a.cell.name, ": a bias must have shape [", length, "] and the dtype of x");
}

inline bool is_half(Scalar scalar) { return scalar == Scalar::kBFloat16 || scalar == Scalar::kHalf; }

inline int64_t multiply_adds(const StepCell& cell, const StepSizes& s) {
  return cell.gates * s.rows * s.hidden * (s.input + s.projected);
}

inline void run_forward(const StepCell& cell, const StepForward& step) {
  const StepSizes& sizes = step.sizes;
  if (sizes.rows == 0 || sizes.hidden == 0) return;
  const StepKernels& kernels = cell.chosen();
  in_parallel(step_tasks(sizes), multiply_adds(cell, sizes), [&](int64_t begin, int64_t end) {
    const auto wide = is_half(sizes.scalar)
                          ? std::make_unique_for_overwrite<float[]>(kRowBlock * (sizes.input + sizes.projected))
                          : nullptr;
    kernels.forward(step, begin, end, wide.get());
  });
}

// A result of the backward: null, and [0] to return, where it is not asked for.
struct StepResult {
  Tensor tensor;
  void* data;

  StepResult(bool wanted, std::initializer_list<int64_t> shape, const Tensor& like)
      : tensor(wanted ? empty(shape, like) : empty({0}, like)), data(wanted ? tensor.mutable_data_ptr() : nullptr) {}
};

inline void check_mask(const StepCell& cell, const std::vector<bool>& mask) {
  check_value(mask.size() == 6, cell.name, "_backward: output_mask must have 6 entries, got ", mask.size());
}

// Runs the kernels on `step`, whose scratch is filled in here.
inline void run_backward(const StepCell& cell, StepBackward step) {
  const auto [rows, input, projected, hidden, scalar] = step.sizes;
  const StepKernels& kernels = cell.chosen();
  const bool gru = !cell.has_cell_state;
  const int64_t gates = cell.gates * hidden;
  const size_t wide = std::max<size_t>(width(scalar), 4), gradients = rows * gradient_stride(gates) * wide;
  const auto scratch = std::make_unique_for_overwrite<char[]>(gradients * (gru ? 2 : 1));
  step.du = scratch.get();
  step.dv = scratch.get() + (gru ? gradients : 0);
  const bool rounds = gru && step.dh && is_half(scalar);
  const auto dh_wide = rounds ? std::make_unique_for_overwrite<char[]>(rows * hidden * wide) : nullptr;
  step.dh_wide = rounds ? dh_wide.get() : step.dh;

  const int64_t of_input = (step.dx != nullptr) + (step.dw_ih != nullptr),
                of_hidden = (step.dh != nullptr) + (step.dw_hh != nullptr);
  const int64_t products = gates * rows * (input * of_input + projected * of_hidden);
  // Writing a value of dW takes the time of 20 multiply-adds and more: at one row that is all the work there is.
  const int64_t writes = 20 * gates * (input * (step.dw_ih != nullptr) + projected * (step.dw_hh != nullptr));
  // A unit's gradients take the time of some 100 multiply-adds.
  in_parallel(rows, rows * hidden * 100, [&](int64_t begin, int64_t end) { kernels.sum_gradients(step, begin, end); });
  in_parallel(kProductParts, products + writes,
              [&](int64_t begin, int64_t end) { kernels.products(step, begin, end); });
  if (rounds) in_parallel(rows, rows * hidden, [&](int64_t begin, int64_t end) { kernels.round_dh(step, begin, end); });
}

}  // namespace seqrec_fast
