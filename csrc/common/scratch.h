// Lays arrays out one after another in a piece of memory, each from a new cache line on.
#pragma once

#include <stdint.h>

namespace seqrec_fast::SEQREC_TIER {

class Layout {
 public:
  explicit Layout(void* memory) : begin_((uintptr_t)memory), end_(begin_) {}  // null to count only
  template <class V>
  V* take(int64_t count) {
    const uintptr_t at = end_;
    end_ += (count * sizeof(V) + 63) / 64 * 64;
    return (V*)at;
  }
  int64_t bytes() const { return (int64_t)(end_ - begin_); }

 private:
  uintptr_t begin_, end_;
};

}  // namespace seqrec_fast::SEQREC_TIER
