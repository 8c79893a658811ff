// Registration of lstm_step for CPU tensors.
#include <tuple>
#include <utility>
#include <vector>

#include "recurrent/cpu_step.h"
#include "recurrent/cpu_step_inplace.h"

namespace seqrec_fast {
namespace {

constexpr StepCell kCell{"lstm_step", 4, true, &RecurrentKernels::lstm};

std::tuple<Tensor, Tensor, Tensor> lstm_step(const Tensor& x, const Tensor& h, const Tensor& c, const Tensor& w_ih,
                                             const Tensor& w_hh, const std::optional<Tensor>& b_ih,
                                             const std::optional<Tensor>& b_hh, bool save_gates,
                                             int64_t /*precision*/) {
  const StepArguments arguments{kCell, x, h, &c, w_ih, w_hh};
  const StepSizes sizes = check_sizes(arguments);
  check_biases(arguments, {b_ih, b_hh}, sizes.hidden);
  Tensor h_next = empty({sizes.rows, sizes.hidden}, x), c_next = empty({sizes.rows, sizes.hidden}, x);
  StepResult gates(save_gates, {sizes.rows, 4 * sizes.hidden}, x);
  run_forward(kCell, {sizes, Array(x), Array(h), Array(c), Array(w_ih), Array(w_hh), Array(b_ih), Array(b_hh),
                      h_next.mutable_data_ptr(), c_next.mutable_data_ptr(), gates.data});
  return {std::move(h_next), std::move(c_next), std::move(gates.tensor)};
}

void lstm_step_(const Tensor& x, const Tensor& h, const Tensor& c, const Tensor& w_ih, const Tensor& w_hh,
                const std::optional<Tensor>& b_ih, const std::optional<Tensor>& b_hh, int64_t /*precision*/) {
  step_inplace({kCell, x, h, &c, w_ih, w_hh}, {b_ih, b_hh});
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lstm_step_backward(
    const Tensor& grad_h, const Tensor& grad_c, const Tensor& x, const Tensor& h, const Tensor& c, const Tensor& c_next,
    const Tensor& w_ih, const Tensor& w_hh, const Tensor& gates, const std::vector<bool>& output_mask,
    int64_t /*precision*/) {
  const StepArguments arguments{kCell, x, h, &c, w_ih, w_hh};
  const StepSizes sizes = check_sizes(arguments);
  const auto [rows, input, projected, hidden, scalar] = sizes;
  check_matrix(arguments, "grad_h", grad_h, rows, hidden);
  check_matrix(arguments, "grad_c", grad_c, rows, hidden);
  check_matrix(arguments, "c_next", c_next, rows, hidden);
  check_matrix(arguments, "gates", gates, rows, 4 * hidden);
  check_mask(kCell, output_mask);

  StepResult dx(output_mask[0], {rows, input}, x), dh(output_mask[1], {rows, projected}, x),
      dc(output_mask[2], {rows, hidden}, x), dw_ih(output_mask[3], {4 * hidden, input}, x),
      dw_hh(output_mask[4], {4 * hidden, projected}, x), db(output_mask[5], {4 * hidden}, x);
  run_backward(kCell, {.sizes = sizes,
                       .grad_h = Array(grad_h),
                       .grad_c = Array(grad_c),
                       .x = Array(x),
                       .h = Array(h),
                       .c = Array(c),
                       .c_next = Array(c_next),
                       .w_ih = Array(w_ih),
                       .w_hh = Array(w_hh),
                       .gates = Array(gates),
                       .dx = dx.data,
                       .dh = dh.data,
                       .dc = dc.data,
                       .dw_ih = dw_ih.data,
                       .dw_hh = dw_hh.data,
                       .db_ih = db.data});  // one for both
  return {std::move(dx.tensor),    std::move(dh.tensor),    std::move(dc.tensor),
          std::move(dw_ih.tensor), std::move(dw_hh.tensor), std::move(db.tensor)};
}

}  // namespace
}  // namespace seqrec_fast

STABLE_TORCH_LIBRARY_IMPL(seqrec_fast_native, CPU, m) {
  m.impl("lstm_step", TORCH_BOX(&seqrec_fast::lstm_step));
  m.impl("lstm_step_", TORCH_BOX(&seqrec_fast::lstm_step_));
  m.impl("lstm_step_backward", TORCH_BOX(&seqrec_fast::lstm_step_backward));
}
