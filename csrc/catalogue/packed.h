// The int8 copy of a catalogue: how it is made, how a query meets it, and how far its scores can be from the truth.
#pragma once

#include "catalogue/band.h"
#include "catalogue/exact.h"
#include "catalogue/topk_call.h"

namespace seqrec_fast::SEQREC_TIER {

// An item w is kept as s·c, with c in int8 and s = max|w|/127; a query q' (scales folded in) meets it as q̃ = t·a, with
// a in int16 (or int8, below). The sum Σ aₖcₖ is exact in int32, and â = fl(fl(fl(Σ)·t)·s + bias). With e >= |w - s·c|
// and r >= |q' - q̃|:
//   q'·w - t·s·Σ aₖcₖ = q̃·(w - s·c) + (q' - q̃)·w,  at most  |q̃|·e + r·|w|
//   |â - (t·s·Σ aₖcₖ + bias)| <= γ(4)·(t·s·|Σ aₖcₖ| + |bias|) <= γ(4)·(|q̃|·(|w| + e) + |bias|)
//                                four roundings at most: conversion, two products, the sum
//   |S - (q'·w + bias)|       <= 2^-53(d+5)·(|q'|·|w| + |bias|)·(1 + …)   q' is in fp64 here, rounded twice
// and c of band.h is at least 7.35 u (d >= 1; for d = 0 all sums are 0), so that
//   |â - S| <= coarse·e + slope·|w| + c·|bias|,  coarse = (1 + c)·|q̃|,  slope = c·|q'| + (1 + c)·r.
// (|q̃| <= |q'| + r.) Both are widened by 2^-19, which covers their own roundings and those of the comparison: each a
// few u, relative. Underflow: t and s are 0 or above 2^-116, so fl(Σ)·t is no denormal; what is left is within the
// 2^-120 of underflow_of. With t = 0 or s = 0 all of q' or w is in r or e.
constexpr int64_t kPackedWidth = int64_t{1} << 14;  // there a query still has ten bits and a sign
constexpr double kLeastPacked = 0x1p-100;           // what is smaller counts as error
constexpr double kWiden = 1.0 + 0x1p-19;
constexpr double kMostCode = 127.0;

// Codes that a product of the tile takes: pairs of int16, or quads of int8 where the processor has their product. Then
// r is some 200 times as large, and about as large as e: twice the candidates, for a scan in little more than half the
// time.
#if defined(__AVX512VNNI__)
constexpr int kTileCodes = 4;
#else
constexpr int kTileCodes = 2;
#endif

// Where the products of bytes are, items are also coded on the way: from some rows on, for below them an item takes
// longer to code than to score.
constexpr int64_t kLeastCodedRows = kLanes + 1, kLeastCodedWidth = 32;

SEQREC_INLINE bool codes_items(const TopkCall& call) {
  return kTileCodes == 4 && !call.packed.codes && call.format != Format::kF64 && call.items.column_stride == 1 &&
         call.num_rows >= kLeastCodedRows && call.width >= kLeastCodedWidth && call.width <= kPackedWidth;
}
SEQREC_INLINE bool scans_codes(const TopkCall& call) { return call.packed.codes || codes_items(call); }

// Σ |aₖcₖ| stays below 2^31, and of quads Σ |aₖ(cₖ + 128)|.
template <int kCodes>
SEQREC_INLINE double most_query_code(int64_t width) {
  if constexpr (kCodes == 4) return kMostCode;
  const int64_t most_allowed = ((int64_t{1} << 31) - 1) / (127 * most(width, 1));
  return static_cast<double>(least(32767, most_allowed));
}

SEQREC_INLINE double code_of(double x, double step, double most_code) {
  const double code = __builtin_rint(x / step);
  return code > most_code ? most_code : code < -most_code ? -most_code : code;
}
SEQREC_INLINE float rounded_up(double x) { return x == 0.0 ? 0.0f : next_up(static_cast<float>(x * (1.0 + 0x1p-30))); }

// Codes, padded with zeros to whole registers, and facts of items first … first + count - 1. An infinite norm: fp64
// must decide.
template <class T>
void pack_items(const LogitCall& call, int64_t first, int64_t count, const PackedItems& to) {
  const int64_t padded = packed_stride(call.width);
  for (int64_t i = first; i < first + count; ++i) {
    const T* item = row_of<T>(call.items, i);
    int8_t* codes = const_cast<int8_t*>(to.codes) + i * padded;
    float* facts = const_cast<float*>(to.facts) + i;
    auto weight = [&](int64_t k) { return static_cast<double>(value(item[k * call.items.column_stride])); };
    double largest = 0.0, squares = 0.0, errors = 0.0;
    for (int64_t k = 0; k < call.width; ++k) {
      const double w = weight(k), size = magnitude(w);
      largest = size > largest ? size : largest;
      squares += w * w;
    }
    const bool good = squares <= kNormLimit * kNormLimit;  // not NaN
    const float scale = good && largest >= kLeastPacked ? static_cast<float>(largest / kMostCode) : 0.0f;
    for (int64_t k = 0; k < padded; ++k) codes[k] = 0;
    for (int64_t k = 0; good && k < call.width; ++k) {
      const double w = weight(k), step = static_cast<double>(scale);
      const double code = scale != 0.0f ? code_of(w, step, kMostCode) : 0.0;
      codes[k] = static_cast<int8_t>(code);
      const double error = w - step * code;
      errors += error * error;
    }
    facts[0] = scale;
    facts[to.facts_stride] = good ? rounded_up(__builtin_sqrt(errors)) : 0.0f;
    facts[2 * to.facts_stride] = good ? rounded_up(__builtin_sqrt(squares)) : __builtin_inff();
  }
}

// What the scan knows of a query beside its codes.
struct PackedQuery {
  float scale;   // t
  float coarse;  // times an item's error
  float slope;   // times an item's norm
  int32_t sum;   // Σ aₖ
};

// kCodes codes to an int32; those from k on go to codes[k/kCodes · step]. norm: of query_norm.
template <int kCodes, class T>
PackedQuery pack_query(const LogitCall& call, int64_t row, double norm, int32_t* codes, int64_t step) {
  constexpr int kBits = 32 / kCodes;
  const T* query = row_of<T>(call.query, row);
  const double factor = call.scale * row_scale_of<T>(call, row), most_code = most_query_code<kCodes>(call.width);
  auto element = [&](int64_t k) { return static_cast<double>(value(query[k * call.query.column_stride])) * factor; };
  double largest = 0.0, squares = 0.0, errors = 0.0;
  for (int64_t k = 0; k < call.width; ++k) {
    const double size = magnitude(element(k));
    largest = size > largest ? size : largest;
  }
  const float scale = largest >= kLeastPacked ? static_cast<float>(largest / most_code) : 0.0f;
  const double unit = static_cast<double>(scale);
  int32_t sum = 0;
  for (int64_t k = 0; k < call.width; k += kCodes) {
    uint32_t together = 0;
    for (int64_t j = k; j < least(k + kCodes, call.width); ++j) {
      const double x = element(j), code = scale != 0.0f ? code_of(x, unit, most_code) : 0.0;
      const double error = x - unit * code;
      squares += code * code, errors += error * error;
      const int32_t whole = static_cast<int32_t>(code);
      sum += whole;
      together |= (static_cast<uint32_t>(whole) & ((1u << kBits) - 1u)) << (kBits * (j - k));
    }
    codes[k / kCodes * step] = static_cast<int32_t>(together);
  }
  const double c = relative_band(call.width), own = unit * __builtin_sqrt(squares), rest = __builtin_sqrt(errors);
  const double slope = c * norm + (1.0 + c) * rest;
  const double underflow = 0x1p-120 * (__builtin_sqrt(static_cast<double>(call.width)) + 1.0);  // as in limits_of
  return {scale, rounded_up((1.0 + c) * own * kWiden), rounded_up((slope + underflow) * kWiden), sum};
}

// ---- products of codes
// ------------------------------------------------------------------------------------------------

using I16 = int16_t __attribute__((vector_size(kVectorBytes)));
constexpr int kHalves = 2 * kLanes;  // int16 in a register

// Lane l: a[2l]·b[2l] + a[2l + 1]·b[2l + 1].
SEQREC_INLINE I32 pair_products(I32 a, I32 b) {
#if defined(__AVX512BW__)
  return (I32)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (I32)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (I32)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
  return ((a << 16) >> 16) * ((b << 16) >> 16) + (a >> 16) * (b >> 16);
#endif
}

// sum + pair_products(a, b). Assembly for the reason of add_product in tile.h.
SEQREC_INLINE I32 add_pair_products(I32 sum, I32 a, I32 b) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  I32 product;
  asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(sum), "=&x"(product) : "x"(a), "x"(b));
  return sum;
