// Registration of catalogue_topk on the CPU: exclusion lists as sets, tasks, and the merge of what they find.
#include <cmath>
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
    filter_.assign(static_cast<size_t>(filter_words(begin_.back())), 0);
    torch::stable::parallel_for(0, num_rows, grain, [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) {
        int64_t* set = table + begin_[static_cast<size_t>(row)];
        const int64_t places = begin_[static_cast<size_t>(row) + 1] - begin_[static_cast<size_t>(row)];
        std::fill(set, set + places, kNoId);
        uint64_t* filter = filter_.data() + filter_words(begin_[static_cast<size_t>(row)]);
        for_each(lists, row, [&](int64_t id) {
          if (id == kNoId) return;
          set[place_of_id(set, places, id)] = id;
          const int64_t bit = filter_bit(places, id);
          filter[bit / 64] |= uint64_t{1} << (bit % 64);
        });
      }
    });
  }
  SeenSets(const SeenSets&) = delete;

  IdSets sets() const { return {static_cast<const int64_t*>(table_.get()), begin_.data(), filter_.data()}; }

 private:
  template <class Visit>
  static void for_each(const IdLists& lists, int64_t row, const Visit& visit) {
    const Range list = list_of(lists, row);
    for (int64_t i = list.begin; i < list.end; ++i) visit(integer(lists.ids, lists.ids_are_64, i));
  }

  std::vector<int64_t> begin_;
  std::vector<uint64_t> filter_;
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

  // What an item must reach to be among the row's best: the last of them, once there are as many as are kept; before
  // that, what it was set to.
  const Bar* bars() const { return bars_.data(); }
  void set_bars(const Bar* bars) { std::copy_n(bars, bars_.size(), bars_.data()); }

  // Whether a bar that it was set to has kept items out: without one a row may have fewer to find.
  bool fell_short(int64_t row) const {
    return ids_[row * k_ + kept_ - 1] < 0 && bars_[static_cast<size_t>(row)].least > Bar{}.least;
  }
  // Forgets what was found for a row.
  void restart(int64_t row) {
    std::fill_n(values_ + row * k_, kept_, -std::numeric_limits<Score>::infinity());
    std::fill_n(ids_ + row * k_, kept_, int64_t{-1});
    bars_[static_cast<size_t>(row)] = Bar{};
  }

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

struct Rows {
  int64_t first, count;
};

// Groups of rows against the first `chunks` chunks of the order in which they are visited.
template <class Score>
void search(const TopkCall& call, const ScanPlan& plan, const std::vector<Rows>& groups, int64_t chunks,
            Results<Score>& results) {
  const TopkKernels& kernel = SEQREC_CHOSEN_TABLE(topk_kernels);
  const TaskCut cut(call, call.num_rows, static_cast<int64_t>(groups.size()), chunks);
  std::vector<std::mutex> locks(groups.size());
  cut.run(plan.scratch_bytes, [&](int64_t group, int64_t first_chunk, int64_t num_chunks, void* scratch) {
    const Rows rows = groups[static_cast<size_t>(group)];
    std::mutex& of_group = locks[static_cast<size_t>(group)];
    std::vector<Found> found(static_cast<size_t>(rows.count));
    std::vector<Bar> bars;
    {
      const std::lock_guard<std::mutex> lock(of_group);
      bars.assign(results.bars() + rows.first, results.bars() + rows.first + rows.count);
    }
    kernel.scan(call, plan, rows.first, rows.count, first_chunk, num_chunks, bars.data(), scratch, found.data());
    std::vector<Place> fresh, merged;
    const std::lock_guard<std::mutex> lock(of_group);
    for (int64_t r = 0; r < rows.count; ++r)
      results.merge(rows.first + r, found[static_cast<size_t>(r)], fresh, merged);
  });
}

std::vector<Rows> groups_of(const TopkCall& call, const ScanPlan& plan) {
  std::vector<Rows> groups;
  for (int64_t row = 0; row < call.num_rows; row += plan.group_rows)
    groups.push_back({row, std::min(plan.group_rows, call.num_rows - row)});
  return groups;
}

