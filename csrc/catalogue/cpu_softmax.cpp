#include "catalogue/cpu_softmax.h"

#include <numeric>

namespace seqrec_fast {
namespace {

int64_t bytes_of(Format format) { return format == Format::kF64 ? 8 : format == Format::kF32 ? 4 : 2; }

MatrixView columns_from(const MatrixView& matrix, int64_t first, Format format) {
  MatrixView part = matrix;
  part.data = static_cast<const char*>(matrix.data) + first * matrix.column_stride * bytes_of(format);
  return part;
}

int64_t power_of_two_from(int64_t least) {
  int64_t power = 1;
  while (power < least) power *= 2;
  return power;
}

double products_of(const SoftmaxCall& call) {
  const int64_t lanes = std::max<int64_t>(call.num_rows, 16);  // a row alone costs as much as a register of them
  return static_cast<double>(lanes) * static_cast<double>(call.num_items) *
         static_cast<double>(call.width + call.value_width + 24);
}

// Into how many runs of leaves a row's items are cut, so that there are some tasks for every thread.
int64_t runs_for(int64_t leaves, int64_t groups, int64_t threads) {
  return threads == 1 ? 1 : std::min(leaves, power_of_two_from((4 * threads + groups - 1) / groups));
}

}  // namespace

SortedHolder::SortedHolder(const LogitArguments& a, const char* name, const IdLists& from, bool slots,
                           const std::vector<int64_t>* rows) {
  const int64_t all_rows = a.query.size(0);
  const bool padded = from.begin == nullptr;
  begin_.assign(1, 0);
  begin_.reserve(static_cast<size_t>(all_rows) + 1);
  for (int64_t r = 0; r < all_rows; ++r) {
    const Range list = list_of(from, r);
    int64_t count = 0;
    for (int64_t i = list.begin; i < list.end; ++i) {
      const int64_t id = integer(from.ids, from.ids_are_64, i);
      a.check_id(name, padded, id);
      count += id != -1;
    }
    const size_t next = begin_.size() - 1;
    if (!rows || (next < rows->size() && (*rows)[next] == r)) begin_.push_back(begin_.back() + count);
  }
  ids_.resize(static_cast<size_t>(begin_.back()));
  if (slots) slots_.resize(ids_.size());
  torch::stable::parallel_for(0, static_cast<int64_t>(begin_.size()) - 1, 16, [&](int64_t first, int64_t last) {
    std::vector<std::pair<int64_t, int64_t>> pairs;
    for (int64_t r = first; r < last; ++r) {
      const Range list = list_of(from, rows ? (*rows)[static_cast<size_t>(r)] : r);
      int64_t* to = ids_.data() + begin_[static_cast<size_t>(r)];
      if (!slots) {
        int64_t* end = to;
        for (int64_t i = list.begin; i < list.end; ++i) {
          const int64_t id = integer(from.ids, from.ids_are_64, i);
          if (id != -1) *end++ = id;
        }
        if (!std::is_sorted(to, end)) std::sort(to, end);
        continue;
      }
      pairs.clear();
      for (int64_t i = list.begin; i < list.end; ++i) {
        const int64_t id = integer(from.ids, from.ids_are_64, i);
        if (id != -1) pairs.emplace_back(id, i);
      }
      std::sort(pairs.begin(), pairs.end());
      int64_t* slot = slots_.data() + begin_[static_cast<size_t>(r)];
      for (const auto& [id, place] : pairs) *to++ = id, *slot++ = place;
    }
  });
}

Softmax::Softmax(const LogitArguments& given, const std::optional<Tensor>& own_values, int64_t heads,
                 const KeptPairs& pairs)
    : arguments((given.check(), given)), values(own_values), num_heads(heads), logits(given) {
  const Tensor& items = arguments.items;
  check_value(num_heads >= 1 && items.size(1) % num_heads == 0, arguments.operation,
              ": the width of query must be a multiple of num_heads");
  check_value(!values || (values->dim() == 2 && values->size(0) == items.size(0) &&
                          values->scalar_type() == items.scalar_type() && values->size(1) % num_heads == 0),
              arguments.operation, ": values must have shape [I, d_v] and the dtype of the keys");
  static_cast<LogitCall&>(all) = logits.call;
  check_value(all.format != Format::kF64, arguments.operation, ": float64 has no native kernel");
  if (arguments.row_scale) all.scale_format = arguments.format(*arguments.row_scale);
  if (arguments.bias) all.bias_format = arguments.format(*arguments.bias);
  all.num_rows = arguments.query.size(0);
  all.width = items.size(1) / num_heads;
  all.own_values = values.has_value();
  all.values = values ? matrix(*values) : all.items;
  all.value_width = values ? values->size(1) / num_heads : all.width;
  if (all.excluded.ids) excluded = SortedHolder(arguments, "exclude", all.excluded, false, pairs.rows);
  all.lists = excluded.lists();
  if (pairs.lists.ids) {
    kept = SortedHolder(arguments, "target", pairs.lists, true, pairs.rows);
    all.kept = kept.lists(), all.kept_slot = kept.slots();
  }
  if (pairs.rows) take_rows(*pairs.rows);
}

// Copies of the rows that take part, so that the kernels know of no others.
void Softmax::take_rows(const std::vector<int64_t>& rows) {
  const Tensor query = torch::stable::contiguous(arguments.query);
  const int64_t count = static_cast<int64_t>(rows.size()), row_bytes = query.size(1) * bytes_of(all.format);
  query_rows_ = torch::stable::new_empty(query, {count, query.size(1)});
  char* to = static_cast<char*>(query_rows_.mutable_data_ptr());
  for (int64_t r = 0; r < count; ++r)
    std::memcpy(to + r * row_bytes, static_cast<const char*>(data_of(query)) + rows[static_cast<size_t>(r)] * row_bytes,
                static_cast<size_t>(row_bytes));
  all.query = matrix(query_rows_);
  all.num_rows = count;
  if (!arguments.row_scale) return;
  const Tensor scale = torch::stable::contiguous(*arguments.row_scale);
  const int64_t bytes = bytes_of(all.scale_format);
  scale_rows_ = torch::stable::new_empty(scale, {count});
  to = static_cast<char*>(scale_rows_.mutable_data_ptr());
  for (int64_t r = 0; r < count; ++r)
    std::memcpy(to + r * bytes, static_cast<const char*>(data_of(scale)) + rows[static_cast<size_t>(r)] * bytes,
                static_cast<size_t>(bytes));
  all.row_scale = vector(scale_rows_);
}

SoftmaxCall Softmax::head(int64_t h) const {
  SoftmaxCall call = all;
  call.query = columns_from(all.query, h * all.width, all.format);
  call.items = columns_from(all.items, h * all.width, all.format);
  call.values = columns_from(all.values, h * all.value_width, all.format);
  return call;
}

// Where a short catalogue has few leaves, rows are cut finer, so that there is a task for every thread.
SoftmaxPlan plan_for(const SoftmaxCall& call, int64_t threads) {
  const SoftmaxKernels& kernel = SEQREC_CHOSEN_TABLE(softmax_kernels);
  const SoftmaxPlan plan = kernel.plan(call, call.num_rows);
  if (threads == 1 || plan.leaves >= threads) return plan;
  return kernel.plan(call, (call.num_rows * plan.leaves + threads - 1) / threads);
}

ForwardCut::ForwardCut(const SoftmaxCall& call, bool context, int64_t available)
    : threads(std::min(available, threads_for(products_of(call)))),
      plan(plan_for(call, threads)),
      groups((call.num_rows + plan.group_rows - 1) / plan.group_rows),
      runs(runs_for(plan.leaves, std::max<int64_t>(groups, 1), threads)),
      floats(plan.group_rows * ((context ? call.value_width : 0) + 2)) {}

int64_t ForwardCut::bytes() const { return groups * runs * floats * 4 + threads * plan.scratch_bytes; }

void softmax_forward(const SoftmaxCall& call, const SoftmaxResults& results, bool context, float* kept_score) {
  if (call.num_rows == 0) return;
  const SoftmaxKernels& kernel = SEQREC_CHOSEN_TABLE(softmax_kernels);
  const ForwardCut cut(call, context, torch::stable::get_num_threads());
  const SoftmaxPlan& plan = cut.plan;
  const int64_t runs = cut.runs, leaves = plan.leaves / runs;
  const Memory sums = allocate(cut.groups * runs * cut.floats * 4);
  if (!sums) throw std::bad_alloc();
  const auto of = [&](int64_t group, int64_t run) {
    float* memory = static_cast<float*>(sums.get()) + (group * runs + run) * cut.floats;
    return SoftmaxSums{memory, memory + plan.group_rows, context ? memory + 2 * plan.group_rows : nullptr};
  };
  const auto rows_of = [&](int64_t group) {
    return std::min(plan.group_rows, call.num_rows - group * plan.group_rows);
  };
  share_tasks(cut.groups * runs, cut.threads, plan.scratch_bytes, [&](int64_t task, void* scratch) {
    const int64_t group = task / runs, run = task % runs;
    kernel.forward(call, plan, group * plan.group_rows, rows_of(group), run * leaves, leaves, of(group, run),
                   kept_score, scratch);
  });
  share_tasks(cut.groups, cut.threads, 0, [&](int64_t group, void*) {
    std::vector<SoftmaxSums> parts(static_cast<size_t>(runs));
    for (int64_t run = 0; run < runs; ++run) parts[static_cast<size_t>(run)] = of(group, run);
    kernel.finish(call, group * plan.group_rows, rows_of(group), parts.data(), runs, results);
  });
}

BackwardCut::BackwardCut(const SoftmaxCall& call, const SoftmaxGradient& gradient, int64_t available)
    : plan(SEQREC_CHOSEN_TABLE(softmax_kernels).plan_backward(call, gradient)),
      threads(std::min(available, threads_for(products_of(call) * 2))),
      runs(gradient.query ? runs_for(plan.leaves, 1, threads) : 1),
      padded_rows((call.num_rows + 63) / 64 * 64),
      row_bytes(2 * (call.width + (gradient.direction.data ? call.value_width : 0)) * 4 + 9),
      sum_bytes(call.num_rows * call.width * 4) {}

int64_t BackwardCut::bytes() const {
  return padded_rows * row_bytes + (runs - 1) * sum_bytes + threads * plan.scratch_bytes;
}

void softmax_backward(const SoftmaxCall& call, const SoftmaxGradient& given, float* direction_sums, float* skipped) {
  const SoftmaxKernels& kernel = SEQREC_CHOSEN_TABLE(softmax_kernels);
  const BackwardCut cut(call, given, torch::stable::get_num_threads());
  const SoftmaxPlan& plan = cut.plan;
  SoftmaxGradient gradient = given;
  const int64_t rows = call.num_rows;
  const Memory memory = allocate(cut.padded_rows * cut.row_bytes + 64);
  if (!memory) throw std::bad_alloc();
  SoftmaxRows prepared;
  float* next = static_cast<float*>(memory.get());
  const auto take = [&](int64_t width) { return std::exchange(next, next + cut.padded_rows * width); };
  prepared.queries = take(call.width), prepared.query_rows = take(call.width);
  if (gradient.direction.data)
    prepared.directions = take(call.value_width), prepared.direction_rows = take(call.value_width);
  prepared.factors = take(1), prepared.offsets = take(1);
  prepared.special = reinterpret_cast<uint8_t*>(next);
  share_tasks((rows + 63) / 64, cut.threads, 0, [&](int64_t task, void*) {
    kernel.prepare(call, gradient, task * 64, std::min<int64_t>(64, rows - task * 64), prepared);
  });

  if (gradient.query) {
    const int64_t leaves = plan.leaves / cut.runs, size = rows * call.width;
    const Memory others = allocate((cut.runs - 1) * cut.sum_bytes);
    if (!others) throw std::bad_alloc();
    const auto sums_of = [&](int64_t run) {
      return run == 0 ? direction_sums : static_cast<float*>(others.get()) + (run - 1) * size;
    };
    share_tasks(cut.runs, cut.threads, plan.scratch_bytes, [&](int64_t run, void* scratch) {
      kernel.backward_leaves(call, plan, gradient, prepared, run * leaves, leaves, sums_of(run), scratch);
    });
    for (int64_t step = 1; step < cut.runs; step *= 2)
      for (int64_t run = 0; run < cut.runs; run += 2 * step) {
        float* lower = sums_of(run);
        const float* upper = sums_of(run + step);
        for (int64_t k = 0; k < size; ++k) lower[k] += upper[k];
      }
  } else if (skipped) {
    // What may be left out is shared evenly among the leaves, so that it does not depend on the threads.
    std::vector<float> by_leaf(static_cast<size_t>(plan.leaves * rows));
    gradient.skipped = by_leaf.data();
    gradient.skip_mass /= static_cast<float>(plan.leaves);
    share_tasks(plan.leaves, cut.threads, plan.scratch_bytes, [&](int64_t leaf, void* scratch) {
      kernel.backward_leaves(call, plan, gradient, prepared, leaf, 1, nullptr, scratch);
    });
    for (int64_t r = 0; r < rows; ++r) {
      skipped[r] = 0.0f;
      for (int64_t leaf = 0; leaf < plan.leaves; ++leaf) skipped[r] += by_leaf[static_cast<size_t>(leaf * rows + r)];
    }
  } else {
    const int64_t tasks = std::min(plan.chunks, 8 * cut.threads);
    share_tasks(tasks, cut.threads, plan.scratch_bytes, [&](int64_t task, void* scratch) {
      kernel.backward_chunks(call, plan, gradient, prepared, plan.chunks * task / tasks,
                             plan.chunks * (task + 1) / tasks, scratch);
    });
  }
}

}  // namespace seqrec_fast
