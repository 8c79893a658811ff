// Registration of catalogue_topk on the CPU: exclusion lists as sets, tasks, and the merge of what they find.
#include <mutex>
#include <tuple>

#include "catalogue/cpu_arguments.h"
#include "catalogue/cpu_tasks.h"
#include "catalogue/topk_call.h"

namespace seqrec_fast {
namespace {

// The exclusion lists as sets of ids, checked.
class SeenSets {
 public:
  SeenSets(const LogitArguments& a, const IdLists& lists, int64_t num_rows) {
    if (!lists.ids) return;
    const bool padded = lists.begin == nullptr;
    begin_.resize(static_cast<size_t>(num_rows) + 1);
    std::mutex mutex;
    int64_t bad_row = num_rows, bad = 0;
    const int64_t listed = std::max<int64_t>(lists.begin ? 64 : lists.width, 1);
    const int64_t grain = std::max<int64_t>(1, (int64_t{1} << 14) / listed);
    // Padding may be most of a list: ids are counted before there is memory for them.
    torch::stable::parallel_for(0, num_rows, grain, [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) {
        int64_t count = 0, wrong = 0;
        bool good = true;
        for_each(lists, row, [&](int64_t id) {
          if (good && (id < (padded ? -1 : 0) || id >= a.items.size(0))) good = false, wrong = id;
          count += id != kNoId;
        });
        begin_[static_cast<size_t>(row) + 1] = count ? id_places(count) : 0;
        if (good) continue;
        const std::lock_guard<std::mutex> lock(mutex);
        if (row < bad_row) bad_row = row, bad = wrong;
      }
    });
    if (bad_row < num_rows) a.bad_id("exclude", padded, bad);
    for (size_t row = 0; row < static_cast<size_t>(num_rows); ++row) begin_[row + 1] += begin_[row];
    table_ = allocate(std::max<int64_t>(begin_.back(), 1) * static_cast<int64_t>(sizeof(int64_t)));
    if (!table_) throw std::bad_alloc();
    int64_t* table = static_cast<int64_t*>(table_.get());
    torch::stable::parallel_for(0, num_rows, grain, [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) {
        int64_t* set = table + begin_[static_cast<size_t>(row)];
        const int64_t places = begin_[static_cast<size_t>(row) + 1] - begin_[static_cast<size_t>(row)];
        std::fill(set, set + places, kNoId);
        for_each(lists, row, [&](int64_t id) {
          if (id != kNoId) set[place_of_id(set, places, id)] = id;
        });
      }
    });
  }
  SeenSets(const SeenSets&) = delete;

  IdSets sets() const { return {static_cast<const int64_t*>(table_.get()), begin_.data()}; }

 private:
  template <class Visit>
  static void for_each(const IdLists& lists, int64_t row, const Visit& visit) {
    const Range list = list_of(lists, row);
    for (int64_t i = list.begin; i < list.end; ++i) visit(integer(lists.ids, lists.ids_are_64, i));
  }

  std::vector<int64_t> begin_;
  Memory table_;
};

struct Place {
  double score;
  int64_t id;
  bool operator<(const Place& other) const { return score > other.score || (score == other.score && id < other.id); }
};

// The results: each row's best so far, in order. Exact, so the order in which tasks come leaves no trace.
template <class Score>
class Results {
 public:
  Results(int64_t num_rows, int64_t k, int64_t kept, Score* values, int64_t* ids)
      : k_(k), kept_(kept), values_(values), ids_(ids), bars_(static_cast<size_t>(num_rows)) {
    torch::stable::parallel_for(0, num_rows, std::max<int64_t>(1, (int64_t{1} << 16) / k), [&](int64_t a, int64_t b) {
      std::fill(values + a * k, values + b * k, -std::numeric_limits<Score>::infinity());
      std::fill(ids + a * k, ids + b * k, int64_t{-1});
    });
  }

  // What an item must reach to be among the row's best: the last of them, once there are as many as are kept.
  const Bar* bars() const { return bars_.data(); }