// A bar to begin with. Without one a row admits, and mostly drops again, about k·ln(I/k) items. With the r-th best
// score of a sample of the items it admits about r times the sampling rate of them. r is so large that this is fewer
// than k for one row in 10,000 of items in no particular order; such a row is searched again (see find), so what is
// found never depends on the guess.
constexpr int64_t kSampling = 32, kLeastSample = 4;  // one chunk of so many; chunks
constexpr int64_t kLeastSampledRows = 8;

template <class Score>
bool guess_bars(const TopkCall& call, int64_t chunks, Results<Score>& results) {
  const int64_t sample = chunks / kSampling;
  if (sample < kLeastSample || call.num_rows < kLeastSampledRows) return false;
  const double expected = static_cast<double>(call.kept) / static_cast<double>(kSampling);
  const int64_t rank = static_cast<int64_t>(std::ceil(expected + 3.0 * std::sqrt(expected) + 3.0));
  TopkCall of_sample = call;
  of_sample.kept = std::min(rank, call.kept);
  const ScanPlan plan = SEQREC_CHOSEN_TABLE(topk_kernels).plan(of_sample);
  if (sample * plan.chunk_items < 4 * of_sample.kept) return false;
  const auto size = static_cast<size_t>(call.num_rows * of_sample.kept);
  std::vector<Score> values(size);
  std::vector<int64_t> ids(size);
  Results<Score> best(call.num_rows, of_sample.kept, of_sample.kept, values.data(), ids.data());
  search(of_sample, plan, groups_of(of_sample, plan), sample, best);
  results.set_bars(best.bars());
  return true;
}

template <class Score>
void find(const TopkCall& call, int64_t k, Tensor& values, Tensor& ids) {
  Results<Score> results(call.num_rows, k, call.kept, static_cast<Score*>(values.mutable_data_ptr()),
                         ids.mutable_data_ptr<int64_t>());
  if (call.kept == 0) return;
  const ScanPlan plan = SEQREC_CHOSEN_TABLE(topk_kernels).plan(call);
  const int64_t chunks = std::max<int64_t>((call.num_items + plan.chunk_items - 1) / plan.chunk_items, 1);
  const bool guessed = guess_bars(call, chunks, results);
  const std::vector<Rows> groups = groups_of(call, plan);
  search(call, plan, groups, chunks, results);
  if (!guessed) return;
  std::vector<Rows> again;
  for (int64_t row = 0; row < call.num_rows; ++row)
    if (results.fell_short(row)) again.push_back({row, 1});
  if (again.empty()) return;
  // A group takes about as long as a few of its rows.
  const bool all = static_cast<int64_t>(again.size()) > std::min<int64_t>(call.num_rows / 4, 16);
  if (all) again = groups;
  for (const Rows& rows : again)
    for (int64_t row = rows.first; row < rows.first + rows.count; ++row) results.restart(row);
  search(call, plan, again, chunks, results);
}

