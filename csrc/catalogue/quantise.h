// Codes and facts of a chunk of items on their way through a scan, made where the catalogue has no packed copy: as
// packed.h makes them, in fp32 and a register of items at a time.
#pragma once

#include "catalogue/topk_dots.h"

namespace seqrec_fast::SEQREC_TIER {

// Facts of a register of items; see PackedItems.
struct ItemFacts {
  F32 scale, error, norm;
};

#if defined(__AVX512VNNI__)
// kLanes codes of x/step, with 128 added.
SEQREC_INLINE void store_codes(int8_t* to, I32 codes) {
  const __m128i bytes = _mm512_cvtsepi32_epi8((__m512i)codes);
  _mm_storeu_si128((__m128i*)to, _mm_xor_si128(bytes, _mm_set1_epi8(static_cast<char>(0x80))));
}

// Calls step(first k, the numbers from there on) for the registers of a row, zeros behind the last.
template <class T, class Step>
SEQREC_INLINE void each_register(const T* item, int64_t width, const Step& step) {
  int64_t k = 0;
  for (; k + kLanes <= width; k += kLanes) step(k, load(item + k));
  if (k < width) step(k, load_first(item + k, static_cast<int>(width - k)));
}

// Items first … of the catalogue; beyond `count` the last is repeated. codes: `stride` bytes an item. The errors are
// computed in fp32: fl(w - s·c) is within u of it, relatively, and Σ is bounded as the squares are (SquareBound).
template <class T>
SEQREC_INLINE ItemFacts code_items(const LogitCall& call, const SquareBound& bound, int64_t first, int64_t count,
                                   int8_t* codes, int64_t stride) {
  F32 largest[kLanes], parts[kLanes];
  for (int64_t j = 0; j < kLanes; ++j) {
    F32 most_of{}, squares{};
    each_register(row_of<T>(call.items, first + least(j, count - 1)), call.width, [&](int64_t, F32 x) {
      most_of = max(abs(x), most_of);
      squares = fma(x, x, squares);
    });
    largest[j] = most_of, parts[j] = squares;
  }
  const F32 size = largest_of(largest), squares = sums_of(parts) * bound.inflate + bound.underflow;
  // Not so small that its inverse is infinite. NaN and what is too large leave the scan by their norm.
  const I32 good = (I32)(size >= static_cast<float>(kLeastPacked)) & (I32)(squares <= kSquareLimit);
  const F32 step = select(good, size * (1.0f / 127.0f), F32{});
  const F32 inverse = select(good, 127.0f / size, F32{});
  float steps[kLanes], inverses[kLanes];
  store(steps, step), store(inverses, inverse);
  for (int64_t j = 0; j < kLanes; ++j) {
    const F32 by = broadcast(inverses[j]), less = broadcast(-steps[j]);
    F32 errors{};
    int8_t* to = codes + j * stride;
    each_register(row_of<T>(call.items, first + least(j, count - 1)), call.width, [&](int64_t k, F32 x) {
      // At most 127·(1 + 3u), which rounds to 127.
      const I32 code = (I32)_mm512_cvtps_epi32((__m512)(x * by));
      const F32 error = fma(less, __builtin_convertvector(code, F32), x);
      errors = fma(error, error, errors);
      store_codes(to + k, code);
    });
    parts[j] = errors;
  }
  const F32 errors = sums_of(parts) * bound.inflate + bound.underflow;
  const F32 widen = broadcast(static_cast<float>(1.0 + 0x1p-20));
  return {step, (F32)_mm512_sqrt_ps((__m512)errors) * widen, (F32)_mm512_sqrt_ps((__m512)squares) * widen};
}
#endif

}  // namespace seqrec_fast::SEQREC_TIER
