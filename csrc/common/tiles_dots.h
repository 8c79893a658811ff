// The tile registers of tiles.h where a processor has products of bf16 pairs (AVX512_BF16) but no tiles: sums are kept
// in memory, which stays in L1, and operands where they lie.
#pragma once

#include "vector.h"

namespace seqrec_fast::SEQREC_TIER {

// sum[row] += left[row] · right for kRows rows of 16 pairs. Of the processor's two loads a cycle, a product takes one
// for its pair of the left operand.
template <int kRows>
__attribute__((noinline)) static void add_pair_products(float (*sum)[16], const int32_t (*left)[16],
                                                        const int32_t (*right)[16]) {
  F32 total[kRows];
#pragma GCC unroll 16
  for (int row = 0; row < kRows; ++row) total[row] = load(sum[row]);
#pragma GCC unroll 2
  for (int k = 0; k < 16; ++k) {
    const __m512bh pairs = (__m512bh)load(right[k]);
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row)
      total[row] = (F32)_mm512_dpbf16_ps((__m512)total[row], (__m512bh)broadcast(left[row][k]), pairs);
  }
#pragma GCC unroll 16
  for (int row = 0; row < kRows; ++row) store(sum[row], total[row]);
}

class TileScope {
 public:
  explicit TileScope(int64_t rows = 16) : rows_(rows < 16 ? (int)rows : 16) {}
  TileScope(const TileScope&) = delete;

  template <int kTile>
  void zero() {
    for (int row = 0; row < rows_; ++row) store_row(kTile, row, F32{});
  }
  // Rows are `stride` bytes apart. An operand must stay as it is until it was multiplied.
  template <int kTile>
  void load(const void* from, int64_t stride) {
    if constexpr (kTile >= 4)
      operands_[kTile - 4] = (const int32_t (*)[16])from;
    else
      for (int row = 0; row < rows_; ++row)
        store_row(kTile, row, SEQREC_TIER::load((const float*)((const char*)from + row * stride)));
  }
  template <int kTile>
  void store(void* to, int64_t stride) const {
    for (int row = 0; row < rows_; ++row)
      SEQREC_TIER::store((float*)((char*)to + row * stride), SEQREC_TIER::load(sums_[kTile][row]));
  }
  // sum += left · right, in fp32.
  template <int kSum, int kLeft, int kRight>
  void multiply() {
    const auto left = operands_[kLeft - 4], right = operands_[kRight - 4];
    if (rows_ == 16) return add_pair_products<16>(sums_[kSum], left, right);
    int row = 0;
    for (; row + 4 <= rows_; row += 4) add_pair_products<4>(sums_[kSum] + row, left + row, right);
    for (; row < rows_; ++row) add_pair_products<1>(sums_[kSum] + row, left + row, right);
  }

 private:
  void store_row(int tile, int row, F32 sum) { SEQREC_TIER::store(sums_[tile][row], sum); }

  alignas(64) float sums_[4][16][16];
  const int32_t (*operands_[4])[16];
  int rows_;
};

}  // namespace seqrec_fast::SEQREC_TIER
