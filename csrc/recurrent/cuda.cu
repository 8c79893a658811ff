// Registration of the recurrent operators for CUDA tensors: checks, allocation, launches. Nothing here waits for the
// GPU.
#include <array>
#include <cstdint>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "common/check.h"
#include "common/launch.h"
#include "recurrent/choose.cuh"

namespace seqrec_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Calls body(a value of the element type) for the dtypes that have kernels.
template <class Body>
void for_element_type(ScalarType type, const Body& body) {
  switch (type) {
    case ScalarType::Float:
      return body(float{});
    case ScalarType::Half:
      return body(f16{});
    case ScalarType::BFloat16:
      return body(bf16{});
    default:
      break;
  }
  throw std::invalid_argument("the native CUDA recurrent operators take float16, bfloat16 or float32");
}

// An argument as the kernels want it: contiguous, its start 16-byte aligned. Itself where it is so already, else a
// copy.
class Array {
 public:
  explicit Array(const Tensor& tensor) : tensor_(torch::stable::contiguous(tensor)) {
    if (reinterpret_cast<uintptr_t>(tensor_.const_data_ptr()) % 16 != 0) tensor_ = torch::stable::clone(tensor_);
  }

  template <class T>
  const T* read() const {
    return static_cast<const T*>(tensor_.const_data_ptr());
  }
  template <class T>
  T* write() const {
    return static_cast<T*>(tensor_.mutable_data_ptr());
  }
  const Tensor& tensor() const { return tensor_; }
  bool is_copy_of(const Tensor& tensor) const { return tensor_.const_data_ptr() != tensor.const_data_ptr(); }

 private:
  Tensor tensor_;
};

std::optional<Array> optional_array(const std::optional<Tensor>& tensor) {
  return tensor ? std::optional<Array>(Array(*tensor)) : std::nullopt;
}

struct StepSizes {
  int64_t batch, input, projected, hidden;  // B, I, P, H
};

void check_like(const char* name, const Tensor& tensor, const Tensor& x, int64_t rows, int64_t columns) {
  check_value(tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == columns, "lstm_step: ", name,
              " must have shape [", rows, ", ", columns, "]");
  check_value(tensor.scalar_type() == x.scalar_type(), "lstm_step: ", name, " must have the dtype of x");
  check_value(tensor.is_cuda() && tensor.get_device_index() == x.get_device_index(), "lstm_step: ", name,
              " must be on the device of x");
}

void check_bias(const char* name, const std::optional<Tensor>& bias, const Tensor& x, int64_t hidden) {
  check_value(!bias || (bias->dim() == 1 && bias->size(0) == 4 * hidden && bias->scalar_type() == x.scalar_type() &&
                        bias->is_cuda() && bias->get_device_index() == x.get_device_index()),
              "lstm_step: ", name, " must have shape [", 4 * hidden, "] and the dtype and device of x");
}

// The public function explains a wrong argument better; this keeps a direct call of the operator within its arrays.
StepSizes check_sizes(const Tensor& x, const Tensor& h, const Tensor& c, const Tensor& w_ih, const Tensor& w_hh) {
  check_value(x.dim() == 2 && h.dim() == 2 && c.dim() == 2, "lstm_step: x, h and c must be matrices");
  const StepSizes sizes{x.size(0), x.size(1), h.size(1), c.size(1)};
  check_like("h", h, x, sizes.batch, sizes.projected);
  check_like("c", c, x, sizes.batch, sizes.hidden);
  check_like("w_ih", w_ih, x, 4 * sizes.hidden, sizes.input);
  check_like("w_hh", w_hh, x, 4 * sizes.hidden, sizes.projected);
  const int64_t most_units = kMostBlocksY * SmallTile::kUnits;
  check_value(sizes.hidden <= most_units, "lstm_step: the CUDA kernel takes at most ", most_units,
              " hidden units, got ", sizes.hidden);
  return sizes;
}

// How fp32 is multiplied in the tiled form. precision: 0 highest, 1 high, 2 medium. Medium would allow bf16, but tf32
// costs the same bytes and is four times as accurate.
template <class T>
struct ProductOf;
template <>
struct ProductOf<bf16> {
  using Highest = Bf16Product;
  using Lower = Bf16Product;
};
template <>
struct ProductOf<f16> {
  using Highest = F16Product;
  using Lower = F16Product;
};
template <>
struct ProductOf<float> {
  using Highest = F32Product;
  using Lower = Tf32Product;
};

