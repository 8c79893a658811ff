// The arguments that every catalogue operator takes, on their way from torch to the kernels: checked as far as memory
// safety needs it (the public functions have checked, and say it better), and given as plain data.
#pragma once

#include <algorithm>
#include <memory>
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

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Results are the same everywhere, so a thread that was told to flush denormals (torch.set_flush_denormal) stops doing
// so here.
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

struct FreeAligned {
  void operator()(void* memory) const { ::operator delete(memory, std::align_val_t{64}); }
};
using Memory = std::unique_ptr<void, FreeAligned>;

// Of a whole number of cache lines; null where there is none left.
inline Memory allocate(int64_t bytes) {
  return Memory(::operator new(static_cast<size_t>(bytes), std::align_val_t{64}, std::nothrow));
}

inline const void* data_of(const Tensor& tensor) { return check_allocated(tensor.const_data_ptr(), tensor.numel()); }
inline MatrixView matrix(const Tensor& tensor) { return {data_of(tensor), tensor.stride(0), tensor.stride(1)}; }
inline VectorView vector(const Tensor& tensor) { return {data_of(tensor), tensor.stride(0)}; }

inline int64_t integer(const void* data, bool is_64, int64_t i) {
  return is_64 ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
}
inline bool is_64(const Tensor& ids) { return ids.scalar_type() == ScalarType::Long; }

struct Range {
  int64_t begin, end;
};
inline Range list_of(const IdLists& lists, int64_t row) {
  if (!lists.begin) return {row * lists.width, (row + 1) * lists.width};
  return {integer(lists.begin, lists.begin_is_64, row), integer(lists.begin, lists.begin_is_64, row + 1)};
}

struct LogitArguments {
  const char* operation;  // for the messages
  Tensor query, items;
  double scale;
  std::optional<Tensor> row_scale, bias, exclude, exclude_crow;

  void check() const {
    check_value(query.dim() == 2 && items.dim() == 2 && query.size(1) == items.size(1), operation,
                ": query [B, d] and items [I, d] must be matrices of one width");
    check_value(items.scalar_type() == query.scalar_type(), operation, ": query and items must share one dtype");
    check_value(!row_scale || (row_scale->dim() == 1 && row_scale->size(0) == query.size(0)), operation,
                ": scale must have one entry per row");
    check_value(!bias || (bias->dim() == 1 && bias->size(0) == items.size(0)), operation,
                ": bias must have one entry per item");
    for (const auto& option : {row_scale, bias})
      check_value(!option || option->scalar_type() == query.scalar_type() || option->scalar_type() == ScalarType::Float,
                  operation, ": scale and bias must have the query's dtype");
    if (exclude) check_lists("exclude", *exclude, exclude_crow);
  }

  Format format(const Tensor& tensor) const {
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
    throw std::invalid_argument(message(operation, ": query must be float16, bfloat16, float32 or float64"));
  }

  void check_integer(const char* name, const Tensor& ids) const {
    check_value(is_64(ids) || ids.scalar_type() == ScalarType::Int, operation, ": ", name, " must be int64 or int32");
  }

  // [B, n] or [n] padded with -1, or in CSR form the ids and where each row's begin.
  void check_lists(const char* name, const Tensor& ids, const std::optional<Tensor>& crow) const {
    const int64_t rows = query.size(0);
    check_integer(name, ids);
    if (!crow) {
      check_value(ids.dim() == 1 || (ids.dim() == 2 && ids.size(0) == rows), operation, ": ", name,
                  " must have shape [B, n] or [n]");
      return;
    }
    check_integer(name, *crow);
    check_value(ids.dim() == 1 && crow->dim() == 1 && crow->size(0) == rows + 1, operation, ": ", name,
                " in CSR form needs B + 1 row pointers");
    const Tensor begin = torch::stable::contiguous(*crow);
    const int64_t count = ids.size(0);
    int64_t former = 0;
    for (int64_t r = 0; r <= rows; ++r) {
      const int64_t here = integer(data_of(begin), is_64(begin), r);
      const bool rises = r == 0 ? here == 0 : here >= former && (r < rows ? here <= count : here == count);
      check_value(rises, operation, ": ", name,
                  " is not a valid sparse_csr matrix: its row pointers must rise from 0 to ", count);
      former = here;
    }
  }

  [[noreturn]] void bad_id(const char* name, bool padded, int64_t id) const {
    const std::string range = items.size(0) ? message("0…", items.size(0) - 1) : "an empty catalogue, which has none";
    throw std::out_of_range(message(operation, ": ", name, " must hold item ids in ", range,
                                    padded ? ", or -1 for padding" : "", ", got ", id));
  }

  void check_id(const char* name, bool padded, int64_t id) const {
    if (id < (padded ? -1 : 0) || id >= items.size(0)) bad_id(name, padded, id);
  }
};

// Contiguous lists by row, and what keeps them alive.
struct ListHolder {
  Tensor ids, begin;
  IdLists lists;

  ListHolder() = default;
  ListHolder(const Tensor& given, const std::optional<Tensor>& crow) : ids(torch::stable::contiguous(given)) {
    lists.ids = data_of(ids);
    lists.ids_are_64 = is_64(ids);
    if (crow) {
      begin = torch::stable::contiguous(*crow);
      lists.begin = data_of(begin);
      lists.begin_is_64 = is_64(begin);
    } else {
      lists.width = ids.dim() == 1 ? 1 : ids.size(1);
    }
  }
};

// The arguments as plain data. Keeps the contiguous copies alive, where they had to be made.
class Logits {
 public:
  explicit Logits(const LogitArguments& a) {
    call.format = a.format(a.query);
    call.width = a.query.size(1);
    call.num_items = a.items.size(0);
    call.query = matrix(a.query);
    call.items = matrix(a.items);
    call.scale = a.scale;
    if (a.row_scale) call.row_scale = vector(*a.row_scale);
    if (a.bias) call.bias = vector(*a.bias);
    if (a.exclude && a.exclude->dim() == 1 && !a.exclude_crow) {
      skip(a);
      call.skipped = skipped_.data();
      call.num_skipped = static_cast<int64_t>(skipped_.size());
    } else if (a.exclude && a.exclude->numel() > 0) {
      holder_ = ListHolder(*a.exclude, a.exclude_crow);
      call.excluded = holder_.lists;
    }
  }
  Logits(const Logits&) = delete;

  LogitCall call;

 private:
  // A list for every row alike: ascending, each id once.
  void skip(const LogitArguments& a) {
    const Tensor list = torch::stable::contiguous(*a.exclude);
    for (int64_t i = 0; i < list.size(0); ++i) {
      const int64_t id = integer(data_of(list), is_64(list), i);
      a.check_id("exclude", true, id);
      if (id != -1) skipped_.push_back(id);
    }
    std::sort(skipped_.begin(), skipped_.end());
    skipped_.erase(std::unique(skipped_.begin(), skipped_.end()), skipped_.end());
  }

  std::vector<int64_t> skipped_;
  ListHolder holder_;
};

// About 10 µs of scanning: less than that is not worth waking a thread for.
constexpr int64_t kProductsPerThread = int64_t{1} << 20;

}  // namespace seqrec_fast
