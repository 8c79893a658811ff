// A few rows of queries: lanes run along k, as in a dot product. A tile would leave most of its lanes empty, and four
// rows of dot products still take less time than the items take from memory.
#pragma once

#include "catalogue/topk_select.h"

namespace seqrec_fast::SEQREC_TIER {

constexpr int kDotRows = 4;

template <int kStep, class Vector, class Combine>
SEQREC_INLINE Vector combine_halves(Vector a, Vector b, const Combine& combine) {
  // Lane l takes what it has from a where l has no bit kStep, from b where it has.
  I32 own, other;
#pragma GCC unroll 16
  for (int lane = 0; lane < kLanes; ++lane) {
    const int from = lane & kStep ? kLanes : 0;
    own[lane] = from + lane, other[lane] = from + (lane ^ kStep);
  }
  return combine(__builtin_shuffle(a, b, own), __builtin_shuffle(a, b, other));
}

// Lane i of the result: the lanes of v[i], combined.
template <int kStep = kLanes / 2, class Vector, class Combine>
SEQREC_INLINE Vector combined(Vector (&v)[kLanes], const Combine& combine) {
#pragma GCC unroll 16
  for (int i = 0; i < kStep; ++i) v[i] = combine_halves<kStep>(v[i], v[i + kStep], combine);
  if constexpr (kStep > 1)
    return combined<kStep / 2>(v, combine);
  else
    return v[0];
}
template <class Vector>
SEQREC_INLINE Vector sums_of(Vector (&v)[kLanes]) {
  return combined(v, [](Vector a, Vector b) SEQREC_INLINED { return a + b; });
}
template <class Vector>
SEQREC_INLINE Vector largest_of(Vector (&v)[kLanes]) {
  return combined(v, [](Vector a, Vector b) SEQREC_INLINED { return max(a, b); });
}

// sums[r]: kLanes items (the last of them repeated beyond `count`) against row r; squares: their Σw².
template <int Rows, class T>
SEQREC_INLINE void dots(const LogitCall& call, const float* queries, int64_t stride, int64_t first, int64_t count,
                        int64_t ahead, F32 (&sums)[Rows], F32& squares) {
  const int64_t whole = call.width / kLanes * kLanes;
  const int left = static_cast<int>(call.width - whole);
  F32 parts[Rows][kLanes], own[kLanes];
  for (int j = 0; j < kLanes; ++j) {
    const T* item = row_of<T>(call.items, first + (j < count ? j : count - 1));
    const char* next = reinterpret_cast<const char*>(item + ahead * call.items.row_stride);
    F32 sum[Rows]{}, square{};
    auto step = [&](F32 weight, int64_t k) {
      square = fma(weight, weight, square);
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) sum[r] = fma(load(queries + r * stride + k), weight, sum[r]);
    };
    for (int64_t k = 0; k < whole; k += kLanes) {
      __builtin_prefetch(next + k * static_cast<int64_t>(sizeof(T)), 0, 2);
      step(load(item + k), k);
    }
    if (left) step(load_first(item + whole, left), whole);
    own[j] = square;
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) parts[r][j] = sum[r];
  }
  squares = sums_of(own);
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r) sums[r] = sums_of(parts[r]);
}

// The chunk against the first Rows slots. queries: [Rows] at `stride`, zero beyond the width up to whole registers.
// ahead: how many items on the next chunk lies.
template <int Rows, class T>
void scan_dots(Candidates<T>& best, ScanChunk& chunk, const float* queries, int64_t stride, int64_t ahead) {
  const TopkCall& call = best.call;
  set_start<T>(call, chunk, chunk.count + kLanes);
  chunk.num_special = 0;
  const SquareBound bound(call.width);
  const float relative = static_cast<float>(relative_band(call.width));
  for (int64_t i = 0; i < chunk.count; i += kLanes) {
    F32 score[Rows], squares;
    dots<Rows, T>(call, queries, stride, chunk.first + i, least(kLanes, chunk.count - i), ahead, score, squares);
    squares = squares * bound.inflate + bound.underflow;
    const I32 within = (I32)(squares <= kSquareLimit) & (I32)(abs(load(chunk.start + i)) <= kBiasLimit);
    for (uint32_t odd = ~mask_bits(within) & ((1u << kLanes) - 1u); odd; odd &= odd - 1)
      make_special(chunk, i + __builtin_ctz(odd));
    const F32 start = load(chunk.start + i), bias = abs(start) * relative;  // NaN: not scanned
    float norms[kLanes];
    store(norms, squares);
    for (float& norm : norms) norm = __builtin_sqrtf(norm);
    const F32 norm = load(norms);
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
      score[r] += start;
      const F32 error = fma(norm, broadcast(best.slope[r]), bias);
      uint32_t bits = mask_bits((I32)(score[r] >= best.low[r] - error));
      for (; __builtin_expect(bits != 0, 0); bits &= bits - 1) {
        const int lane = __builtin_ctz(bits);
        best.add_approximate(r, chunk.first + i + lane, score[r][lane], static_cast<double>(error[lane]));
      }
    }
  }
}

}  // namespace seqrec_fast::SEQREC_TIER