std::tuple<Tensor, Tensor> run(const LogitArguments& arguments, int64_t k, const PackedItems& packed) {
  const char* name = arguments.operation;
  const Tensor& query = arguments.query;
  for (const auto& option : {arguments.row_scale, arguments.bias})
    check_value(!option || option->scalar_type() == query.scalar_type(), name,
                ": scale and bias must have the query's dtype");
  check_value(k >= 1, name, ": k must be at least 1, got ", k);
  const Logits logits(arguments);
  TopkCall call;
  static_cast<LogitCall&>(call) = logits.call;
  call.packed = packed;
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

std::tuple<Tensor, Tensor> catalogue_topk(const Tensor& query, const Tensor& items, int64_t k, double scale,
                                          std::optional<Tensor> row_scale, std::optional<Tensor> bias,
                                          std::optional<Tensor> exclude, std::optional<Tensor> exclude_crow) {
  const LogitArguments arguments{"catalogue_topk", query, items, scale, row_scale, bias, exclude, exclude_crow};
  arguments.check();
  return run(arguments, k, {});
}

// ---- from a packed copy ----

constexpr int64_t kMostPackedWidth = int64_t{1} << 14;  // kPackedWidth of packed.h

void check_packable(const char* operation, const Tensor& items) {
  check_value(items.dim() == 2, operation, ": items must have shape [I, d]");
  check_value(items.scalar_type() != ScalarType::Double, operation, ": float64 items have no packed form");
  check_value(items.size(1) <= kMostPackedWidth, operation, ": items may have a width of at most ", kMostPackedWidth);
}

std::tuple<Tensor, Tensor> catalogue_pack_int8(const Tensor& items) {
  const LogitArguments arguments{"catalogue_pack_int8", items, items, 1.0, {}, {}, {}, {}};
  arguments.check();
  check_packable("catalogue_pack_int8", items);
  const Logits logits(arguments);
  const int64_t count = items.size(0), stride = packed_stride(items.size(1));
  Tensor codes = torch::stable::new_empty(items, {count, stride}, ScalarType::Char);
  Tensor facts = torch::stable::new_empty(items, {3, count}, ScalarType::Float);
  if (count == 0) return {codes, facts};
  const PackedItems to{static_cast<const int8_t*>(codes.mutable_data_ptr()),
                       static_cast<const float*>(facts.mutable_data_ptr()), count};
  const TopkKernels& kernel = SEQREC_CHOSEN_TABLE(topk_kernels);
  const int64_t grain = std::max<int64_t>(1, (int64_t{1} << 16) / (stride + 1));
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    const KeepDenormals keep;
    kernel.pack(logits.call, begin, end - begin, to);
  });
  return {codes, facts};
}

std::tuple<Tensor, Tensor> catalogue_topk_packed(const Tensor& query, const Tensor& items, const Tensor& codes,
                                                 const Tensor& facts, int64_t k, double scale,
                                                 std::optional<Tensor> row_scale, std::optional<Tensor> bias,
                                                 std::optional<Tensor> exclude, std::optional<Tensor> exclude_crow) {
  const char* name = "catalogue_topk_packed";
  const LogitArguments arguments{name, query, items, scale, row_scale, bias, exclude, exclude_crow};
  arguments.check();
  check_packable(name, items);
  const int64_t count = items.size(0), stride = packed_stride(items.size(1));
  check_value(codes.scalar_type() == ScalarType::Char && facts.scalar_type() == ScalarType::Float, name,
              ": codes must be int8 and facts float32");
  check_value(codes.device().type() == items.device().type() && facts.device().type() == items.device().type(), name,
              ": codes and facts must be on the device of items");
  check_value(codes.dim() == 2 && codes.size(0) == count && codes.size(1) == stride &&
                  (stride == 0 || codes.stride(1) == 1) && (count <= 1 || stride == 0 || codes.stride(0) == stride),
              name, ": codes must have shape [I, d rounded up to 32] and be contiguous");
  check_value(facts.dim() == 2 && facts.size(0) == 3 && facts.size(1) == count && (count <= 1 || facts.stride(1) == 1),
              name, ": facts must have shape [3, I], with contiguous rows");
  // A width of 0 has no codes to scan.
  if (stride == 0 || count == 0) return run(arguments, k, {});
  return run(arguments, k,
             {static_cast<const int8_t*>(data_of(codes)), static_cast<const float*>(data_of(facts)), facts.stride(0)});
}

}  // namespace
}  // namespace seqrec_fast

STABLE_TORCH_LIBRARY_IMPL(seqrec_fast_native, CPU, m) {
  m.impl("catalogue_topk", TORCH_BOX(&seqrec_fast::catalogue_topk));
  m.impl("catalogue_pack_int8", TORCH_BOX(&seqrec_fast::catalogue_pack_int8));
  m.impl("catalogue_topk_packed", TORCH_BOX(&seqrec_fast::catalogue_topk_packed));
}
