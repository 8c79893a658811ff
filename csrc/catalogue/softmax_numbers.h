// What the products of a softmax are made of: fp32 numbers, or, for bf16 where the processor multiplies them, pairs.
#pragma once

#include "catalogue/tile.h"
#include "common/pairs.h"

namespace seqrec_fast::SEQREC_TIER {

template <class T>
struct NumberOf {
  using Number = float;
  static constexpr bool kPaired = false;
};
#if defined(SEQREC_PAIRS)
template <>
struct NumberOf<BF16> {
  using Number = BF16Pair;
  static constexpr bool kPaired = true;
};
#endif
template <class T>
using Number = typename NumberOf<T>::Number;
template <class T>
constexpr bool kPaired = NumberOf<T>::kPaired;

// Of `count` values along a dimension that is summed.
template <class T>
SEQREC_INLINE int64_t numbers_in(int64_t count) {
  return kPaired<T> ? pairs_in(count) : count;
}

// One row as numbers that follow one another; pairs: an odd width gets a zero.
template <class T>
SEQREC_INLINE void read_numbers(const T* from, int64_t stride, int64_t width, Number<T>* to) {
  if constexpr (kPaired<T>) {
    uint16_t* bits = reinterpret_cast<uint16_t*>(to);
    if (stride == 1)
      __builtin_memcpy(bits, from, 2 * static_cast<size_t>(width));
    else
      for (int64_t k = 0; k < width; ++k) bits[k] = from[k * stride].bits;
    if (width % 2) bits[width] = 0;
  } else {
    read_row(from, stride, width, to);
  }
}

// Whether rows of a matrix can be used where they lie.
template <class T>
SEQREC_INLINE bool lies_as_numbers(const MatrixView& matrix, int64_t width) {
  if (matrix.column_stride != 1) return false;
  if constexpr (kPaired<T>)
    return width % 2 == 0 && matrix.row_stride % 2 == 0 && reinterpret_cast<uintptr_t>(matrix.data) % 4 == 0;
  return __is_same(T, float);
}

// Lane `slot` of a panel of queries, `lanes` lanes wide. With pairs the factor of the row is multiplied into the score
// instead: a scaled query is no bf16 number.
template <class T, class Source>
SEQREC_INLINE void pack_numbers(Number<T>* panel, int64_t width, int64_t rows, int64_t slot, const Source* query,
                                int64_t stride, double scale) {
  if constexpr (kPaired<T>) {
    const int64_t block = slot / kBlock, lanes = rows - block * kBlock <= kLanes ? kLanes : kBlock;
    Number<T>* to = panel + block * kBlock * pairs_in(width) + slot % kBlock;
    auto bits = [&](int64_t k) -> uint32_t {
      if (k >= width) return 0;
      if constexpr (__is_same(Source, BF16))
        return query[k * stride].bits;
      else
        return bf16_bits(query[k * stride]);
    };
    for (int64_t k = 0; k < width; k += 2) to[k / 2 * lanes].bits = bits(k) | bits(k + 1) << 16;
  } else {
    pack_row(Panel{panel, width, rows}, slot, query, stride, scale);
  }
}

#if defined(SEQREC_PAIRS)
struct PairDot {
  using Number = BF16Pair;
  using Sum = F32;
  SEQREC_INLINE Sum add(Sum sum, F32 query, F32 item) { return multiply_add<BF16Pair>(item, query, sum); }
};

// As score_tile, and scaled by the rows' factors.
template <int Vectors>
SEQREC_INLINE void score_pair_tile(const BF16Pair* queries, int64_t pairs, const BF16Pair* items, int64_t stride,
                                   const float* start, const float* factors, const Ahead& ahead,
                                   F32 (&score)[kTile][Vectors]) {
  F32 sum[kTile][Vectors];
  each_of_tile<Vectors>([&]<int i, int u>() SEQREC_INLINED { sum[i][u] = F32{}; });
  add_tile<PairDot>(queries, pairs, items, stride, ahead, sum);
  each_of_tile<Vectors>([&]<int i, int u>() SEQREC_INLINED {
    score[i][u] = fma(sum[i][u], load(factors + u * kLanes), broadcast(start[i]));
  });
}
#endif

// to[i][lane] = start[i] + the products of item i with kVectors registers of rows, for `count` items (whole tiles),
// `to_stride` floats from item to item. With pairs the products are multiplied by the rows' factors.
template <int kVectors, class N>
SEQREC_INLINE void score_items(const N* queries, int64_t numbers, const N* items, int64_t item_stride,
                               const float* start, const float* factors, int64_t count, float* to, int64_t to_stride,
                               Ahead ahead) {
  for (int64_t i = 0; i < count; i += kTile) {
    F32 tile[kTile][kVectors];
    if constexpr (__is_same(N, float)) {
      score_tile<kVectors>(queries, numbers, items + i * item_stride, item_stride, start + i, ahead, tile);
    } else {
#if defined(SEQREC_PAIRS)
      score_pair_tile<kVectors>(queries, numbers, items + i * item_stride, item_stride, start + i, factors, ahead,
                                tile);
#endif
    }
    ahead.address += numbers / kTurn * ahead.step;
#pragma GCC unroll 16
    for (int j = 0; j < kTile; ++j)
#pragma GCC unroll 4
      for (int u = 0; u < kVectors; ++u) store(to + (i + j) * to_stride + u * kLanes, tile[j][u]);
  }
}

// Numbers that a product sums over items: from[item][lane] as they are, or in pairs of items at `to`
// [pairs_in(items)][lanes]. lanes: a multiple of kLanes.
template <class T>
SEQREC_INLINE const Number<T>* by_items(const float* from, int64_t stride, int64_t items, int64_t lanes,
                                        Number<T>* to) {
  if constexpr (kPaired<T>) {
    for (int64_t i = 0; i < items; i += 2)
      for (int64_t lane = 0; lane < lanes; lane += kLanes) {
        const F32 second = i + 1 < items ? load(from + (i + 1) * stride + lane) : F32{};
        store_pairs(to + i / 2 * lanes + lane, load(from + i * stride + lane), second);
      }
    return to;
  } else {
    return from;
  }
}

// Numbers that a product sums over the first `count` lanes: from[item][lane] as they are, or factors[lane]·from in
// pairs of lanes at `to` [items][stride / 2], zero beyond `count`. Without factors (null) they are 1.
template <class T>
SEQREC_INLINE const Number<T>* by_lanes(const float* from, int64_t stride, int64_t items, int64_t count,
                                        const float* factors, Number<T>* to) {
  if constexpr (kPaired<T>) {
    const auto lanes_at = [&](const float* numbers, int64_t lane) {
      if (lane + kLanes <= count) return load(numbers + lane);
      return lane < count ? load_first(numbers + lane, static_cast<int>(count - lane)) : F32{};
    };
    for (int64_t lane = 0; lane < count; lane += 2 * kLanes) {
      F32 first = broadcast(1.0f), second = first;
      // A factor that is not finite makes its row special: what it adds is added apart.
      const auto finite = [](F32 x) { return select(abs(x) < __builtin_inff(), x, F32{}); };
      if (factors) first = finite(lanes_at(factors, lane)), second = finite(lanes_at(factors, lane + kLanes));
      for (int64_t i = 0; i < items; ++i) {
        const float* numbers = from + i * stride;
        store_rounded(to + i * (stride / 2) + lane / 2, lanes_at(numbers, lane) * first,
                      lanes_at(numbers, lane + kLanes) * second);
      }
    }
    return to;
  } else {
    return from;
  }
}

}  // namespace seqrec_fast::SEQREC_TIER