  void merge(int64_t row, const Found& found, std::vector<Place>& fresh, std::vector<Place>& merged) {
    if (!found.count) return;
    fresh.clear();
    for (int64_t i = 0; i < found.count; ++i)
      fresh.push_back({static_cast<double>(static_cast<const Score*>(found.scores)[i]), found.ids[i]});
    std::sort(fresh.begin(), fresh.end());
    merged.clear();
    Score* values = values_ + row * k_;
    int64_t* ids = ids_ + row * k_;
    auto next = fresh.begin();
    for (int64_t i = 0; i < kept_ && ids[i] >= 0; ++i) {
      const Place former{static_cast<double>(values[i]), ids[i]};
      while (next != fresh.end() && *next < former) merged.push_back(*next++);
      merged.push_back(former);
    }
    merged.insert(merged.end(), next, fresh.end());
    const int64_t count = std::min(static_cast<int64_t>(merged.size()), kept_);
    for (int64_t i = 0; i < count; ++i) {
      values[i] = static_cast<Score>(merged[static_cast<size_t>(i)].score);
      ids[i] = merged[static_cast<size_t>(i)].id;
    }
    if (count == kept_) bars_[static_cast<size_t>(row)] = {static_cast<double>(values[kept_ - 1]), ids[kept_ - 1]};
  }

 private:
  const int64_t k_, kept_;
  Score* const values_;  // [B, k]
  int64_t* const ids_;   // [B, k]
  std::vector<Bar> bars_;
};

template <class Score>
void find(const TopkCall& call, int64_t k, Tensor& values, Tensor& ids) {
  Results<Score> results(call.num_rows, k, call.kept, static_cast<Score*>(values.mutable_data_ptr()),
                         ids.mutable_data_ptr<int64_t>());
  if (call.kept == 0) return;
  const TopkKernels& kernel = SEQREC_CHOSEN_TABLE(topk_kernels);
  const ScanPlan plan = kernel.plan(call);
  const TaskCut cut(call, plan, call.num_rows);
  std::vector<std::mutex> locks(static_cast<size_t>(cut.groups));
  cut.run(plan.scratch_bytes, [&](int64_t group, int64_t first_chunk, int64_t num_chunks, void* scratch) {
    const int64_t first_row = group * plan.group_rows, rows = std::min(plan.group_rows, call.num_rows - first_row);
    std::vector<Found> found(static_cast<size_t>(rows));
    std::vector<Bar> bars;
    {
      const std::lock_guard<std::mutex> lock(locks[static_cast<size_t>(group)]);
      bars.assign(results.bars() + first_row, results.bars() + first_row + rows);
    }
    kernel.scan(call, plan, first_row, rows, first_chunk, num_chunks, bars.data(), scratch, found.data());
    std::vector<Place> fresh, merged;
    const std::lock_guard<std::mutex> lock(locks[static_cast<size_t>(group)]);
    for (int64_t r = 0; r < rows; ++r) results.merge(first_row + r, found[static_cast<size_t>(r)], fresh, merged);
  });
}

std::tuple<Tensor, Tensor> catalogue_topk(const Tensor& query, const Tensor& items, int64_t k, double scale,
                                          std::optional<Tensor> row_scale, std::optional<Tensor> bias,
                                          std::optional<Tensor> exclude, std::optional<Tensor> exclude_crow) {
  const LogitArguments arguments{"catalogue_topk", query, items, scale, row_scale, bias, exclude, exclude_crow};
  arguments.check();
  for (const auto& option : {row_scale, bias})
    check_value(!option || option->scalar_type() == query.scalar_type(),
                "catalogue_topk: scale and bias must have the query's dtype");
  check_value(k >= 1, "catalogue_topk: k must be at least 1, got ", k);
  const Logits logits(arguments);
  TopkCall call;
  static_cast<LogitCall&>(call) = logits.call;
  call.num_rows = query.size(0);
  call.kept = std::min(k, call.num_items);
  const SeenSets seen(arguments, call.excluded, call.num_rows);
  call.seen = seen.sets();

  const bool wide = call.format == Format::kF64;
  Tensor values = torch::stable::new_empty(query, {call.num_rows, k}, wide ? ScalarType::Double : ScalarType::Float);
  Tensor ids = torch::stable::new_empty(query, {call.num_rows, k}, ScalarType::Long);
  if (call.num_rows == 0) return {values, ids};
  if (wide)
    find<double>(call, k, values, ids);
  else
    find<float>(call, k, values, ids);
  return {values, ids};
}

}  // namespace
}  // namespace seqrec_fast

STABLE_TORCH_LIBRARY_IMPL(seqrec_fast_native, CPU, m) {
  m.impl("catalogue_topk", TORCH_BOX(&seqrec_fast::catalogue_topk));
}
