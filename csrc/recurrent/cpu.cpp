// Registration of the recurrent operators for CPU tensors: allocation, threads, choice of the tier. Shapes, dtypes and devices
// were checked in Python.
#include <algorithm>
#include <array>
#include <initializer_list>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "common/check.h"
#include "common/cpu_tier.h"
#include "recurrent/kernels.h"

namespace seqrec_fast {
namespace {

using torch::stable::Tensor;
using torch::headeronly::ScalarType;

const RecurrentKernels& kernels() {
#if defined(__x86_64__)
  switch (cpu_tier()) {
    case CpuTier::kAmx: return tier_amx::recurrent_kernels;
    case CpuTier::kAvx512: return tier_avx512::recurrent_kernels;
    case CpuTier::kAvx2: return tier_avx2::recurrent_kernels;
    case CpuTier::kDefault: break;
  }
#endif
  return tier_default::recurrent_kernels;
}

Scalar scalar_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Scalar::kFloat;
    case ScalarType::Double: return Scalar::kDouble;
    case ScalarType::BFloat16: return Scalar::kBFloat16;
    case ScalarType::Half: return Scalar::kHalf;
    default: break;
  }
  throw std::invalid_argument("the recurrent operators take float16, bfloat16, float32 or float64");
}

// Straight to at::empty_strided: the boxed torch::stable::new_empty costs three times as much, and a step allocates thrice.
Tensor empty(std::initializer_list<int64_t> sizes, const Tensor& like) {
  std::array<int64_t, 2> strides{1, 1};
  if (sizes.size() == 2) strides[0] = std::max<int64_t>(sizes.begin()[1], 1);
  int32_t dtype = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.begin(), strides.data(),
                                                         dtype, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

Tensor in_order(const Tensor& tensor) { return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor); }

// Runs task(begin, end) over [0, tasks), on as many threads as the multiply-adds are worth. A thread costs 2–3 µs to wake; half a
// million multiply-adds take 4 µs from L1 and 11 µs where each weight is read from L2 for one row.
template <class Task>
void in_parallel(int64_t tasks, int64_t multiply_adds, const Task& task) {
  constexpr int64_t kWorthAThread = int64_t{1} << 19;
  const int64_t parts = std::min({multiply_adds / kWorthAThread, tasks, int64_t{torch::stable::get_num_threads()}});
  if (parts <= 1) return task(int64_t{0}, tasks);
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) task(tasks * part / parts, tasks * (part + 1) / parts);
  });
}

int64_t multiply_adds(const StepSizes& sizes) {
  return 4 * sizes.rows * sizes.hidden * (sizes.input + sizes.projected);
}

void run_step(const LstmStep& step) {
  const StepSizes& sizes = step.sizes;
  if (sizes.rows == 0 || sizes.hidden == 0) return;
  const bool half = sizes.scalar == Scalar::kBFloat16 || sizes.scalar == Scalar::kHalf;
  in_parallel(step_tasks(sizes), multiply_adds(sizes), [&](int64_t begin, int64_t end) {
    const auto wide = half ? std::make_unique_for_overwrite<float[]>(kRowBlock * (sizes.input + sizes.projected)) : nullptr;
    kernels().lstm_step(step, begin, end, wide.get());
  });
}

const void* data_or_null(const std::optional<Tensor>& tensor) { return tensor ? tensor->const_data_ptr() : nullptr; }

std::optional<Tensor> in_order(const std::optional<Tensor>& tensor) {
  return tensor ? std::optional<Tensor>(in_order(*tensor)) : std::nullopt;
}

StepSizes sizes_of(const Tensor& x, const Tensor& h, const Tensor& c) {
  return {x.size(0), x.size(1), h.size(1), c.size(1), scalar_of(x)};
}

std::tuple<Tensor, Tensor, Tensor> lstm_step(Tensor x, Tensor h, Tensor c, Tensor w_ih, Tensor w_hh, std::optional<Tensor> b_ih,
                                             std::optional<Tensor> b_hh, bool save_gates, int64_t /*precision*/) {
  x = in_order(x), h = in_order(h), c = in_order(c), w_ih = in_order(w_ih), w_hh = in_order(w_hh);
  b_ih = in_order(b_ih), b_hh = in_order(b_hh);
  const StepSizes sizes = sizes_of(x, h, c);
  Tensor h_next = empty({sizes.rows, sizes.hidden}, x), c_next = empty({sizes.rows, sizes.hidden}, x);
  Tensor gates = save_gates ? empty({sizes.rows, 4 * sizes.hidden}, x) : empty({0}, x);
  run_step({sizes, x.const_data_ptr(), h.const_data_ptr(), c.const_data_ptr(), w_ih.const_data_ptr(), w_hh.const_data_ptr(),
            data_or_null(b_ih), data_or_null(b_hh), h_next.mutable_data_ptr(), c_next.mutable_data_ptr(),
            save_gates ? gates.mutable_data_ptr() : nullptr});
  return {h_next, c_next, gates};
}

