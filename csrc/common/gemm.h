// Two small products on row-major matrices as they lie in memory, nothing packed.
//
//   dots        one row of x with one row of a weight (lanes run along k): x·Wᵀ
//   Product     out[m][n] = Σ_k a(m, k)·b[k][n] with a(m, k) broadcast (lanes run along n): dz·W and dzᵀ·x
//
// The order in which one result is summed depends on k, the lane count and nothing else: not on the tile it falls into,
// so not on the other rows of the batch, nor on how the work is split over threads.
#pragma once

#include "vector.h"
#include "vector_half.h"

namespace seqrec_fast::SEQREC_TIER {

// What a stored value is computed in.
template <class T>
struct Compute {
  using Scalar = float;
  using Vector = F32;
  static constexpr int kWidth = kLanes;
};
template <>
struct Compute<double> {
  using Scalar = double;
  using Vector = F64;
  static constexpr int kWidth = kLanes64;
};
template <class T>
using Vector = typename Compute<T>::Vector;

// Registers: 32 of AVX-512 and Arm hold 6 × 4 accumulators and their operands, 16 of AVX2 hold 3 × 4 (or 6 × 2).
// Without a fused instruction the product needs a register of its own.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kDotRows = 6;
constexpr int kProductVectors = 4;
#elif defined(__AVX2__)
constexpr int kDotRows = 3;
constexpr int kProductVectors = 2;
#else
constexpr int kDotRows = 2;
constexpr int kProductVectors = 2;
#endif
constexpr int kProductRows = 6;

// ---- dots
// -------------------------------------------------------------------------------------------------------------

// acc[r][4g + j] += x_r · (row j of weight block g), lane by lane; a lane takes every kLanes-th k.
template <int kRows, int kBlocks, class X, class T>
SEQREC_INLINE void accumulate_dots(Vector<T> (&acc)[kRows][4 * kBlocks], const X* x, int64_t x_stride,
                                   const T* const (&weight)[kBlocks], int64_t weight_stride, int64_t depth) {
  constexpr int kWidth = Compute<T>::kWidth;
  int64_t k = 0;
  for (; k + kWidth <= depth; k += kWidth) {
    Vector<T> xs[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) xs[r] = load(x + r * x_stride + k);
#pragma GCC unroll 4
    for (int g = 0; g < kBlocks; ++g) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const Vector<T> w = load(weight[g] + j * weight_stride + k);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) acc[r][4 * g + j] = fma(xs[r], w, acc[r][4 * g + j]);
      }
    }
  }
  if (k == depth) return;
  const int rest = (int)(depth - k);
  Vector<T> xs[kRows];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) xs[r] = load_first(x + r * x_stride + k, rest);
#pragma GCC unroll 4
  for (int g = 0; g < kBlocks; ++g) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const Vector<T> w = load_first(weight[g] + j * weight_stride + k, rest);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) acc[r][4 * g + j] = fma(xs[r], w, acc[r][4 * g + j]);
    }
  }
}

// out[0..3] = the lane sums of a, b, c, d. A transposing tree: cheaper than four reductions.
SEQREC_INLINE void store_sums(float* out, F32 a, F32 b, F32 c, F32 d) {
#if defined(__AVX512F__)
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps((__m512)a, (__m512)b), _mm512_unpackhi_ps((__m512)a, (__m512)b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps((__m512)c, (__m512)d), _mm512_unpackhi_ps((__m512)c, (__m512)d));
  const __m512 quads = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(quads),
                                    _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(quads), 1)));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
#elif defined(__AVX2__)
  const __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps((__m256)a, (__m256)b), _mm256_unpackhi_ps((__m256)a, (__m256)b));
  const __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps((__m256)c, (__m256)d), _mm256_unpackhi_ps((__m256)c, (__m256)d));
  const __m256 quads = _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(quads), _mm256_extractf128_ps(quads, 1)));
#elif defined(__SSE2__)
  const __m128 ab = _mm_add_ps(_mm_unpacklo_ps((__m128)a, (__m128)b), _mm_unpackhi_ps((__m128)a, (__m128)b));
  const __m128 cd = _mm_add_ps(_mm_unpacklo_ps((__m128)c, (__m128)d), _mm_unpackhi_ps((__m128)c, (__m128)d));
  _mm_storeu_ps(out, _mm_add_ps(_mm_movelh_ps(ab, cd), _mm_movehl_ps(cd, ab)));
#else
  out[0] = reduce_add(a);
  out[1] = reduce_add(b);
  out[2] = reduce_add(c);
  out[3] = reduce_add(d);
#endif
}
SEQREC_INLINE void store_sums(double* out, F64 a, F64 b, F64 c, F64 d) {
  out[0] = reduce_add(a);
  out[1] = reduce_add(b);
  out[2] = reduce_add(c);
  out[3] = reduce_add(d);
}

// sum + a·b for the operands of a Product.
template <class T>
SEQREC_INLINE Vector<T> multiply_add(Vector<T> a, Vector<T> b, Vector<T> sum) {
  return fma(a, b, sum);
}

// ---- Product
// ----------------------------------------------------------------------------------------------------------

// A sum over k is cut into chains of this length (of pairs, where operands are pairs), added in order: rounding errors
// grow with the chain, not with the batch.
constexpr int64_t kChain = 256;

template <class T, class Out = T>
struct Product {
  using Operand = T;
  const typename Compute<T>::Scalar* a;  // a(m, k) = a[m·a_row + k·a_step]
  int64_t a_row, a_step;
  const T* b;  // [depth, columns], contiguous
  Out* out;    // [rows, columns], contiguous
  int64_t rows, columns, depth;
  bool accumulate = false;  // add to what is in out
};

