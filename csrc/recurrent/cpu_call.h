// What the registrations of the recurrent operators for CPU tensors share: types, arrays, threads.
#pragma once

#include <algorithm>
#include <array>
#include <initializer_list>
#include <optional>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "common/check.h"
#include "recurrent/kernels.h"

namespace seqrec_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Scalar scalar_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Scalar::kFloat;
    case ScalarType::Double:
      return Scalar::kDouble;
    case ScalarType::BFloat16:
      return Scalar::kBFloat16;
    case ScalarType::Half:
      return Scalar::kHalf;
    default:
      break;
  }
  throw std::invalid_argument("the recurrent operators take float16, bfloat16, float32 or float64");
}

// Straight to at::empty_strided: the boxed torch::stable::new_empty costs three times as much, and a step allocates
// thrice.
inline Tensor empty(std::initializer_list<int64_t> sizes, int32_t dtype) {
  std::array<int64_t, 3> strides{1, 1, 1};
  for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * std::max<int64_t>(sizes.begin()[i], 1);
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.begin(),
                                                         strides.data(), dtype, aoti_torch_device_type_cpu(), 0,
                                                         &handle));
  return Tensor(handle);
}
inline Tensor empty(std::initializer_list<int64_t> sizes, const Tensor& like) {
  int32_t dtype = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  return empty(sizes, dtype);
}

// An argument as a contiguous array: itself, or a copy that lives as long as this.
class Array {
 public:
  explicit Array(const Tensor& tensor) {
    if (!tensor.is_contiguous()) copy_ = torch::stable::contiguous(tensor);
    data_ = check_allocated((copy_ ? *copy_ : tensor).const_data_ptr(), tensor.numel());
  }
  explicit Array(const std::optional<Tensor>& tensor) {
    if (tensor) *this = Array(*tensor);
  }
  operator const void*() const { return data_; }

 private:
  std::optional<Tensor> copy_;
  const void* data_ = nullptr;
};

// Runs task(begin, end) over [0, tasks), on as many threads as the multiply-adds are worth. A thread costs 2–3 µs to
// wake; half a million multiply-adds take 4 µs from L1 and 11 µs where each weight is read from L2 for one row.
template <class Task>
void in_parallel(int64_t tasks, int64_t multiply_adds, const Task& task) {
  constexpr int64_t kWorthAThread = int64_t{1} << 19;
  const int64_t parts = std::min({multiply_adds / kWorthAThread, tasks, int64_t{torch::stable::get_num_threads()}});
  if (parts <= 1) return task(int64_t{0}, tasks);
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) task(tasks * part / parts, tasks * (part + 1) / parts);
  });
}

inline size_t width(Scalar scalar) { return scalar == Scalar::kDouble ? 8 : scalar == Scalar::kFloat ? 4 : 2; }

}  // namespace seqrec_fast
