// The cut of a ranking scan into tasks, and the threads that do them.
#pragma once

#include <atomic>
#include <cstring>

#include "catalogue/cpu_arguments.h"

namespace seqrec_fast {

// Groups of rows × runs of chunks, about eight a thread so that a thread that was held up does little of the rest.
struct TaskCut {
  int64_t groups, chunks, threads, runs;

  TaskCut(const LogitCall& call, const ScanPlan& plan, int64_t num_rows) {
    groups = (num_rows + plan.group_rows - 1) / plan.group_rows;
    chunks = std::max<int64_t>((call.num_items + plan.chunk_items - 1) / plan.chunk_items, 1);
    const int64_t lanes = std::max<int64_t>(num_rows, 16);  // a row alone costs as much as a register of them
    const double products =
        static_cast<double>(lanes) * static_cast<double>(call.num_items) * static_cast<double>(call.width + 8);
    const int64_t available = static_cast<int64_t>(torch::stable::get_num_threads());
    threads = std::clamp<int64_t>(static_cast<int64_t>(products / kProductsPerThread), 1, available);
    runs = std::clamp<int64_t>(threads == 1 ? 1 : (8 * threads + groups - 1) / groups, 1, chunks);
  }

  // Calls work(group, first chunk, number of chunks, scratch). Threads take the next task as they finish one. The
  // scratch of a thread is 64-byte aligned, and its first 64 bytes are zero at first.
  template <class Work>
  void run(int64_t scratch_bytes, const Work& work) const {
    std::atomic<int64_t> next{0};
    std::atomic<bool> out_of_memory{false};
    torch::stable::parallel_for(0, threads, 1, [&](int64_t first_thread, int64_t last_thread) {
      if (first_thread >= last_thread) return;
      const KeepDenormals keep;
      const Memory scratch = allocate(scratch_bytes);
      if (!scratch) {
        out_of_memory = true;
        return;
      }
      std::memset(scratch.get(), 0, 64);
      for (int64_t task = next.fetch_add(1); task < groups * runs; task = next.fetch_add(1)) {
        const int64_t group = task / runs, run = task % runs;
        const int64_t first = chunks * run / runs, last = chunks * (run + 1) / runs;
        work(group, first, last - first, scratch.get());
      }
    });
    if (out_of_memory) throw std::bad_alloc();
  }
};

}  // namespace seqrec_fast
