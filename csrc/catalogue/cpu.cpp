// Registration of the catalogue operators on the CPU: checks, the cut into tasks, threads.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <string>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "catalogue/call.h"
#include "common/check.h"

namespace seqrec_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Ranks are the same everywhere, so a thread that was told to flush denormals (torch.set_flush_denormal) stops doing so
// here.
class KeepDenormals {
 public:
#if defined(__x86_64__)
  KeepDenormals() : former_(_mm_getcsr()) { _mm_setcsr(former_ & ~0x8040u); }
  ~KeepDenormals() { _mm_setcsr(former_); }

 private:
  unsigned former_;
#elif defined(__aarch64__)
  KeepDenormals() {
    asm volatile("mrs %0, fpcr" : "=r"(former_));
    asm volatile("msr fpcr, %0" ::"r"(former_ & ~(uint64_t{1} << 24)));
  }
  ~KeepDenormals() { asm volatile("msr fpcr, %0" ::"r"(former_)); }

 private:
  uint64_t former_;
#endif
};

// ---- reading the arguments
// --------------------------------------------------------------------------------------------

Format format_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Format::kF32;
    case ScalarType::Double:
      return Format::kF64;
    case ScalarType::BFloat16:
      return Format::kBF16;
    case ScalarType::Half:
      return Format::kF16;
    default:
      break;
  }
  throw std::invalid_argument("catalogue_rank: query must be float16, bfloat16, float32 or float64");
}

const void* data_of(const Tensor& tensor) { return check_allocated(tensor.const_data_ptr(), tensor.numel()); }
MatrixView matrix(const Tensor& tensor) { return {data_of(tensor), tensor.stride(0), tensor.stride(1)}; }
VectorView vector(const Tensor& tensor) { return {data_of(tensor), tensor.stride(0)}; }

int64_t integer(const void* data, bool is_64, int64_t i) {
  return is_64 ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
}
bool is_64(const Tensor& ids) { return ids.scalar_type() == ScalarType::Long; }

void check_integer(const char* name, const Tensor& ids) {
  check_value(is_64(ids) || ids.scalar_type() == ScalarType::Int, "catalogue_rank: ", name, " must be int64 or int32");
}

[[noreturn]] void bad_id(const char* name, int64_t items, bool padded, int64_t id) {
  const std::string range = items ? message("0…", items - 1) : "an empty catalogue, which has none";
  throw std::out_of_range(message("catalogue_rank: ", name, " must hold item ids in ", range,
                                  padded ? ", or -1 for padding" : "", ", got ", id));
}

// The operator's arguments, checked as far as memory safety needs it (the public function has checked, and says it
// better).
struct Arguments {
  Tensor query, items, target;
  std::optional<Tensor> row_scale, bias, exclude, exclude_crow;

  void check() const {
    check_value(query.dim() == 2 && items.dim() == 2 && query.size(1) == items.size(1),
                "catalogue_rank: query [B, d] and items [I, d] must be matrices of one width");
    check_value(target.dim() == 1 && target.size(0) == query.size(0),
                "catalogue_rank: target must have one id per row");
    check_value(target.scalar_type() == ScalarType::Long, "catalogue_rank: target must be int64");
    const auto same_type = [&](const Tensor& tensor) { return tensor.scalar_type() == query.scalar_type(); };
    check_value(same_type(items) && (!row_scale || same_type(*row_scale)) && (!bias || same_type(*bias)),
                "catalogue_rank: query, items, scale and bias must share one dtype");
    check_value(!row_scale || (row_scale->dim() == 1 && row_scale->size(0) == query.size(0)),
                "catalogue_rank: scale must have one entry per row");
    check_value(!bias || (bias->dim() == 1 && bias->size(0) == items.size(0)),
                "catalogue_rank: bias must have one entry per item");
    if (exclude) check_exclude();
  }

  void check_exclude() const {
    const int64_t rows = query.size(0);
    check_integer("exclude", *exclude);
    if (!exclude_crow) {
      check_value(exclude->dim() == 1 || (exclude->dim() == 2 && exclude->size(0) == rows),
                  "catalogue_rank: exclude must have shape [B, n] or [n]");
      return;
    }
    check_integer("exclude", *exclude_crow);
    check_value(exclude->dim() == 1 && exclude_crow->dim() == 1 && exclude_crow->size(0) == rows + 1,
                "catalogue_rank: exclude in CSR form needs B + 1 row pointers");
    const Tensor crow = torch::stable::contiguous(*exclude_crow);
    const int64_t ids = exclude->size(0);
    int64_t former = 0;
    for (int64_t r = 0; r <= rows; ++r) {
      const int64_t here = integer(data_of(crow), is_64(crow), r);
      const bool rises = r == 0 ? here == 0 : here >= former && (r < rows ? here <= ids : here == ids);
      check_value(rises,
                  "catalogue_rank: exclude is not a valid sparse_csr matrix: its row pointers must rise from 0 to ",
                  ids);
      former = here;
    }
  }
};

