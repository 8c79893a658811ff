// From arrays of numbers to the operands of tile products. A number becomes the sum of up to three bf16 parts, each the
// rounding of what the ones before it left; three parts hold fp32 exactly. Then A·B is a sum of products of parts, of
// which those below the rounding error of the sum are left out (with more than one part an infinite number makes NaN:
// its product with a part that is 0):
//
//   parts   products   error of one product, relative
//     1        1       2^-8    bf16 and `medium`; exact where both factors are bf16
//     2        3       2^-16   `high`, fp16
//     3        6       2^-24   `highest`
#pragma once

#include "lanes.h"
#include "tiles.h"

#if defined(SEQREC_TILES)
namespace seqrec_fast::SEQREC_TIER {

constexpr int64_t kTileRows = 16, kTileDepth = 32;

SEQREC_INLINE int64_t tile_count(int64_t size, int64_t of) { return (size + of - 1) / of; }

// bf16 in the low halves.
SEQREC_INLINE U32 bf16_part(F32 x) { return (U32)_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)x)); }

// What `part` leaves of x; 0 where it is infinite or NaN, for then the part says everything.
SEQREC_INLINE F32 bf16_rest(F32 x, U32 part) {
  const F32 rounded = (F32)(part << 16);
  const __mmask16 finite = ~_mm512_fpclass_ps_mask((__m512)rounded, 0x99);  // NaNs and infinities
  return (F32)_mm512_maskz_sub_ps(finite, (__m512)x, (__m512)rounded);
}

// images[part].row[row][·] = parts of 32 consecutive numbers: a row of a left operand.
template <int kParts>
SEQREC_INLINE void put_row(F32 first, F32 second, TileImage* images, int row) {
#pragma GCC unroll 3
  for (int part = 0; part < kParts; ++part) {
    const U32 a = bf16_part(first), b = bf16_part(second);
    __m256i* const to = (__m256i*)images[part].row[row];
    _mm256_store_si256(to, _mm512_cvtepi32_epi16((__m512i)a));
    _mm256_store_si256(to + 1, _mm512_cvtepi32_epi16((__m512i)b));
    first = bf16_rest(first, a);
    second = bf16_rest(second, b);
  }
}

// images[part].row[row][n] = parts of even[n] and odd[n]: a row of a right operand.
template <int kParts>
SEQREC_INLINE void put_pairs(F32 even, F32 odd, TileImage* images, int row) {
#pragma GCC unroll 3
  for (int part = 0; part < kParts; ++part) {
    const U32 a = bf16_part(even), b = bf16_part(odd);
    store((int32_t*)images[part].row[row], (I32)(a | b << 16));
    even = bf16_rest(even, a);
    odd = bf16_rest(odd, b);
  }
}

// Left operand ↔ right operand of the same numbers.
SEQREC_INLINE void transpose(TileImage& image) {
  F32 rows[16];
  for (int i = 0; i < 16; ++i) rows[i] = load((const float*)image.row[i]);
  transpose(rows);
  for (int i = 0; i < 16; ++i) store((float*)image.row[i], rows[i]);
}

// Up to 16 numbers, 0 beyond them.
template <class P>
SEQREC_INLINE F32 load_up_to(const P* p, int64_t count) {
  if (count >= kLanes) return load(p);
  return count > 0 ? load_first(p, (int)count) : F32{};
}

// Row `row` of ⌈depth/32⌉ left operands, each of kParts images.
template <int kParts, class P>
SEQREC_INLINE void put_left_row(const P* from, int64_t depth, TileImage* images, int row) {
  int64_t k = 0;
  for (; k + kTileDepth <= depth; k += kTileDepth, images += kParts)
    put_row<kParts>(load(from + k), load(from + k + kLanes), images, row);
  if (k < depth)
    put_row<kParts>(load_up_to(from + k, depth - k), load_up_to(from + k + kLanes, depth - k - kLanes), images, row);
}

// One chunk of up to 32 × 16 numbers b[k][n], n along the memory, as a right operand. Rows and columns beyond are 0.
template <int kParts, class P>
SEQREC_INLINE void put_right(const P* from, int64_t stride, int64_t depth, int64_t columns, TileImage* images) {
  for (int64_t k = 0; k < kTileDepth; k += 2)
    put_pairs<kParts>(load_up_to(from + k * stride, k < depth ? columns : 0),
                      load_up_to(from + (k + 1) * stride, k + 1 < depth ? columns : 0), images, (int)(k / 2));
}

