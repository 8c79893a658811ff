// The tile registers of tiles.h where a processor has products of bf16 pairs (AVX512_BF16) but no tiles: sums are kept
// in memory, which stays in L1, and operands where they lie.
#pragma once

#include "vector.h"

namespace seqrec_fast::SEQREC_TIER {

// sums[column][row] += left[row] · right[column] for kRows × kColumns registers, over `chunks` images of 16 pairs each.
// Meanwhile a line at `ahead` is asked for every other step.
template <int kRows, int kColumns>
__attribute__((noinline)) static void multiply_rows(float (*const (&sums)[kColumns])[16], const int32_t* left,
                                                    const int32_t* const (&right)[kColumns], int64_t chunks,
                                                    const char* ahead) {
  F32 total[kRows][kColumns];
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 4
    for (int column = 0; column < kColumns; ++column) total[row][column] = load(sums[column][row]);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const int32_t* const rows = left + chunk * 256;
    for (int k = 0; k < 16; ++k) {
      if (k % 2 == 0) __builtin_prefetch(ahead + (chunk * 8 + k / 2) * 64, 0, 2);
      __m512bh pairs[kColumns];
#pragma GCC unroll 4
      for (int column = 0; column < kColumns; ++column)
        pairs[column] = (__m512bh)load(right[column] + chunk * 256 + k * 16);
#pragma GCC unroll 8
      for (int row = 0; row < kRows; ++row) {
        const __m512bh factor = (__m512bh)broadcast(rows[row * 16 + k]);
#pragma GCC unroll 4
        for (int column = 0; column < kColumns; ++column)
          total[row][column] = (F32)_mm512_dpbf16_ps((__m512)total[row][column], factor, pairs[column]);
      }
    }
  }
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 4
    for (int column = 0; column < kColumns; ++column) store(sums[column][row], total[row][column]);
}

class TileScope {
 public:
  explicit TileScope(int64_t rows = 16) : rows_(rows < 16 ? (int)rows : 16) {}
  TileScope(const TileScope&) = delete;

  template <int kTile>
  void zero() {
    for (int row = 0; row < rows_; ++row) store_row(kTile, row, F32{});
  }
  // Rows are `stride` bytes apart.
  template <int kTile>
  void load(const void* from, int64_t stride) {
    for (int row = 0; row < rows_; ++row)
      store_row(kTile, row, SEQREC_TIER::load((const float*)((const char*)from + row * stride)));
  }
  template <int kTile>
  void store(void* to, int64_t stride) const {
    for (int row = 0; row < rows_; ++row)
      SEQREC_TIER::store((float*)((char*)to + row * stride), SEQREC_TIER::load(sums_[kTile][row]));
  }

  // Sum n·kGroups + g += left operand of group g · right operand of column n, for each column of which kPresent has a
  // bit, over `chunks` images that follow one another. The images ahead_bytes further on will be next, and are fetched:
  // a weight that does not fit L2 passes by once for 32 rows.
  template <int kGroups, int kColumns, int kPresent>
  void multiply_all(const void* left, int64_t group_bytes, const void* const (&right)[kColumns], int64_t chunks,
                    int64_t ahead_bytes) {
    constexpr int kCount = __builtin_popcount(kPresent);
    // 16 sums hide the latency of a product, and leave registers for the operands.
    constexpr int kRows = kCount == 1 ? 8 : kCount == 2 ? 8 : 4;
    // Four calls fetch the next two columns.
    const char* ahead = (const char*)right[__builtin_ctz(kPresent)] + ahead_bytes;
    const auto multiply = [&]<int kCalled>(int group, int row) {
      float (*sums[kCount])[16];
      const int32_t* columns[kCount];
      for (int column = 0, next = 0; column < kColumns; ++column)
        if (kPresent >> column & 1) {
          sums[next] = sums_[column * kGroups + group] + row;
          columns[next++] = (const int32_t*)right[column];
        }
      const int32_t* const rows = (const int32_t*)((const char*)left + group * group_bytes);
      multiply_rows<kCalled, kCount>(sums, rows + row * 16, columns, chunks, ahead);
      ahead += chunks * 8 * 64;
    };
    for (int group = 0; group < kGroups; ++group) {
      int row = 0;
      for (; row + kRows <= rows_; row += kRows) multiply.template operator()<kRows>(group, row);
      for (; row + 2 <= rows_; row += 2) multiply.template operator()<2>(group, row);
      for (; row < rows_; ++row) multiply.template operator()<1>(group, row);
    }
  }

 private:
  void store_row(int tile, int row, F32 sum) { SEQREC_TIER::store(sums_[tile][row], sum); }

  alignas(64) float sums_[4][16][16];
  int rows_;
};

}  // namespace seqrec_fast::SEQREC_TIER
