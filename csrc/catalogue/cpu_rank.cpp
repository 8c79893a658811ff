// Registration of catalogue_rank on the CPU: the cut into tasks, threads.
#include <mutex>

#include "catalogue/cpu_arguments.h"
#include "catalogue/cpu_tasks.h"
#include "catalogue/id_set.h"
#include "catalogue/rank_call.h"

namespace seqrec_fast {
namespace {

// The rows to rank: every target in range, ignored rows left out.
std::vector<int64_t> rows_to_rank(const LogitArguments& a, const VectorView& target, int64_t ignore_index) {
  std::vector<int64_t> rows;
  rows.reserve(static_cast<size_t>(a.query.size(0)));
  for (int64_t r = 0; r < a.query.size(0); ++r) {
    const int64_t id = static_cast<const int64_t*>(target.data)[r * target.stride];
    if (id == ignore_index) continue;
    a.check_id("target", false, id);
    rows.push_back(r);
  }
  return rows;
}

// Lists of ignored rows are not looked at again, but their ids must be valid like any other.
void check_ignored_lists(const LogitArguments& a, const RankCall& call) {
  const bool padded = call.excluded.begin == nullptr;
  int64_t next = 0;
  for (int64_t r = 0; r < a.query.size(0); ++r) {
    if (next < call.num_rows && call.rows[next] == r) {
      ++next;
      continue;
    }
    const Range list = list_of(call.excluded, r);
    for (int64_t i = list.begin; i < list.end; ++i)
      a.check_id("exclude", padded, integer(call.excluded.ids, call.excluded.ids_are_64, i));
  }
}

// ---- work
// -------------------------------------------------------------------------------------------------------------

// How many different ids a list holds.
class DistinctIds {
 public:
  int64_t count(const int64_t* ids, int64_t n) {
    table_.assign(static_cast<size_t>(id_places(n)), kNoId);
    const int64_t places = static_cast<int64_t>(table_.size());
    int64_t distinct = 0;
    for (int64_t i = 0; i < n; ++i) {
      int64_t& place = table_[static_cast<size_t>(place_of_id(table_.data(), places, ids[i]))];
      distinct += place == kNoId;
      place = ids[i];
    }
    return distinct;
  }

 private:
  std::vector<int64_t> table_;
};

// goal and the (negative) number of excluded items above it, row by row.
void prepare_rows(const LogitArguments& a, const RankCall& call, const RankKernels& kernel) {
  std::mutex mutex;
  int64_t bad_index = call.num_rows, bad = 0;
  const int64_t listed = call.excluded.begin ? 64 : call.excluded.ids ? call.excluded.width : 0;
  const int64_t grain =
      std::max<int64_t>(1, kProductsPerThread / 16 / (std::max<int64_t>(call.width, 1) * (1 + listed / 8)));
  torch::stable::parallel_for(0, call.num_rows, grain, [&](int64_t begin, int64_t end) {
    const KeepDenormals keep;
    kernel.target_scores(call, begin, end);
    if (!call.excluded.ids) return;
    std::vector<float> query(static_cast<size_t>(call.width));
    std::vector<int64_t> above;
    DistinctIds distinct;
    for (int64_t index = begin; index < end; ++index) {
      const Range list = list_of(call.excluded, call.rows[index]);
      const size_t room = static_cast<size_t>(list.end - list.begin + 1);
      if (above.size() < room) above.resize(room);
      int64_t wrong = 0;
      const int64_t found = kernel.excluded_above(call, index, query.data(), above.data(), &wrong);
      if (found < 0) {
        const std::lock_guard<std::mutex> lock(mutex);
        if (index < bad_index) bad_index = index, bad = wrong;
        return;
      }
      call.rank[call.rows[index]] = -distinct.count(above.data(), found);
    }
  });
  if (bad_index < call.num_rows) a.bad_id("exclude", call.excluded.begin == nullptr, bad);
}

void count_tasks(const RankCall& call, const RankKernels& kernel) {
  const ScanPlan plan = kernel.plan(call);
  TaskCut cut(call, plan, call.num_rows);
  cut.runs = std::clamp(cut.runs, call.num_items >> 28, cut.chunks);  // counts of a task are held in 32 bits
  // Counts are whole numbers, so who did what leaves no trace.
  cut.run(plan.scratch_bytes, [&](int64_t group, int64_t first_chunk, int64_t num_chunks, void* scratch) {
    const int64_t first_row = group * plan.group_rows, first_item = first_chunk * plan.chunk_items;
    kernel.count(call, plan, first_row, std::min(plan.group_rows, call.num_rows - first_row), first_item,
                 std::min(num_chunks * plan.chunk_items, call.num_items - first_item), scratch);
  });
}

Tensor catalogue_rank(const Tensor& query, const Tensor& items, const Tensor& target, double scale,
                      std::optional<Tensor> row_scale, std::optional<Tensor> bias, std::optional<Tensor> exclude,
                      std::optional<Tensor> exclude_crow, int64_t ignore_index) {
  const LogitArguments arguments{"catalogue_rank", query, items, scale, row_scale, bias, exclude, exclude_crow};
  arguments.check();
  check_value(target.dim() == 1 && target.size(0) == query.size(0), "catalogue_rank: target must have one id per row");
  check_value(target.scalar_type() == ScalarType::Long, "catalogue_rank: target must be int64");
  for (const auto& option : {row_scale, bias})
    check_value(!option || option->scalar_type() == query.scalar_type(),
                "catalogue_rank: scale and bias must have the query's dtype");
  const int64_t batch = query.size(0);
  const std::vector<int64_t> rows = rows_to_rank(arguments, vector(target), ignore_index);
  const Logits logits(arguments);
  RankCall call;
  static_cast<LogitCall&>(call) = logits.call;
  call.target = vector(target);
  call.rows = rows.data();
  call.num_rows = static_cast<int64_t>(rows.size());
  if (call.excluded.ids) check_ignored_lists(arguments, call);

  Tensor rank = torch::stable::new_empty(query, {batch}, ScalarType::Long);
  call.rank = rank.mutable_data_ptr<int64_t>();
  std::fill(call.rank, call.rank + batch, int64_t{-1});
  for (const int64_t row : rows) call.rank[row] = 0;
  if (rows.empty()) return rank;
  std::vector<double> goal(rows.size());
  call.goal = goal.data();
  const RankKernels& kernel = SEQREC_CHOSEN_TABLE(rank_kernels);
  prepare_rows(arguments, call, kernel);
  count_tasks(call, kernel);
  return rank;
}

}  // namespace
}  // namespace seqrec_fast

STABLE_TORCH_LIBRARY_IMPL(seqrec_fast_native, CPU, m) {
  m.impl("catalogue_rank", TORCH_BOX(&seqrec_fast::catalogue_rank));
}