// Overwrites h and c.
void lstm_step_(Tensor x, Tensor h, Tensor c, Tensor w_ih, Tensor w_hh, std::optional<Tensor> b_ih, std::optional<Tensor> b_hh,
                int64_t /*precision*/) {
  x = in_order(x), w_ih = in_order(w_ih), w_hh = in_order(w_hh);
  b_ih = in_order(b_ih), b_hh = in_order(b_hh);
  const StepSizes sizes = sizes_of(x, h, c);
  check_value(sizes.projected == sizes.hidden, "lstm_step_: h and c must have one width, got ", sizes.projected, " and ",
              sizes.hidden);
  // Every unit reads all of the former h, so the new one goes to its own array first. c is read and written unit by unit.
  const Tensor former_h = in_order(h);
  Tensor h_next = empty({sizes.rows, sizes.hidden}, x);
  Tensor c_next = in_order(c);
  run_step({sizes, x.const_data_ptr(), former_h.const_data_ptr(), c_next.const_data_ptr(), w_ih.const_data_ptr(),
            w_hh.const_data_ptr(), data_or_null(b_ih), data_or_null(b_hh), h_next.mutable_data_ptr(),
            c_next.mutable_data_ptr(), nullptr});
  torch::stable::copy_(h, h_next);
  if (!c.is_contiguous()) torch::stable::copy_(c, c_next);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lstm_step_backward(
    Tensor grad_h, Tensor grad_c, Tensor x, Tensor h, Tensor c, Tensor c_next, Tensor w_ih, Tensor w_hh, Tensor gates,
    std::vector<bool> output_mask, int64_t /*precision*/) {
  grad_h = in_order(grad_h), grad_c = in_order(grad_c), x = in_order(x), h = in_order(h), c = in_order(c);
  c_next = in_order(c_next), w_ih = in_order(w_ih), w_hh = in_order(w_hh), gates = in_order(gates);
  const StepSizes sizes = sizes_of(x, h, c);
  const auto [rows, input, projected, hidden, scalar] = sizes;
  const auto result = [&](int index, std::initializer_list<int64_t> shape) {
    return output_mask[index] ? empty(shape, x) : empty({0}, x);
  };
  const std::array<Tensor, 6> results = {result(0, {rows, input}),          result(1, {rows, projected}),
                                         result(2, {rows, hidden}),         result(3, {4 * hidden, input}),
                                         result(4, {4 * hidden, projected}), result(5, {4 * hidden})};
  std::array<void*, 6> out{};
  int64_t products = 0;
  for (int i = 0; i < 6; ++i) {
    if (output_mask[i]) out[i] = results[i].mutable_data_ptr();
    if (output_mask[i] && i != 2 && i != 5) products += 4 * rows * hidden * (i % 3 == 0 ? input : projected);
  }
  const size_t width = scalar == Scalar::kDouble ? sizeof(double) : sizeof(float);
  const auto dz = std::make_unique_for_overwrite<char[]>(rows * 4 * hidden * width);
  const LstmStepBackward step{sizes, grad_h.const_data_ptr(), grad_c.const_data_ptr(), x.const_data_ptr(), h.const_data_ptr(),
                              c.const_data_ptr(), c_next.const_data_ptr(), w_ih.const_data_ptr(), w_hh.const_data_ptr(),
                              gates.const_data_ptr(), dz.get(), out[0], out[1], out[2], out[3], out[4], out[5]};
  // A unit's gradients take the time of some 100 multiply-adds.
  in_parallel(rows, rows * hidden * 100, [&](int64_t begin, int64_t end) { kernels().lstm_step_gate_gradients(step, begin, end); });
  in_parallel(kProductParts, products, [&](int64_t begin, int64_t end) { kernels().lstm_step_products(step, begin, end); });
  return {results[0], results[1], results[2], results[3], results[4], results[5]};
}

}  // namespace
}  // namespace seqrec_fast

STABLE_TORCH_LIBRARY_IMPL(seqrec_fast_native, CPU, m) {
  m.impl("lstm_step", TORCH_BOX(&seqrec_fast::lstm_step));
  m.impl("lstm_step_", TORCH_BOX(&seqrec_fast::lstm_step_));
  m.impl("lstm_step_backward", TORCH_BOX(&seqrec_fast::lstm_step_backward));
}
