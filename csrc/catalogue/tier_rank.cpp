// catalogue_rank for one CPU tier: this file is compiled once per tier, with SEQREC_TIER naming its namespace.
#include "catalogue/rank_exclude.h"
#include "catalogue/rank_scan.h"

namespace seqrec_fast::SEQREC_TIER {
namespace {

void target_scores(const RankCall& call, int64_t begin, int64_t end) {
  with_format(call.format, [&](auto element) {
    using T = decltype(element);
    double score[kPairs];
    for (int64_t first = begin; first < end; first += kPairs) {
      const int n = static_cast<int>(least(kPairs, end - first));
      Pairs<T> batch{call, {}, {}};
      for (int j = 0; j < n; ++j) {
        batch.row[j] = call.rows[first + j];
        batch.item[j] = static_cast<const int64_t*>(call.target.data)[batch.row[j] * call.target.stride];
      }
      batch.score(n, score);
      for (int j = 0; j < n; ++j) call.goal[first + j] = score[j] == score[j] ? score[j] : -__builtin_inf();
    }
  });
}

int64_t excluded_above(const RankCall& call, int64_t index, float* query, int64_t* above, int64_t* bad) {
  const IdLists& lists = call.excluded;
  const int64_t row = call.rows[index];
  const int64_t begin = lists.begin ? id_at(lists.begin, lists.begin_is_64, row) : row * lists.width;
  const int64_t end = lists.begin ? id_at(lists.begin, lists.begin_is_64, row + 1) : begin + lists.width;
  return with_format(call.format, [&](auto element) {
    using T = decltype(element);
    if (lists.ids_are_64)
      return list_above<T>(call, index, static_cast<const int64_t*>(lists.ids), begin, end, query, above, bad);
    return list_above<T>(call, index, static_cast<const int32_t*>(lists.ids), begin, end, query, above, bad);
  });
}

void count(const RankCall& call, const ScanPlan& plan, int64_t first_row, int64_t num_rows, int64_t first_item,
           int64_t num_items, void* scratch) {
  with_format(call.format, [&](auto element) {
    using T = decltype(element);
    Task<T> task{call, plan, {}, first_row, num_rows};
    carve(call, plan, scratch, task.s);
    task.run(first_item, first_item + num_items);
  });
}

}  // namespace

const RankKernels rank_kernels = {make_plan, target_scores, excluded_above, count};

}  // namespace seqrec_fast::SEQREC_TIER