#else
  return sum + pair_products(a, b);
#endif
}

// kHalves codes as int16.
SEQREC_INLINE I32 widened(const int8_t* codes) {
  using Codes = int8_t __attribute__((vector_size(kVectorBytes / 2)));
  Codes from;
  __builtin_memcpy(&from, codes, sizeof from);
#if defined(__AVX512BW__)
  return (I32)_mm512_cvtepi8_epi16((__m256i)from);
#elif defined(__AVX2__)
  return (I32)_mm256_cvtepi8_epi16((__m128i)from);
#else
  return (I32) __builtin_convertvector(from, I16);
#endif
}

// The product of bytes takes one factor without a sign: items have 128 added to their codes, by exchanging the top bit.
constexpr int64_t kByteOffset = kTileCodes == 4 ? 128 : 0;

// Of kTileCodes codes.
struct CodeDot {
  using Number = int32_t;
  using Sum = I32;
  SEQREC_INLINE Sum add(Sum sum, I32 query, I32 item) {
#if defined(__AVX512VNNI__)
    return (I32)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)item, (__m512i)query);
#else
    return add_pair_products(sum, item, query);
#endif
  }
};

// The rows of a block as a tile of codes meets them.
struct PackedRows {
  const int32_t* codes;    // as a Panel, `products` int32 a row
  const float* scale;      // t
  const int32_t* offsets;  // what makes up for the 128 in the items' codes
};

// score[i][u] = start[i] + scale[i] · rows.scale[u] · Σ of products of codes. items: codes at `stride` int32.
template <int Vectors>
SEQREC_INLINE void score_packed_tile(const PackedRows& rows, int64_t products, const int32_t* items, int64_t stride,
                                     const float* scale, const float* start, const Ahead& ahead,
                                     F32 (&score)[kTile][Vectors]) {
  I32 sum[kTile][Vectors];
  each_of_tile<Vectors>([&]<int i, int u>()
                            SEQREC_INLINED { sum[i][u] = kByteOffset ? load(rows.offsets + u * kLanes) : I32{}; });
  add_tile<CodeDot>(rows.codes, products, items, stride, ahead, sum);
  each_of_tile<Vectors>([&]<int i, int u>() SEQREC_INLINED {
    const F32 scaled = __builtin_convertvector(sum[i][u], F32) * load(rows.scale + u * kLanes);
    score[i][u] = fma(scaled, broadcast(scale[i]), broadcast(start[i]));
  });
}

}  // namespace seqrec_fast::SEQREC_TIER
