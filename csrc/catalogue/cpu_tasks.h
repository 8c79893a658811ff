// Work that is cut into tasks, which threads take one after another: one that was held up does little of the rest.
#pragma once

#include <atomic>
#include <cstring>

#include "catalogue/cpu_arguments.h"

namespace seqrec_fast {

// How many threads `products` multiply-adds are worth.
inline int64_t threads_for(double products) {
  const int64_t available = static_cast<int64_t>(torch::stable::get_num_threads());
  return std::clamp<int64_t>(static_cast<int64_t>(products / static_cast<double>(kProductsPerThread)), 1, available);
}

// Calls work(task, scratch) for every task; a thread's scratch stays the same, and its first 64 bytes are zero at
// first.
template <class Work>
void share_tasks(int64_t tasks, int64_t threads, int64_t scratch_bytes, const Work& work) {
  std::atomic<int64_t> next{0};
  std::atomic<bool> out_of_memory{false};
  torch::stable::parallel_for(0, std::min(threads, tasks), 1, [&](int64_t begin, int64_t end) {
    if (begin >= end) return;
    const KeepDenormals keep;
    const Memory scratch = allocate(std::max<int64_t>(scratch_bytes, 64));
    if (!scratch) {
      out_of_memory = true;
      return;
    }
    std::memset(scratch.get(), 0, 64);
    for (int64_t task = next.fetch_add(1); task < tasks; task = next.fetch_add(1)) work(task, scratch.get());
  });
  if (out_of_memory) throw std::bad_alloc();
}

// A ranking scan: groups of rows × runs of chunks, about eight a thread.
struct TaskCut {
  int64_t groups, chunks, threads, runs;

  TaskCut(const LogitCall& call, const ScanPlan& plan, int64_t num_rows)
      : TaskCut(call, num_rows, (num_rows + plan.group_rows - 1) / plan.group_rows,
                std::max<int64_t>((call.num_items + plan.chunk_items - 1) / plan.chunk_items, 1)) {}

  TaskCut(const LogitCall& call, int64_t num_rows, int64_t num_groups, int64_t num_chunks)
      : groups(num_groups), chunks(num_chunks) {
    const int64_t lanes = std::max<int64_t>(num_rows, 16);  // a row alone costs as much as a register of them
    threads = threads_for(static_cast<double>(lanes) * static_cast<double>(call.num_items) *
                          static_cast<double>(call.width + 8));
    runs = std::clamp<int64_t>(threads == 1 ? 1 : (8 * threads + groups - 1) / groups, 1, chunks);
  }

  // Calls work(group, first chunk, number of chunks, scratch) for every task.
  template <class Work>
  void run(int64_t scratch_bytes, const Work& work) const {
    share_tasks(groups * runs, threads, scratch_bytes, [&](int64_t task, void* scratch) {
      const int64_t group = task / runs, run = task % runs;
      const int64_t first = chunks * run / runs, last = chunks * (run + 1) / runs;
      work(group, first, last - first, scratch);
    });
  }
};

}  // namespace seqrec_fast