// The same of numbers b[n][k], k along the memory.
template <int kParts, class P>
SEQREC_INLINE void put_right_transposed(const P* from, int64_t stride, int64_t depth, int64_t columns,
                                        TileImage* images) {
  for (int64_t n = 0; n < kTileRows; ++n)
    put_row<kParts>(load_up_to(from + n * stride, n < columns ? depth : 0),
                    load_up_to(from + n * stride + kLanes, n < columns ? depth - kLanes : 0), images, (int)n);
  for (int part = 0; part < kParts; ++part) transpose(images[part]);
}

// ---- products of parts ----------------------------------------------------------------------------------------------

struct PartPair {
  int left, right;
};
// In an order in which each product shares an operand with the one before it, smaller products first.
template <int kParts>
struct PartPairs;
template <>
struct PartPairs<1> {
  static constexpr int kCount = 1;
  static constexpr PartPair kList[kCount] = {{0, 0}};
};
template <>
struct PartPairs<2> {
  static constexpr int kCount = 3;
  static constexpr PartPair kList[kCount] = {{0, 1}, {0, 0}, {1, 0}};
};
template <>
struct PartPairs<3> {
  static constexpr int kCount = 6;
  static constexpr PartPair kList[kCount] = {{0, 2}, {0, 1}, {1, 1}, {1, 0}, {2, 0}, {0, 0}};
};

// The accumulators of kGroups × kColumns sums (at most four): group r, column n in tile n·kGroups + r.
template <int kGroups, int kColumns>
struct TileSquare {
  static_assert(kGroups * kColumns <= 4 && kGroups <= 2);

  // += left operands (of each group: `left` and the images left_stride further on) · right operands (of each column),
  // over `chunks` chunks of kParts images; only the columns of which kPresent has a bit. Right operands ahead_bytes
  // further on will be next.
  template <int kParts, int kPresent = (1 << kColumns) - 1>
  SEQREC_INLINE void multiply(TileScope& tiles, const TileImage* left, int64_t left_stride,
                              const TileImage* const (&right)[kColumns], int64_t chunks,
                              [[maybe_unused]] int64_t ahead_bytes) {
#if defined(SEQREC_TILES_OF_DOTS)
    static_assert(kParts == 1);
    const void* from[kColumns];
    for (int n = 0; n < kColumns; ++n) from[n] = right[n];
    tiles.template multiply_all<kGroups, kColumns, kPresent>(left, left_stride * (int64_t)sizeof(TileImage), from,
                                                             chunks, ahead_bytes);
#else
    for (int64_t i = 0; i < chunks * kParts; i += kParts) {
      const TileImage* here[kColumns];
#pragma GCC unroll 4
      for (int n = 0; n < kColumns; ++n) here[n] = kPresent >> n & 1 ? right[n] + i : nullptr;
      multiply_chunk<kParts, kPresent>(tiles, left + i, left_stride, here);
    }
#endif
  }

#if !defined(SEQREC_TILES_OF_DOTS)
 private:
  // All products of parts of one chunk.
  template <int kParts, int kPresent, int kPair = 0>
  SEQREC_INLINE void multiply_chunk(TileScope& tiles, const TileImage* left, int64_t left_stride,
                                    const TileImage* const (&right)[kColumns]) {
    constexpr PartPair pair = PartPairs<kParts>::kList[kPair];
    constexpr PartPair former = kPair > 0 ? PartPairs<kParts>::kList[kPair - 1] : PartPair{-1, -1};
    if constexpr (pair.left != former.left) {
      tiles.load<4>(left + pair.left, 64);
      if constexpr (kGroups > 1) tiles.load<5>(left + left_stride + pair.left, 64);
    }
    // More than two columns do not all have a register; they are read again for every product.
    columns<kPresent, 0, kColumns <= 2 && pair.right == former.right>(tiles, right, pair.right);
    if constexpr (kPair + 1 < PartPairs<kParts>::kCount)
      multiply_chunk<kParts, kPresent, kPair + 1>(tiles, left, left_stride, right);
  }

  template <int kPresent, int kColumn, bool kLoaded>
  SEQREC_INLINE void columns(TileScope& tiles, const TileImage* const (&right)[kColumns], int part) {
    if constexpr ((kPresent >> kColumn & 1) != 0) {
      if constexpr (!kLoaded) tiles.load<6 + kColumn % 2>(right[kColumn] + part, 64);
      tiles.multiply<kColumn * kGroups, 4, 6 + kColumn % 2>();
      if constexpr (kGroups > 1) tiles.multiply<kColumn * kGroups + 1, 5, 6 + kColumn % 2>();
    }
    if constexpr (kColumn + 1 < kColumns) columns<kPresent, kColumn + 1, kLoaded>(tiles, right, part);
  }
#endif
};

}  // namespace seqrec_fast::SEQREC_TIER
#endif
