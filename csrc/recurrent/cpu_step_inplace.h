// The form of a step that overwrites its states: what it may write over, and the copies it needs.
#pragma once

#include <cstring>

#include "recurrent/cpu_step.h"

namespace seqrec_fast {

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
inline bool covers_itself(const Tensor& t) {
  if (t.numel() <= 1) return false;
  const int inner = t.size(1) > 1 && (t.size(0) == 1 || t.stride(1) <= t.stride(0)) ? 1 : 0, outer = 1 - inner;
  return (t.size(inner) > 1 && t.stride(inner) == 0) ||
         (t.size(outer) > 1 && t.stride(outer) < (t.size(inner) - 1) * t.stride(inner) + 1);
}

// Two column ranges of one larger matrix, which lie between each other's rows and still have no element in common.
inline bool are_columns_apart(const Tensor& a, const Tensor& b) {
  const int64_t stride = a.stride(0), columns = a.size(1);
  if (a.stride(1) != 1 || b.stride(1) != 1 || b.stride(0) != stride || stride < 2 * columns) return false;
  const int64_t bytes = width(scalar_of(a));
  const int64_t distance = ((const char*)b.const_data_ptr() - (const char*)a.const_data_ptr()) / bytes;
  const int64_t between = (distance % stride + stride) % stride;
  return between >= columns && between + columns <= stride;
}

// What is written must be nowhere else among the arguments but in x, of which the step keeps a copy.
inline void check_places(const StepArguments& a, const StepBiases& biases) {
  const char* const name = a.cell.name;
  const char* const states = a.c ? "h and c" : "h";
  for (const Tensor* state : {&a.h, a.c})
    check_value(!state || !covers_itself(*state), name, ": inplace cannot write ", state == &a.h ? "h" : "c",
                ", whose elements share memory (an expanded tensor)");
  const Extent h(a.h), c(a.c ? *a.c : a.h);
  check_value(!a.c || !h.meets(c) || are_columns_apart(a.h, *a.c), name, ": inplace needs ", states,
              " in memory of their own");
  const auto check_apart = [&](const Tensor& read) {
    const Extent extent(read);
    check_value(!extent.meets(h) && !extent.meets(c), name, ": inplace needs ", states,
                " apart from the weights and biases");
  };
  check_apart(a.w_ih);
  check_apart(a.w_hh);
  for (const std::optional<Tensor>* bias : {&biases.b_ih, &biases.b_hh})
    if (*bias) check_apart(**bias);
}

// A state to be overwritten: itself, or a contiguous copy that is written back.
class WrittenState {
 public:
  explicit WrittenState(const Tensor& state)
      : state_(state), contiguous_(state.is_contiguous() ? state : torch::stable::contiguous(state)) {}
  void* data() const { return contiguous_.mutable_data_ptr(); }
  void write_back() const {
    if (!state_.is_contiguous()) torch::stable::copy_(const_cast<Tensor&>(state_), contiguous_);
  }

 private:
  const Tensor& state_;
  Tensor contiguous_;
};

// Every unit reads all of the former h (and of x, which may share its memory), so those are copied first; c is read and
// written unit by unit.
inline void step_inplace(const StepArguments& a, const StepBiases& biases) {
  const StepSizes sizes = check_sizes(a);
  check_biases(a, biases, sizes.hidden);
  check_value(sizes.projected == sizes.hidden, a.cell.name, ": inplace needs h and c of one width, got ",
              sizes.projected, " and ", sizes.hidden);
  check_places(a, biases);
  const WrittenState h(a.h);
  std::optional<WrittenState> c;
  if (a.c) c.emplace(*a.c);
  const size_t x_bytes = sizes.rows * sizes.input * width(sizes.scalar),
               h_bytes = sizes.rows * sizes.hidden * width(sizes.scalar);
  const auto former = std::make_unique_for_overwrite<char[]>(x_bytes + h_bytes);
  if (x_bytes != 0) std::memcpy(former.get(), Array(a.x), x_bytes);
  if (h_bytes != 0) std::memcpy(former.get() + x_bytes, h.data(), h_bytes);
  void* const c_data = c ? c->data() : nullptr;
  run_forward(a.cell, {sizes, former.get(), former.get() + x_bytes, c_data, Array(a.w_ih), Array(a.w_hh),
                       Array(biases.b_ih), Array(biases.b_hh), h.data(), c_data, nullptr});
  h.write_back();
  if (c) c->write_back();
}

}  // namespace seqrec_fast
