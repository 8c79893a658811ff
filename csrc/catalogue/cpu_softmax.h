// Softmax over the catalogue on the CPU: how its forward and backward are cut into tasks.
#pragma once

#include "catalogue/cpu_tasks.h"
#include "catalogue/softmax_call.h"

namespace seqrec_fast {

// A tensor in fp32: of rows, or of a number for each item.
inline Tensor wide(const Tensor& tensor) {
  return torch::stable::contiguous(torch::stable::to(tensor, ScalarType::Float));
}
inline const float* floats(const Tensor& tensor) { return static_cast<const float*>(data_of(tensor)); }

// Lists of ids by row, ascending: made from padded or compressed ones, and checked on the way.
class SortedHolder {
 public:
  SortedHolder() = default;
  // slots: also where in the given list each id stood. rows: those that lists are made of, null for all; the others'
  // ids are checked too.
  SortedHolder(const LogitArguments& a, const char* name, const IdLists& from, bool slots,
               const std::vector<int64_t>* rows = nullptr);

  SortedLists lists() const { return {ids_.data(), begin_.empty() ? nullptr : begin_.data()}; }
  const int64_t* slots() const { return slots_.data(); }

 private:
  std::vector<int64_t> ids_, begin_, slots_;
};

// Pairs that no exclusion touches, as lists by row of the query.
struct KeptPairs {
  IdLists lists;                               // no ids: none
  const std::vector<int64_t>* rows = nullptr;  // ascending: the rows that take part; null: all
};

// One softmax over the catalogue, before it is cut into heads.
struct Softmax {
  Softmax(const LogitArguments& arguments, const std::optional<Tensor>& values, int64_t num_heads,
          const KeptPairs& kept_pairs);

  SoftmaxCall head(int64_t h) const;

  LogitArguments arguments;
  std::optional<Tensor> values;
  int64_t num_heads;
  Logits logits;
  SortedHolder excluded, kept;
  SoftmaxCall all;  // the widths of a head, the data of the first

 private:
  void take_rows(const std::vector<int64_t>& rows);

  Tensor query_rows_, scale_rows_;
};

struct ForwardCut {
  ForwardCut(const SoftmaxCall& call, bool context, int64_t available_threads);
  int64_t bytes() const;

  int64_t threads;
  SoftmaxPlan plan;
  int64_t groups, runs;  // of leaves
  int64_t floats;        // that the sums of one group and run take
};

struct BackwardCut {
  BackwardCut(const SoftmaxCall& call, const SoftmaxGradient& gradient, int64_t available_threads);
  int64_t bytes() const;

  SoftmaxPlan plan;
  int64_t threads, runs, padded_rows;
  int64_t row_bytes, sum_bytes;  // of a prepared row; of one run's sums over items
};

void softmax_forward(const SoftmaxCall& call, const SoftmaxResults& results, bool context, float* kept_score);

// direction_sums: [B, d] Σᵢ ds·k_i of this head where gradient.query. skipped: [B] the mass left out; null where
// nothing may be.
void softmax_backward(const SoftmaxCall& call, const SoftmaxGradient& gradient, float* direction_sums, float* skipped);

}  // namespace seqrec_fast
