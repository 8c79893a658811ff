// For tests/backends/test_sanitized.py: the softmax kernels of one CPU tier on arrays of exactly their size, to
// be built with AddressSanitizer and UndefinedBehaviorSanitizer. Prints the number of calls. With any argument one
// array is a value short, which must be noticed.
#include <stdio.h>
#include <stdlib.h>

#include <vector>

#include "catalogue/softmax_call.h"

using namespace seqrec_fast;

// A heap array of small values (0x3c… is about 0.01 in every format), so that a read or write past it is seen.
template <class T>
struct Array {
  explicit Array(int64_t count) : data((T*)malloc(count * sizeof(T))) {
    auto* bytes = (unsigned char*)data;
    for (size_t i = 0; i < count * sizeof(T); ++i)
      bytes[i] = (unsigned char)(i % sizeof(T) == sizeof(T) - 1 ? 0x3c : i * 37);
  }
  Array(const Array&) = delete;
  ~Array() { free(data); }
  operator T*() const { return data; }
  T* data;
};

struct Sizes {
  int64_t rows, items, width, value_width;
  bool own_values, lists;
};

// One list of three ascending ids a row, as many as there are items.
struct Lists {
  std::vector<int64_t> ids, begin{0}, slot;
  Lists(int64_t rows, int64_t items) {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t j = 0; j < 3; ++j) {
        const int64_t id = (r % 5) + j * (items / 3);
        if (id < items && (ids.size() == (size_t)begin.back() || ids.back() < id))
          slot.push_back(ids.size()), ids.push_back(id);
      }
      begin.push_back(ids.size());
    }
  }
};

template <class T>
static int run(const SoftmaxKernels& kernel, Format format, const Sizes& s, int missing) {
  const Array<T> query(s.rows * s.width), items(s.items * s.width - missing), values(s.items * s.value_width),
      bias(s.items), row_scale(s.rows);
  const Lists excluded(s.rows, s.items), kept(s.rows, s.items);
  const std::vector<int64_t> skipped = s.items > 2 ? std::vector<int64_t>{1, s.items - 1} : std::vector<int64_t>{};
  SoftmaxCall call;
  call.format = call.scale_format = call.bias_format = format;
  call.num_rows = s.rows, call.num_items = s.items, call.width = s.width, call.value_width = s.value_width;
  call.query = {(T*)query, s.width, 1}, call.items = {(T*)items, s.width, 1};
  call.own_values = s.own_values;
  call.values = s.own_values ? MatrixView{(T*)values, s.value_width, 1} : call.items;
  if (s.lists) {
    call.bias = {(T*)bias, 1}, call.row_scale = {(T*)row_scale, 1};
    call.lists = {excluded.ids.data(), excluded.begin.data()};
    call.kept = {kept.ids.data(), kept.begin.data()}, call.kept_slot = kept.slot.data();
    call.skipped = skipped.data(), call.num_skipped = (int64_t)skipped.size();
  }
  const int64_t slots = (int64_t)kept.ids.size();
  const Array<float> shift(s.rows), log_total(s.rows), lse(s.rows), scores(slots), weight(s.rows), share(slots);
  int calls = 0;

  const SoftmaxPlan plan = kernel.plan(call, s.rows);
  void* scratch = aligned_alloc(64, (plan.scratch_bytes + 63) / 64 * 64);
  for (const bool context : {false, true}) {
    const Array<T> out(s.rows * s.value_width);
    for (int64_t row = 0; row < s.rows; row += plan.group_rows) {
      const int64_t rows = row + plan.group_rows < s.rows ? plan.group_rows : s.rows - row;
      const Array<float> shifts(rows), totals(rows), sums(rows * s.value_width);
      SoftmaxSums found{shifts, totals, context ? (float*)sums : nullptr};
      kernel.forward(call, plan, row, rows, 0, plan.leaves, found, scores, scratch);
      SoftmaxResults results{shift, log_total, lse};
      results.context = (T*)out, results.context_format = format, results.context_stride = s.value_width;
      kernel.finish(call, row, rows, &found, 1, results);
      ++calls;
    }
  }
  free(scratch);

  const Array<float> g(s.rows * s.value_width), made(s.rows * s.value_width), d_bias(s.items);
  for (int mode = 0; mode < 4; ++mode) {
    const bool directed = mode >= 2, query_too = mode == 3;
    const Array<T> d_items(s.items * s.width), d_values(s.items * s.value_width);
    SoftmaxGradient gradient;
    gradient.shift = shift, gradient.weight = weight, gradient.kept_gradient = share;
    if (directed)
      gradient.direction = {(float*)g, s.value_width, 1}, gradient.context = {(float*)made, s.value_width, 1};
    gradient.items = (T*)d_items, gradient.item_format = format, gradient.item_stride = s.width;
    if (directed && s.own_values) gradient.values = (T*)d_values, gradient.value_stride = s.value_width;
    gradient.bias = d_bias;
    gradient.query = query_too;
    const SoftmaxPlan cut = kernel.plan_backward(call, gradient);
    const Array<float> skipped_mass(cut.leaves * s.rows), query_sums(s.rows * s.width);
    if (mode == 1) gradient.skipped = skipped_mass, gradient.skip_mass = 0.5f;
    const int64_t padded = (s.rows + 63) / 64 * 64;
    const Array<float> panel(padded * s.width), by_row(s.rows * s.width), directions(padded * s.value_width),
        directions_by_row(s.rows * s.value_width), factors(padded), offsets(padded);
    const Array<uint8_t> special(s.rows);
    const SoftmaxRows rows{panel.data,   by_row.data, directions.data, directions_by_row.data,
                           factors.data, offsets,     special};
    for (int64_t row = 0; row < s.rows; row += 64)
      kernel.prepare(call, gradient, row, row + 64 < s.rows ? 64 : s.rows - row, rows);
    scratch = aligned_alloc(64, (cut.scratch_bytes + 63) / 64 * 64);
    if (mode == 1 || query_too)
      kernel.backward_leaves(call, cut, gradient, rows, 0, cut.leaves, query_too ? (float*)query_sums : nullptr,
                             scratch);
    else
      kernel.backward_chunks(call, cut, gradient, rows, 0, cut.chunks, scratch);
    free(scratch);
    ++calls;
  }
  return calls;
}

int main(int arguments, char**) {
  const SoftmaxKernels& kernel = SEQREC_TIER::softmax_kernels;
  const int missing = arguments > 1;
  int calls = 0;
  for (const Sizes& sizes :
       {Sizes{1, 1, 1, 1, false, false}, Sizes{3, 13, 5, 5, false, true}, Sizes{17, 197, 16, 16, false, true},
        Sizes{33, 25, 7, 3, true, true}, Sizes{5, 4200, 3, 9, true, true}, Sizes{70, 30, 300, 300, false, true}}) {
    calls += run<float>(kernel, Format::kF32, sizes, missing);
    calls += run<uint16_t>(kernel, Format::kBF16, sizes, 0);
    calls += run<uint16_t>(kernel, Format::kF16, sizes, 0);
  }
  printf("%d\n", calls);
}
