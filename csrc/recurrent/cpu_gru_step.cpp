// Registration of gru_step for CPU tensors.
#include <tuple>
#include <utility>
#include <vector>

#include "recurrent/cpu_step.h"
#include "recurrent/cpu_step_inplace.h"

namespace seqrec_fast {
namespace {

constexpr StepCell kCell{"gru_step", 3, false, &RecurrentKernels::gru};

std::tuple<Tensor, Tensor> gru_step(const Tensor& x, const Tensor& h, const Tensor& w_ih, const Tensor& w_hh,
                                    const std::optional<Tensor>& b_ih, const std::optional<Tensor>& b_hh,
                                    bool save_gates, int64_t /*precision*/) {
  const StepArguments arguments{kCell, x, h, nullptr, w_ih, w_hh};
  const StepSizes sizes = check_sizes(arguments);
  check_biases(arguments, {b_ih, b_hh}, sizes.hidden);
  Tensor h_next = empty({sizes.rows, sizes.hidden}, x);
  StepResult gates(save_gates, {sizes.rows, 4 * sizes.hidden}, x);
  run_forward(kCell, {sizes, Array(x), Array(h), nullptr, Array(w_ih), Array(w_hh), Array(b_ih), Array(b_hh),
                      h_next.mutable_data_ptr(), nullptr, gates.data});
  return {std::move(h_next), std::move(gates.tensor)};
}

void gru_step_(const Tensor& x, const Tensor& h, const Tensor& w_ih, const Tensor& w_hh,
               const std::optional<Tensor>& b_ih, const std::optional<Tensor>& b_hh, int64_t /*precision*/) {
  step_inplace({kCell, x, h, nullptr, w_ih, w_hh}, {b_ih, b_hh});
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gru_step_backward(const Tensor& grad_h, const Tensor& x,
                                                                             const Tensor& h, const Tensor& w_ih,
                                                                             const Tensor& w_hh, const Tensor& gates,
                                                                             const std::vector<bool>& output_mask,
                                                                             int64_t /*precision*/) {
  const StepArguments arguments{kCell, x, h, nullptr, w_ih, w_hh};
  const StepSizes sizes = check_sizes(arguments);
  const auto [rows, input, projected, hidden, scalar] = sizes;
  check_matrix(arguments, "grad_h", grad_h, rows, hidden);
  check_matrix(arguments, "gates", gates, rows, 4 * hidden);
  check_mask(kCell, output_mask);

  StepResult dx(output_mask[0], {rows, input}, x), dh(output_mask[1], {rows, hidden}, x),
      dw_ih(output_mask[2], {3 * hidden, input}, x), dw_hh(output_mask[3], {3 * hidden, hidden}, x),
      db_ih(output_mask[4], {3 * hidden}, x), db_hh(output_mask[5], {3 * hidden}, x);
  run_backward(kCell, {.sizes = sizes,
                       .grad_h = Array(grad_h),
                       .x = Array(x),
                       .h = Array(h),
                       .w_ih = Array(w_ih),
                       .w_hh = Array(w_hh),
                       .gates = Array(gates),
                       .dx = dx.data,
                       .dh = dh.data,
                       .dw_ih = dw_ih.data,
                       .dw_hh = dw_hh.data,
                       .db_ih = db_ih.data,
                       .db_hh = db_hh.data});
  return {std::move(dx.tensor),    std::move(dh.tensor),    std::move(dw_ih.tensor),
          std::move(dw_hh.tensor), std::move(db_ih.tensor), std::move(db_hh.tensor)};
}

}  // namespace
}  // namespace seqrec_fast

STABLE_TORCH_LIBRARY_IMPL(seqrec_fast_native, CPU, m) {
  m.impl("gru_step", TORCH_BOX(&seqrec_fast::gru_step));
  m.impl("gru_step_", TORCH_BOX(&seqrec_fast::gru_step_));
  m.impl("gru_step_backward", TORCH_BOX(&seqrec_fast::gru_step_backward));
}