// The rows to rank: every target in range, ignored rows left out.
std::vector<int64_t> rows_to_rank(const Arguments& a, int64_t ignore_index) {
  const VectorView target = vector(a.target);
  const int64_t items = a.items.size(0);
  std::vector<int64_t> rows;
  rows.reserve(static_cast<size_t>(a.query.size(0)));
  for (int64_t r = 0; r < a.query.size(0); ++r) {
    const int64_t id = static_cast<const int64_t*>(target.data)[r * target.stride];
    if (id == ignore_index) continue;
    if (id < 0 || id >= items) bad_id("target", items, false, id);
    rows.push_back(r);
  }
  return rows;
}

// A list for every row alike: ascending, each id once.
std::vector<int64_t> shared_ids(const Tensor& exclude, int64_t items) {
  std::vector<int64_t> ids;
  const Tensor list = torch::stable::contiguous(exclude);
  for (int64_t i = 0; i < list.size(0); ++i) {
    const int64_t id = integer(data_of(list), is_64(list), i);
    if (id == -1) continue;
    if (id < 0 || id >= items) bad_id("exclude", items, true, id);
    ids.push_back(id);
  }
  std::sort(ids.begin(), ids.end());
  ids.erase(std::unique(ids.begin(), ids.end()), ids.end());
  return ids;
}

struct Range {
  int64_t begin, end;
};
Range list_of(const IdLists& lists, int64_t row) {
  if (!lists.begin) return {row * lists.width, (row + 1) * lists.width};
  return {integer(lists.begin, lists.begin_is_64, row), integer(lists.begin, lists.begin_is_64, row + 1)};
}

// Lists of ignored rows are not looked at again, but their ids must be valid like any other.
void check_ignored_lists(const RankCall& call, int64_t all_rows) {
  const bool padded = call.excluded.begin == nullptr;
  int64_t next = 0;
  for (int64_t r = 0; r < all_rows; ++r) {
    if (next < call.num_rows && call.rows[next] == r) {
      ++next;
      continue;
    }
    const Range list = list_of(call.excluded, r);
    for (int64_t i = list.begin; i < list.end; ++i) {
      const int64_t id = integer(call.excluded.ids, call.excluded.ids_are_64, i);
      if (id < (padded ? -1 : 0) || id >= call.num_items) bad_id("exclude", call.num_items, padded, id);
    }
  }
}

// ---- work
// -------------------------------------------------------------------------------------------------------------

// About 10 µs of scanning: less than that is not worth waking a thread for.
constexpr int64_t kProductsPerThread = int64_t{1} << 20;

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
void prepare_rows(const RankCall& call, const RankKernels& kernel) {
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
  if (bad_index < call.num_rows) bad_id("exclude", call.num_items, call.excluded.begin == nullptr, bad);
}

struct FreeAligned {
  void operator()(void* memory) const { ::operator delete(memory, std::align_val_t{64}); }
};

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
    const std::unique_ptr<void, FreeAligned> scratch(
        ::operator new(static_cast<size_t>(plan.scratch_bytes), std::align_val_t{64}, std::nothrow));
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
  const Arguments arguments{query, items, target, row_scale, bias, exclude, exclude_crow};
  arguments.check();
  const int64_t batch = query.size(0);
  const std::vector<int64_t> rows = rows_to_rank(arguments, ignore_index);
  std::vector<int64_t> skipped;
  RankCall call;
  call.format = format_of(query);
  call.width = query.size(1);
  call.num_items = items.size(0);
  call.query = matrix(query);
  call.items = matrix(items);
  call.scale = scale;
  if (row_scale) call.row_scale = vector(*row_scale);
  if (bias) call.bias = vector(*bias);
  call.target = vector(target);
  call.rows = rows.data();
  call.num_rows = static_cast<int64_t>(rows.size());

  Tensor lists, begin;  // keep contiguous copies alive, where they had to be made
  if (exclude && exclude->dim() == 1 && !exclude_crow) {
    skipped = shared_ids(*exclude, call.num_items);
    call.skipped = skipped.data();
    call.num_skipped = static_cast<int64_t>(skipped.size());
  } else if (exclude && exclude->numel() > 0) {
    lists = torch::stable::contiguous(*exclude);
    call.excluded.ids = data_of(lists);
    call.excluded.ids_are_64 = is_64(lists);
    if (exclude_crow) {
      begin = torch::stable::contiguous(*exclude_crow);
      call.excluded.begin = data_of(begin);
      call.excluded.begin_is_64 = is_64(begin);
    } else {
      call.excluded.width = lists.size(1);
    }
    check_ignored_lists(call, batch);
  }

  Tensor rank = torch::stable::new_empty(query, {batch}, ScalarType::Long);
  call.rank = rank.mutable_data_ptr<int64_t>();
  std::fill(call.rank, call.rank + batch, int64_t{-1});
  for (const int64_t row : rows) call.rank[row] = 0;
  if (rows.empty()) return rank;
  std::vector<double> goal(rows.size());
  call.goal = goal.data();
  const RankKernels& kernel = SEQREC_CHOSEN_TABLE(rank_kernels);
  prepare_rows(call, kernel);
  count_tasks(call, kernel);
  return rank;
}

}  // namespace
}  // namespace seqrec_fast

STABLE_TORCH_LIBRARY_IMPL(seqrec_fast_native, CPU, m) {
  m.impl("catalogue_rank", TORCH_BOX(&seqrec_fast::catalogue_rank));
}
