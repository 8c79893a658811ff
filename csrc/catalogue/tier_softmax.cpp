// The softmax kernels for one CPU tier: this file is compiled once per tier, with SEQREC_TIER naming its namespace.
#include "catalogue/softmax_backward.h"
#include "catalogue/softmax_forward.h"

namespace seqrec_fast::SEQREC_TIER {
namespace {

// fp64 has no kernel here: its calls run on the reference.
template <class Work>
SEQREC_INLINE void with_element(Format format, const Work& work) {
  with_format(format, [&](auto element) {
    if constexpr (!kIsDouble<decltype(element)>) work(element);
  });
}

SEQREC_INLINE int64_t rounded_down(int64_t n, int64_t step) { return most(n / step, 1) * step; }

// Of a group of rows: queries and context fill a quarter of a 1 MiB L2 cache, and its leaves as much again.
SoftmaxPlan plan(const SoftmaxCall& call, int64_t most_rows) {
  const int64_t width = most(most(call.width, call.value_width), 1);
  SoftmaxPlan plan;
  const int64_t fitting = rounded_down(least((int64_t{1} << 15) / width, 512), kBlock);
  plan.group_rows = least(fitting, up_to(most(least(call.num_rows, most_rows), 1), kBlock));
  plan.chunk_items = rounded_down(least((int64_t{1} << 14) / width, 192), kTile);
  plan.chunks = (call.num_items + plan.chunk_items - 1) / plan.chunk_items;
  plan.leaves = count_leaves(call.num_items, kMostLeaves);
  with_element(call.format, [&](auto element) {
    Layout layout(nullptr);
    SoftmaxForward<decltype(element)> unused(call, plan, true, layout);
    plan.scratch_bytes = layout.bytes();
  });
  return plan;
}

SoftmaxPlan plan_backward(const SoftmaxCall& call, const SoftmaxGradient& gradient) {
  const int64_t width = most(most(call.width, call.value_width), 1);
  SoftmaxPlan plan;
  plan.group_rows =
      least(rounded_down(least((int64_t{1} << 14) / width, 256), kBlock), up_to(most(call.num_rows, 1), kBlock));
  plan.chunk_items = rounded_down(least(6144 / width, 96), kTile);
  plan.chunks = (call.num_items + plan.chunk_items - 1) / plan.chunk_items;
  plan.leaves = count_leaves(call.num_items, 16);
  with_element(call.format, [&](auto element) {
    Layout layout(nullptr);
    SoftmaxBackward<decltype(element)> unused(call, plan, gradient, layout);
    plan.scratch_bytes = layout.bytes();
  });
  return plan;
}

void forward(const SoftmaxCall& call, const SoftmaxPlan& plan, int64_t first_row, int64_t num_rows, int64_t first_leaf,
             int64_t num_leaves, const SoftmaxSums& sums, float* kept_score, void* scratch) {
  with_element(call.format, [&](auto element) {
    Layout layout(scratch);
    SoftmaxForward<decltype(element)> task(call, plan, sums.context != nullptr, layout);
    task.first_row = first_row, task.num_rows = num_rows, task.kept_score = kept_score;
    task.run(first_leaf, num_leaves, sums);
  });
}

void finish(const SoftmaxCall& call, int64_t first_row, int64_t num_rows, SoftmaxSums* sums, int64_t runs,
            const SoftmaxResults& to) {
  for (int64_t step = 1; step < runs; step *= 2)
    for (int64_t run = 0; run < runs; run += 2 * step)
      merge_sums(sums[run], sums[run + step], num_rows, call.value_width);
  const SoftmaxSums& all = sums[0];
  for (int64_t r = 0; r < num_rows; ++r) {
    const int64_t row = first_row + r;
    const float shift = all.shift[r] == -infinity() ? 0.0f : all.shift[r];
    const float log_total = static_cast<float>(__builtin_log(static_cast<double>(all.total[r])));
    to.shift[row] = shift, to.log_total[row] = log_total;
    if (to.lse) to.lse[row * to.lse_stride] = shift + log_total;
    if (!all.context) continue;
    const float divisor = all.total[r] == 0.0f ? 1.0f : all.total[r];
    float* context = all.context + r * call.value_width;
    for (int64_t k = 0; k < call.value_width; ++k) context[k] /= divisor;
    with_element(to.context_format, [&](auto element) {
      narrow(context, call.value_width, static_cast<decltype(element)*>(to.context) + row * to.context_stride);
    });
  }
}

void read_item(const SoftmaxCall& call, int64_t item, float* to) {
  with_element(call.format, [&](auto element) {
    read_row(row_of<decltype(element)>(call.items, item), call.items.column_stride, call.width, to);
  });
}

void prepare(const SoftmaxCall& call, const SoftmaxGradient& gradient, int64_t first_row, int64_t num_rows,
             const SoftmaxRows& rows) {
  with_element(call.format, [&](auto element) {
    prepare_rows<decltype(element)>(call, gradient, first_row, first_row + num_rows, rows);
  });
}

template <class Work>
SEQREC_INLINE void with_backward(const SoftmaxCall& call, const SoftmaxPlan& plan, const SoftmaxGradient& gradient,
                                 const SoftmaxRows& rows, void* scratch, const Work& work) {
  with_element(call.format, [&](auto element) {
    Layout layout(scratch);
    SoftmaxBackward<decltype(element)> task(call, plan, gradient, layout);
    task.rows = rows;
    work(task);
  });
}

void backward_chunks(const SoftmaxCall& call, const SoftmaxPlan& plan, const SoftmaxGradient& gradient,
                     const SoftmaxRows& rows, int64_t first, int64_t last, void* scratch) {
  with_backward(call, plan, gradient, rows, scratch, [&](auto& task) { task.add_chunks(first, last, nullptr); });
}

void backward_leaves(const SoftmaxCall& call, const SoftmaxPlan& plan, const SoftmaxGradient& gradient,
                     const SoftmaxRows& rows, int64_t first_leaf, int64_t num_leaves, float* query_sums,
                     void* scratch) {
  with_backward(call, plan, gradient, rows, scratch,
                [&](auto& task) { task.run_leaves(first_leaf, num_leaves, query_sums); });
}

}  // namespace

const SoftmaxKernels softmax_kernels = {plan,      plan_backward, forward,         finish,
                                        read_item, prepare,       backward_chunks, backward_leaves};

}  // namespace seqrec_fast::SEQREC_TIER