template <class T>
void run_step(const LstmStepArguments<T>& arguments, int64_t precision, int device) {
  if (arguments.batch == 0 || arguments.hidden == 0) return;
  const GpuLaunch launch(device);
  if (precision == 0)
    launch_lstm_step<typename ProductOf<T>::Highest>(arguments, launch);
  else
    launch_lstm_step<typename ProductOf<T>::Lower>(arguments, launch);
}

struct StepWeights {
  Array w_ih, w_hh;
  std::optional<Array> b_ih, b_hh;
};

template <class T>
LstmStepArguments<T> arguments_of(const StepSizes& sizes, const Array& x, const Array& h, const Array& c,
                                  const StepWeights& weights) {
  const auto optional = [](const std::optional<Array>& array) { return array ? array->read<T>() : nullptr; };
  return {sizes.batch,
          sizes.input,
          sizes.projected,
          sizes.hidden,
          x.read<T>(),
          h.read<T>(),
          c.read<T>(),
          weights.w_ih.read<T>(),
          weights.w_hh.read<T>(),
          optional(weights.b_ih),
          optional(weights.b_hh),
          nullptr,
          nullptr,
          nullptr};
}

std::tuple<Tensor, Tensor, Tensor> lstm_step(const Tensor& x, const Tensor& h, const Tensor& c, const Tensor& w_ih,
                                             const Tensor& w_hh, const std::optional<Tensor>& b_ih,
                                             const std::optional<Tensor>& b_hh, bool save_gates, int64_t precision) {
  const StepSizes sizes = check_sizes(x, h, c, w_ih, w_hh);
  check_bias("b_ih", b_ih, x, sizes.hidden);
  check_bias("b_hh", b_hh, x, sizes.hidden);
  const int device = x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  Tensor h_next = torch::stable::new_empty(x, {sizes.batch, sizes.hidden});
  Tensor c_next = torch::stable::new_empty(x, {sizes.batch, sizes.hidden});
  Tensor gates =
      save_gates ? torch::stable::new_empty(x, {sizes.batch, 4 * sizes.hidden}) : torch::stable::new_empty(x, {0});
  const Array x_array(x), h_array(h), c_array(c);
  const StepWeights weights{Array(w_ih), Array(w_hh), optional_array(b_ih), optional_array(b_hh)};
  for_element_type(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    auto arguments = arguments_of<T>(sizes, x_array, h_array, c_array, weights);
    arguments.h_next = static_cast<T*>(h_next.mutable_data_ptr());
    arguments.c_next = static_cast<T*>(c_next.mutable_data_ptr());
    arguments.gates = save_gates ? static_cast<T*>(gates.mutable_data_ptr()) : nullptr;
    run_step(arguments, precision, device);
  });
  return {std::move(h_next), std::move(c_next), std::move(gates)};
}

bool overlap(const Tensor& a, const Tensor& b) {
  const auto *start_a = static_cast<const char*>(a.const_data_ptr()),
             *start_b = static_cast<const char*>(b.const_data_ptr());
  return start_a < start_b + b.numel() * b.element_size() && start_b < start_a + a.numel() * a.element_size();
}

