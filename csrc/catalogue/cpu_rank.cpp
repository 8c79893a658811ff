// Registration of catalogue_rank on the CPU: the cut into tasks, threads.
#include <atomic>
#include <cstring>
#include <mutex>

#include "catalogue/cpu_arguments.h"
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

// How many different ids a list holds: a hash table twice the list's size, which for a usual history stays in L1
// (sorting takes ten times as long).
class DistinctIds {
 public:
  int64_t count(const int64_t* ids, int64_t n) {
    int bits = 4;
    while ((int64_t{1} << bits) < 2 * n) ++bits;
    slots_.assign(size_t{1} << bits, -1);
    const size_t mask = slots_.size() - 1;
    int64_t distinct = 0;
    for (int64_t i = 0; i < n; ++i) {
      // Multiplication by 2^64 / golden ratio spreads ids that are close together.
      size_t place = static_cast<size_t>((static_cast<uint64_t>(ids[i]) * 0x9E3779B97F4A7C15u) >> (64 - bits));
      while (slots_[place] != -1 && slots_[place] != ids[i]) place = (place + 1) & mask;
      distinct += slots_[place] == -1;
      slots_[place] = ids[i];
    }
    return distinct;
  }

 private:
  std::vector<int64_t> slots_;
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

// Tasks are groups of rows × runs of chunks, about eight a thread so that a thread that was held up does little of the
// rest. Threads take the next one as they finish: counts are whole numbers, so who did what leaves no trace.
void count_tasks(const RankCall& call, const RankKernels& kernel) {
  const RankPlan plan = kernel.plan(call);
  const int64_t groups = (call.num_rows + plan.group_rows - 1) / plan.group_rows;
  const int64_t chunks = (call.num_items + plan.chunk_items - 1) / plan.chunk_items;
  const int64_t lanes = std::max<int64_t>(call.num_rows, 16);  // a row alone costs as much as a register of them
  const double products =
      static_cast<double>(lanes) * static_cast<double>(call.num_items) * static_cast<double>(call.width + 8);
  const int64_t available = static_cast<int64_t>(torch::stable::get_num_threads());
  const int64_t threads = std::clamp<int64_t>(static_cast<int64_t>(products / kProductsPerThread), 1, available);
  int64_t runs = threads == 1 ? 1 : (8 * threads + groups - 1) / groups;
  runs = std::max(runs, call.num_items >> 28);  // counts of a task are held in 32 bits
  runs = std::clamp<int64_t>(runs, 1, std::max<int64_t>(chunks, 1));

  std::atomic<int64_t> next{0};
  std::atomic<bool> out_of_memory{false};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t first_thread, int64_t last_thread) {
    if (first_thread >= last_thread) return;
    const KeepDenormals keep;
    const Memory scratch = allocate(plan.scratch_bytes);
    if (!scratch) {
      out_of_memory = true;
      return;
    }
    std::memset(scratch.get(), 0, 64);  // says that nothing is packed yet
    for (int64_t task = next.fetch_add(1); task < groups * runs; task = next.fetch_add(1)) {
      const int64_t first_row = task / runs * plan.group_rows, run = task % runs;
      const int64_t first_item = chunks * run / runs * plan.chunk_items;
      const int64_t last_item = std::min(call.num_items, chunks * (run + 1) / runs * plan.chunk_items);
      kernel.count(call, plan, first_row, std::min(plan.group_rows, call.num_rows - first_row), first_item,
                   last_item - first_item, scratch.get());
    }
  });
  if (out_of_memory) throw std::bad_alloc();
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
