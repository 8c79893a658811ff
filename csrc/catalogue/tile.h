// The score tile: items × rows of the catalogue scan, in fp32.
//
// Lanes are rows of the batch, so a reducer never works across lanes, and an item's weights are broadcast straight from
// the row-major catalogue: nothing of it is packed. A tile is kTile items × Vectors registers of rows, held in
// registers while k runs over the width; the packed queries of its rows stay in L1, the items pass by once per group of
// rows.
#pragma once

#include "catalogue/call.h"
#include "common/vector.h"
#include "common/vector_half.h"

#define SEQREC_METHOD inline __attribute__((always_inline))

namespace seqrec_fast::SEQREC_TIER {

// kTile · kWide accumulators, kWide query registers and one broadcast: 27 of 32 registers, or 15 of 16. Twelve
// independent products per broadcast pair hide the latency of a fused multiply-add (4 cycles, 2 a cycle). Measured on
// one Sapphire Rapids core at d = 64, with the counting epilogue: 12 × 2 reaches 93 % of the FMA peak, 6 × 4 93 %, 14 ×
// 2 88 %, 12 × 1 77 %.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTile = 12;
#else
constexpr int kTile = 6;
#endif
constexpr int kWide = 2;
constexpr int kBlock = kWide * kLanes;  // rows of a full block

// Calls work(T{}) for the element type of a format.
template <class Work>
SEQREC_INLINE auto with_format(Format format, const Work& work) {
  switch (format) {
    case Format::kF64:
      return work(double{});
    case Format::kBF16:
      return work(BF16{});
    case Format::kF16:
      return work(F16{});
    default:
      return work(float{});
  }
}

// ---- reading
// ----------------------------------------------------------------------------------------------------------

template <class T>
SEQREC_INLINE const T* row_of(const MatrixView& matrix, int64_t row) {
  return static_cast<const T*>(matrix.data) + row * matrix.row_stride;
}

template <class T>
SEQREC_INLINE auto at(const VectorView& vector, int64_t i) {
  return value(static_cast<const T*>(vector.data)[i * vector.stride]);
}

// The factor of one row beside call.scale.
template <class T>
SEQREC_INLINE double row_scale_of(const LogitCall& call, int64_t row) {
  return call.row_scale.data ? static_cast<double>(at<T>(call.row_scale, row)) : 1.0;
}

// One row as contiguous fp32.
template <class T>
SEQREC_INLINE void read_row(const T* from, int64_t stride, int64_t width, float* to) {
  int64_t k = 0;
  if (stride == 1)
    for (; k + kLanes <= width; k += kLanes) store(to + k, load(from + k));
  for (; k < width; ++k) to[k] = static_cast<float>(value(from[k * stride]));
}

// Σ x², each rounding relative; underflow is the caller's to bound.
SEQREC_INLINE float sum_of_squares(const float* x, int64_t width) {
  F32 even{}, odd{};
  int64_t k = 0;
  for (; k + 2 * kLanes <= width; k += 2 * kLanes) {
    const F32 a = load(x + k), b = load(x + k + kLanes);
    even = fma(a, a, even);
    odd = fma(b, b, odd);
  }
  for (; k < width; k += kLanes) {
    const F32 a = load_first(x + k, static_cast<int>(width - k < kLanes ? width - k : kLanes));
    even = fma(a, a, even);
  }
  return reduce_add(even + odd);
}

// ---- packed queries
// ---------------------------------------------------------------------------------------------------

// Blocks of kBlock rows, each [width][kBlock]; a last block of at most kLanes rows is [width][kLanes]. Unused lanes are
// zero.
struct Panel {
  float* data;
  int64_t width;
  int64_t rows;
};

template <class T>
SEQREC_INLINE void pack_row(const Panel& panel, int64_t slot, const T* query, int64_t stride, double scale) {
  const int64_t block = slot / kBlock, lane = slot % kBlock;
  const int lanes = panel.rows - block * kBlock <= kLanes ? kLanes : kBlock;
  float* to = panel.data + block * kBlock * panel.width + lane;
  for (int64_t k = 0; k < panel.width; ++k)
    to[k * lanes] = static_cast<float>(static_cast<double>(value(query[k * stride])) * scale);
}

// ---- the tile
// -----------------------------------------------------------------------------------------------------------

// Memory that will be needed soon, asked for evenly while a tile is computed: `step` bytes every kTurn steps of k.
// (Bursts between tiles wait for the few buffers that hold outstanding lines: 60 ms instead of 30 for one row and 10⁶
// items.)
constexpr int kTurn = 4;
struct Ahead {
  const char* address;
  int64_t step;
};

// sum + a·b. With 16 registers g++ 12 mixes the steps of the unrolled loop and lets a product overwrite its factor
// rather than its sum, until some sums no longer fit and go through memory: a quarter of a tile's time on a Zen 3 core.
SEQREC_INLINE F32 add_product(F32 sum, F32 a, F32 b) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  asm("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
  return sum;
#else
  return fma(a, b, sum);
#endif
}

// body.operator()<0>(), <1>(), …: an array that is only reached by constants lives in registers. The bodies must be
// inlined whatever the size of the function around them: in a large one g++ calls them (a tile then takes twice as
// long).
#define SEQREC_INLINED __attribute__((always_inline))
template <int kCount, int kFirst = 0, class Body>
SEQREC_INLINE void unrolled(const Body& body) {
  if constexpr (kFirst < kCount) {
    body.template operator()<kFirst>();
    unrolled<kCount, kFirst + 1>(body);
  }
}

// What a tile is summed from. Number: of a query or an item, one or several elements along the width; Sum: a register
// of sums; add(sum, query, item): one more product.
struct FloatDot {
  using Number = float;
  using Sum = F32;
  SEQREC_INLINE Sum add(Sum sum, F32 query, F32 item) { return add_product(sum, query, item); }
};

template <class Dot, int Vectors>
SEQREC_INLINE void add_products(const typename Dot::Number* queries, const typename Dot::Number* items, int64_t stride,
                                int64_t k, typename Dot::Sum (&sum)[kTile][Vectors]) {
  decltype(load(queries)) query[Vectors];
  unrolled<Vectors>([&]<int u>() SEQREC_INLINED { query[u] = load(queries + (k * Vectors + u) * kLanes); });
  unrolled<kTile>([&]<int i>() SEQREC_INLINED {
    const auto item = broadcast(items[i * stride + k]);
    unrolled<Vectors>([&]<int u>() SEQREC_INLINED { sum[i][u] = Dot::add(sum[i][u], query[u], item); });
  });
}

// sum[i][u] += Σₖ items[i][k] · queries[k][u] over `count` numbers, k ascending.
template <class Dot, int Vectors>
SEQREC_INLINE void add_tile(const typename Dot::Number* queries, int64_t count, const typename Dot::Number* items,
                            int64_t stride, const Ahead& ahead, typename Dot::Sum (&sum)[kTile][Vectors]) {
  // Several steps a turn: with 16 turns at d = 64 the end of the loop is predicted, which is worth 4 % of a tile's
  // time.
  int64_t k = 0;
  const char* next = ahead.address;
  for (; k + kTurn <= count; k += kTurn, next += ahead.step) {
    for (int64_t line = 0; line < ahead.step; line += 64) __builtin_prefetch(next + line, 0, 2);
    unrolled<kTurn>([&]<int j>() SEQREC_INLINED { add_products<Dot, Vectors>(queries, items, stride, k + j, sum); });
  }
  for (; k < count; ++k) add_products<Dot, Vectors>(queries, items, stride, k, sum);
}

// Calls body.operator()<i, u>() for every register of a tile.
template <int Vectors, class Body>
SEQREC_INLINE void each_of_tile(const Body& body) {
  unrolled<kTile>([&]<int i>() SEQREC_INLINED {
    unrolled<Vectors>([&]<int u>() SEQREC_INLINED { body.template operator()<i, u>(); });
  });
}

// score[i][u] = start[i] + Σₖ items[i][k] · queries[k][u], one rounding a step where the tier has FMA.
template <int Vectors>
SEQREC_INLINE void score_tile(const float* queries, int64_t width, const float* items, int64_t stride,
                              const float* start, const Ahead& ahead, F32 (&score)[kTile][Vectors]) {
  F32 sum[kTile][Vectors];  // apart from `score`, which the caller may reach in other ways
  each_of_tile<Vectors>([&]<int i, int u>() SEQREC_INLINED { sum[i][u] = broadcast(start[i]); });
  add_tile<FloatDot>(queries, width, items, stride, ahead, sum);
  each_of_tile<Vectors>([&]<int i, int u>() SEQREC_INLINED { score[i][u] = sum[i][u]; });
}

}  // namespace seqrec_fast::SEQREC_TIER
