// catalogue_topk for one CPU tier: this file is compiled once per tier, with SEQREC_TIER naming its namespace.
#include "catalogue/topk_scan.h"

namespace seqrec_fast::SEQREC_TIER {
namespace {

ScanPlan plan(const TopkCall& call) {
  return with_format(call.format, [&](auto element) { return topk_plan<decltype(element)>(call); });
}

void scan(const TopkCall& call, const ScanPlan& plan, int64_t first_row, int64_t num_rows, int64_t first_chunk,
          int64_t num_chunks, const Bar* bars, void* scratch, Found* found) {
  with_format(call.format, [&](auto element) {
    TopkTask<decltype(element)> task(call, plan);
    task.carve(scratch);
    task.run(first_row, num_rows, first_chunk, num_chunks, bars, found);
  });
}

void pack(const LogitCall& call, int64_t first, int64_t count, const PackedItems& to) {
  with_format(call.format, [&](auto element) { pack_items<decltype(element)>(call, first, count, to); });
}

}  // namespace

const TopkKernels topk_kernels = {plan, scan, pack};

}  // namespace seqrec_fast::SEQREC_TIER