// kRows × kVectors registers of results. kPartial: the last vector has only `last` lanes.
template <int kRows, int kVectors, bool kPartial, class T, class Out>
SEQREC_INLINE void product_tile(const Product<T, Out>& p, int64_t row, int64_t column, int last) {
  constexpr int kWidth = Compute<T>::kWidth;
  Vector<T> total[kRows][kVectors] = {};
  for (int64_t begin = 0; begin < p.depth; begin += kChain) {
    const int64_t end = begin + kChain < p.depth ? begin + kChain : p.depth;
    Vector<T> acc[kRows][kVectors] = {};
    const T* b = p.b + begin * p.columns + column;
    const auto* a = p.a + row * p.a_row + begin * p.a_step;
    for (int64_t k = begin; k < end; ++k, b += p.columns, a += p.a_step) {
      Vector<T> bs[kVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v)
        bs[v] = kPartial && v == kVectors - 1 ? load_first(b + v * kWidth, last) : load(b + v * kWidth);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const Vector<T> factor = broadcast(a[r * p.a_row]);
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) acc[r][v] = multiply_add<T>(factor, bs[v], acc[r][v]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) total[r][v] = begin == 0 ? acc[r][v] : total[r][v] + acc[r][v];
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      Out* out = p.out + (row + r) * p.columns + column + v * kWidth;
      if (kPartial && v == kVectors - 1)
        store_first(out, last, p.accumulate ? load_first(out, last) + total[r][v] : total[r][v]);
      else
        store(out, p.accumulate ? load(out) + total[r][v] : total[r][v]);
    }
}

template <int kVectors, bool kPartial, class T, class Out>
SEQREC_INLINE void product_rows(const Product<T, Out>& p, int64_t row, int64_t height, int64_t column, int last) {
  static_assert(kProductRows == 6);
  switch (p.rows - row < height ? p.rows - row : height) {
    case 1:
      return product_tile<1, kVectors, kPartial>(p, row, column, last);
    case 2:
      return product_tile<2, kVectors, kPartial>(p, row, column, last);
    case 3:
      return product_tile<3, kVectors, kPartial>(p, row, column, last);
    case 4:
      return product_tile<4, kVectors, kPartial>(p, row, column, last);
    case 5:
      return product_tile<5, kVectors, kPartial>(p, row, column, last);
    default:
      return product_tile<6, kVectors, kPartial>(p, row, column, last);
  }
}

// How the tiles of a product are numbered, and how many rows they have.
//
// Normally down the rows of one column panel, then the next panel, so that a part stays within few panels of b. Where
// all of b stays in L1 there is nothing to save, and results that are written along their rows leave the caches faster;
// with hardly anything to sum, writing is all the work, and fewer rows at a time are faster still (dW of one user at H
// = 128, 512 KiB out of L2: 29 µs down the panels, 25 along six rows, 21 along two; a plain loop of stores takes 19).
struct TileOrder {
  static constexpr int64_t kSmall = 16 << 10, kShort = 4;
  bool along_rows;
  int64_t height, row_tiles, panels;

  template <class T, class Out>
  TileOrder(const Product<T, Out>& p, int64_t panel)
      : along_rows(p.depth * p.columns * (int64_t)sizeof(T) <= kSmall),
        height(along_rows && p.depth <= kShort ? 2 : kProductRows),
        row_tiles((p.rows + height - 1) / height),
        panels((p.columns + panel - 1) / panel) {}

  int64_t tiles() const { return row_tiles * panels; }
  int64_t row(int64_t tile) const { return (along_rows ? tile / panels : tile % row_tiles) * height; }
  int64_t panel(int64_t tile) const { return along_rows ? tile % panels : tile / row_tiles; }
};

// Part begin/parts to end/parts of a product.
template <class T, class Out>
void product_part(const Product<T, Out>& p, int64_t begin, int64_t end, int64_t parts) {
  constexpr int kWidth = Compute<T>::kWidth;
  constexpr int64_t kPanel = kProductVectors * kWidth;
  const TileOrder order(p, kPanel);
  for (int64_t tile = order.tiles() * begin / parts; tile < order.tiles() * end / parts; ++tile) {
    const int64_t row = order.row(tile), height = order.height;
    int64_t column = order.panel(tile) * kPanel;
    if (column + kPanel <= p.columns) {
      product_rows<kProductVectors, false>(p, row, height, column, kWidth);
      continue;
    }
    for (; column + kWidth <= p.columns; column += kWidth) product_rows<1, false>(p, row, height, column, kWidth);
    if (column < p.columns) product_rows<1, true>(p, row, height, column, (int)(p.columns - column));
  }
}

// out[n] = Σ_m a[m][n] for kWidth columns (or the first `count`): pairs of halves of 32-row chains, so the error grows
// with log(rows) as in torch's own sum.
template <bool kPartial, class V, class S>
V sum_rows(const S* a, int64_t stride, int64_t rows, int count) {
  if (rows <= 32) {
    V sum{};
    for (int64_t m = 0; m < rows; ++m)
      sum = sum + (kPartial ? load_first(a + m * stride, count) : load(a + m * stride));
    return sum;
  }
  const int64_t half = (rows / 2 + 31) / 32 * 32;
  return sum_rows<kPartial, V>(a, stride, half, count) +
         sum_rows<kPartial, V>(a + half * stride, stride, rows - half, count);
}

}  // namespace seqrec_fast::SEQREC_TIER
