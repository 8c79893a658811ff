// Registration of the single steps for CPU tensors: allocation, threads, choice of the tier. Shapes, dtypes and
// devices were checked in Python.
#include <algorithm>
#include <array>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "common/check.h"
#include "common/cpu_tier.h"
#include "recurrent/cpu_call.h"
#include "recurrent/kernels.h"

namespace seqrec_fast {
namespace {

const RecurrentKernels& kernels() {
#if defined(__x86_64__)
  switch (cpu_tier()) {
    case CpuTier::kAmx:
      return tier_amx::recurrent_kernels;
    case CpuTier::kAvx512:
      return tier_avx512::recurrent_kernels;
    case CpuTier::kAvx2:
      return tier_avx2::recurrent_kernels;
    case CpuTier::kDefault:
      break;
  }
#endif
  return tier_default::recurrent_kernels;
}

int64_t multiply_adds(const StepSizes& sizes) {
  return 4 * sizes.rows * sizes.hidden * (sizes.input + sizes.projected);
}

void run_step(const LstmStep& step) {
  const StepSizes& sizes = step.sizes;
  if (sizes.rows == 0 || sizes.hidden == 0) return;
  const bool half = sizes.scalar == Scalar::kBFloat16 || sizes.scalar == Scalar::kHalf;
  in_parallel(step_tasks(sizes), multiply_adds(sizes), [&](int64_t begin, int64_t end) {
    const auto wide =
        half ? std::make_unique_for_overwrite<float[]>(kRowBlock * (sizes.input + sizes.projected)) : nullptr;
    kernels().lstm_step(step, begin, end, wide.get());
  });
}

void check_shape(const char* name, const Tensor& tensor, int64_t rows, int64_t columns) {
  check_value(tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == columns, "lstm_step: ", name,
              " must have shape [", rows, ", ", columns, "]");
}

// The public function explains a wrong shape better; this keeps a direct call of the operator within its arrays.
StepSizes check_sizes(const Tensor& x, const Tensor& h, const Tensor& c, const Tensor& w_ih, const Tensor& w_hh) {
  check_value(x.dim() == 2 && h.dim() == 2 && c.dim() == 2, "lstm_step: x, h and c must be matrices");
  const StepSizes sizes{x.size(0), x.size(1), h.size(1), c.size(1), scalar_of(x)};
  check_shape("h", h, sizes.rows, sizes.projected);
  check_shape("c", c, sizes.rows, sizes.hidden);
  check_shape("w_ih", w_ih, 4 * sizes.hidden, sizes.input);
  check_shape("w_hh", w_hh, 4 * sizes.hidden, sizes.projected);
  for (const Tensor* tensor : {&h, &c, &w_ih, &w_hh})
    check_value(tensor->scalar_type() == x.scalar_type(), "lstm_step: all tensors must share one dtype");
  return sizes;
}

void check_bias(const std::optional<Tensor>& bias, const Tensor& x, int64_t hidden) {
  check_value(!bias || (bias->dim() == 1 && bias->size(0) == 4 * hidden && bias->scalar_type() == x.scalar_type()),
              "lstm_step: a bias must have shape [", 4 * hidden, "] and the dtype of x");
}

std::tuple<Tensor, Tensor, Tensor> lstm_step(const Tensor& x, const Tensor& h, const Tensor& c, const Tensor& w_ih,
                                             const Tensor& w_hh, const std::optional<Tensor>& b_ih,
                                             const std::optional<Tensor>& b_hh, bool save_gates,
                                             int64_t /*precision*/) {
  const StepSizes sizes = check_sizes(x, h, c, w_ih, w_hh);
  check_bias(b_ih, x, sizes.hidden);
  check_bias(b_hh, x, sizes.hidden);
  Tensor h_next = empty({sizes.rows, sizes.hidden}, x), c_next = empty({sizes.rows, sizes.hidden}, x);
  Tensor gates = save_gates ? empty({sizes.rows, 4 * sizes.hidden}, x) : empty({0}, x);
  run_step({sizes, Array(x), Array(h), Array(c), Array(w_ih), Array(w_hh), Array(b_ih), Array(b_hh),
            h_next.mutable_data_ptr(), c_next.mutable_data_ptr(), save_gates ? gates.mutable_data_ptr() : nullptr});
  return {std::move(h_next), std::move(c_next), std::move(gates)};
}

// The addresses between which a tensor's elements lie.
struct Extent {
  const char *begin, *end;
  explicit Extent(const Tensor& tensor)
      : begin((const char*)check_allocated(tensor.const_data_ptr(), tensor.numel())), end(begin) {
    if (tensor.numel() == 0) return;
    int64_t last = 1;
    for (int64_t i = 0; i < tensor.dim(); ++i) last += (tensor.size(i) - 1) * tensor.stride(i);
    end += last * width(scalar_of(tensor));
  }
  bool meets(const Extent& other) const { return begin < other.end && other.begin < end; }
};

// Whether two elements of a matrix are one.
bool covers_itself(const Tensor& t) {
  if (t.numel() <= 1) return false;
  const int inner = t.size(1) > 1 && (t.size(0) == 1 || t.stride(1) <= t.stride(0)) ? 1 : 0, outer = 1 - inner;
  return (t.size(inner) > 1 && t.stride(inner) == 0) ||
         (t.size(outer) > 1 && t.stride(outer) < (t.size(inner) - 1) * t.stride(inner) + 1);
}

// Two column ranges of one larger matrix, which lie between each other's rows and still have no element in common.
bool are_columns_apart(const Tensor& a, const Tensor& b) {
  const int64_t stride = a.stride(0), columns = a.size(1);
  if (a.stride(1) != 1 || b.stride(1) != 1 || b.stride(0) != stride || stride < 2 * columns) return false;
  const int64_t bytes = width(scalar_of(a));
  const int64_t distance = ((const char*)b.const_data_ptr() - (const char*)a.const_data_ptr()) / bytes;
  const int64_t between = (distance % stride + stride) % stride;
  return between >= columns && between + columns <= stride;
}

// What is written must be nowhere else among the arguments but in x, of which the step keeps a copy.
void check_places(const Tensor& h, const Tensor& c, std::initializer_list<const Tensor*> read) {
  for (const Tensor* state : {&h, &c})
    check_value(!covers_itself(*state), "lstm_step: inplace cannot write ", state == &h ? "h" : "c",
                ", whose elements share memory (an expanded tensor)");
  const Extent h_extent(h), c_extent(c);
  check_value(!h_extent.meets(c_extent) || are_columns_apart(h, c),
              "lstm_step: inplace needs h and c in memory of their own");
  for (const Tensor* tensor : read) {
    const Extent extent(*tensor);
    check_value(!extent.meets(h_extent) && !extent.meets(c_extent),
                "lstm_step: inplace needs h and c apart from the weights and biases");
  }
}

// Overwrites h and c. Every unit reads all of the former h (and of x, which may share its memory), so those are copied
// first; c is read and written unit by unit.
void lstm_step_(const Tensor& x, const Tensor& h, const Tensor& c, const Tensor& w_ih, const Tensor& w_hh,
                const std::optional<Tensor>& b_ih, const std::optional<Tensor>& b_hh, int64_t /*precision*/) {
  const StepSizes sizes = check_sizes(x, h, c, w_ih, w_hh);
  check_bias(b_ih, x, sizes.hidden);
  check_bias(b_hh, x, sizes.hidden);
  check_value(sizes.projected == sizes.hidden, "lstm_step_: h and c must have one width, got ", sizes.projected,
              " and ", sizes.hidden);
  check_places(h, c, {&w_ih, &w_hh});
  for (const auto& bias : {b_ih, b_hh})
    if (bias) check_places(h, c, {&*bias});
  Tensor h_next = h.is_contiguous() ? h : torch::stable::contiguous(h);
  Tensor c_next = c.is_contiguous() ? c : torch::stable::contiguous(c);
  const size_t x_bytes = sizes.rows * sizes.input * width(sizes.scalar),
               h_bytes = sizes.rows * sizes.hidden * width(sizes.scalar);
  const auto former = std::make_unique_for_overwrite<char[]>(x_bytes + h_bytes);
  if (x_bytes != 0) std::memcpy(former.get(), Array(x), x_bytes);
  if (h_bytes != 0) std::memcpy(former.get() + x_bytes, h_next.const_data_ptr(), h_bytes);
  void* const c_data = c_next.mutable_data_ptr();
  run_step({sizes, former.get(), former.get() + x_bytes, c_data, Array(w_ih), Array(w_hh), Array(b_ih), Array(b_hh),
            h_next.mutable_data_ptr(), c_data, nullptr});
  if (!h.is_contiguous()) torch::stable::copy_(const_cast<Tensor&>(h), h_next);
  if (!c.is_contiguous()) torch::stable::copy_(const_cast<Tensor&>(c), c_next);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lstm_step_backward(
    const Tensor& grad_h, const Tensor& grad_c, const Tensor& x, const Tensor& h, const Tensor& c, const Tensor& c_next,
    const Tensor& w_ih, const Tensor& w_hh, const Tensor& gates, const std::vector<bool>& output_mask,
    int64_t /*precision*/) {
  const StepSizes sizes = check_sizes(x, h, c, w_ih, w_hh);
  const auto [rows, input, projected, hidden, scalar] = sizes;
  check_shape("grad_h", grad_h, rows, hidden);
  check_shape("grad_c", grad_c, rows, hidden);
  check_shape("c_next", c_next, rows, hidden);
  check_shape("gates", gates, rows, 4 * hidden);
  for (const Tensor* tensor : {&grad_h, &grad_c, &c_next, &gates})
    check_value(tensor->scalar_type() == x.scalar_type(), "lstm_step: all tensors must share one dtype");
  check_value(output_mask.size() == 6, "lstm_step_backward: output_mask must have 6 entries, got ", output_mask.size());

  const auto result = [&](int index, std::initializer_list<int64_t> shape) {
    return output_mask[index] ? empty(shape, x) : empty({0}, x);
  };
  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> results{
      result(0, {rows, input}),       result(1, {rows, projected}),       result(2, {rows, hidden}),
      result(3, {4 * hidden, input}), result(4, {4 * hidden, projected}), result(5, {4 * hidden})};
  const auto data = [&](int index, const Tensor& tensor) {
    return output_mask[index] ? tensor.mutable_data_ptr() : nullptr;
  };
  const auto dz =
      std::make_unique_for_overwrite<char[]>(rows * gradient_stride(hidden) * std::max<size_t>(width(scalar), 4));
  const Array grad_h_array(grad_h), grad_c_array(grad_c), x_array(x), h_array(h), c_array(c), c_next_array(c_next),
      w_ih_array(w_ih), w_hh_array(w_hh), gates_array(gates);
  const LstmStepBackward step{sizes,
                              grad_h_array,
                              grad_c_array,
                              x_array,
                              h_array,
                              c_array,
                              c_next_array,
                              w_ih_array,
                              w_hh_array,
                              gates_array,
                              dz.get(),
                              data(0, std::get<0>(results)),
                              data(1, std::get<1>(results)),
                              data(2, std::get<2>(results)),
                              data(3, std::get<3>(results)),
                              data(4, std::get<4>(results)),
                              data(5, std::get<5>(results))};
  const int64_t per_column = 4 * rows * hidden;
  const int64_t products =
      per_column * (input * (output_mask[0] + output_mask[3]) + projected * (output_mask[1] + output_mask[4]));
  // Writing a value of dW takes the time of 20 multiply-adds and more: at one row that is all the work there is.
  const int64_t writes = 20 * 4 * hidden * (input * output_mask[3] + projected * output_mask[4]);
  // A unit's gradients take the time of some 100 multiply-adds.
  in_parallel(rows, rows * hidden * 100,
              [&](int64_t begin, int64_t end) { kernels().lstm_step_gate_gradients(step, begin, end); });
  in_parallel(kProductParts, products + writes,
              [&](int64_t begin, int64_t end) { kernels().lstm_step_products(step, begin, end); });
  return results;
}

}  // namespace
}  // namespace seqrec_fast

STABLE_TORCH_LIBRARY_IMPL(seqrec_fast_native, CPU, m) {
  m.impl("lstm_step", TORCH_BOX(&seqrec_fast::lstm_step));
  m.impl("lstm_step_", TORCH_BOX(&seqrec_fast::lstm_step_));
  m.impl("lstm_step_backward", TORCH_BOX(&seqrec_fast::lstm_step_backward));
}