// The serving form: h and c are overwritten. Every block reads whole rows of the former h, so the kernel reads a copy
// of it (B·P elements beside 4·H·(I + P) weights; x too where it shares h's memory). c is read and written by the same
// thread.
void lstm_step_(const Tensor& x, const Tensor& h, const Tensor& c, const Tensor& w_ih, const Tensor& w_hh,
                const std::optional<Tensor>& b_ih, const std::optional<Tensor>& b_hh, int64_t precision) {
  const StepSizes sizes = check_sizes(x, h, c, w_ih, w_hh);
  check_bias("b_ih", b_ih, x, sizes.hidden);
  check_bias("b_hh", b_hh, x, sizes.hidden);
  check_value(sizes.projected == sizes.hidden, "lstm_step_: h and c must have one width, got ", sizes.projected,
              " and ", sizes.hidden);
  const int device = x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Array h_next(h), c_next(c);  // h and c themselves, unless those are strided or not aligned
  const Array h_former(torch::stable::clone(h_next.tensor()));
  const Array x_given(x);
  const Array x_array =
      overlap(x_given.tensor(), h_next.tensor()) ? Array(torch::stable::clone(x_given.tensor())) : x_given;
  const StepWeights weights{Array(w_ih), Array(w_hh), optional_array(b_ih), optional_array(b_hh)};
  for_element_type(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    auto arguments = arguments_of<T>(sizes, x_array, h_former, c_next, weights);
    arguments.h_next = h_next.write<T>();
    arguments.c_next = c_next.write<T>();
    run_step(arguments, precision, device);
  });
  if (h_next.is_copy_of(h)) torch::stable::copy_(const_cast<Tensor&>(h), h_next.tensor());
  if (c_next.is_copy_of(c)) torch::stable::copy_(const_cast<Tensor&>(c), c_next.tensor());
}

// One kernel for the gates, the vendor's products for the rest: they are plain GEMMs with nothing to fuse.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lstm_step_backward(
    const Tensor& grad_h, const Tensor& grad_c, const Tensor& x, const Tensor& h, const Tensor& c, const Tensor& c_next,
    const Tensor& w_ih, const Tensor& w_hh, const Tensor& gates, const std::vector<bool>& output_mask,
    int64_t /*precision*/) {
  const StepSizes sizes = check_sizes(x, h, c, w_ih, w_hh);
  check_like("grad_h", grad_h, x, sizes.batch, sizes.hidden);
  check_like("grad_c", grad_c, x, sizes.batch, sizes.hidden);
  check_like("c_next", c_next, x, sizes.batch, sizes.hidden);
  check_like("gates", gates, x, sizes.batch, 4 * sizes.hidden);
  check_value(output_mask.size() == 6, "lstm_step_backward: output_mask must have 6 entries, got ", output_mask.size());
  const int device = x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  Tensor dz = torch::stable::new_empty(x, {sizes.batch, 4 * sizes.hidden});
  Tensor dc = torch::stable::new_empty(x, {sizes.batch, sizes.hidden});
  if (sizes.batch > 0 && sizes.hidden > 0) {
    const Array grad_h_array(grad_h), grad_c_array(grad_c), c_array(c), c_next_array(c_next), gates_array(gates);
    for_element_type(x.scalar_type(), [&](auto element) {
      using T = decltype(element);
      const LstmStepBackwardArguments<T> arguments{sizes.batch,
                                                   sizes.hidden,
                                                   grad_h_array.read<T>(),
                                                   grad_c_array.read<T>(),
                                                   c_array.read<T>(),
                                                   c_next_array.read<T>(),
                                                   gates_array.read<T>(),
                                                   static_cast<T*>(dz.mutable_data_ptr()),
                                                   static_cast<T*>(dc.mutable_data_ptr())};
      launch_lstm_step_gate_gradients(arguments, GpuLaunch(device));
    });
  }
  const auto none = [&] { return torch::stable::new_empty(x, {0}); };
  const Tensor dz_transposed = torch::stable::transpose(dz, 0, 1);
  constexpr std::array<int64_t, 1> kRows{0};
  using torch::stable::matmul;
  return {output_mask[0] ? matmul(dz, w_ih) : none(),
          output_mask[1] ? matmul(dz, w_hh) : none(),
          output_mask[2] ? std::move(dc) : none(),
          output_mask[3] ? matmul(dz_transposed, x) : none(),
          output_mask[4] ? matmul(dz_transposed, h) : none(),
          output_mask[5] ? torch::stable::sum(dz, torch::headeronly::IntHeaderOnlyArrayRef(kRows.data(), 1)) : none()};
}

}  // namespace
}  // namespace seqrec_fast

STABLE_TORCH_LIBRARY_IMPL(seqrec_fast_native, CUDA, m) {
  m.impl("lstm_step", TORCH_BOX(&seqrec_fast::lstm_step));
  m.impl("lstm_step_", TORCH_BOX(&seqrec_fast::lstm_step_));
  m.impl("lstm_step_backward", TORCH_BOX(&seqrec_fast::lstm_step_backward));
}
