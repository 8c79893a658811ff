// bf16 and fp16 as memory formats: read into F32, rounded to nearest even when written. Arithmetic is fp32, but for
// products of pairs (pairs.h).
#pragma once

#include "vector.h"

namespace seqrec_fast::SEQREC_TIER {

struct BF16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

using U16 = uint16_t __attribute__((vector_size(kVectorBytes / 2)));  // kLanes values

SEQREC_INLINE U16 load_bits(const void* p) {
  U16 v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
SEQREC_INLINE U16 load_bits_first(const void* p, int n) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  return (U16)_mm256_maskz_loadu_epi16((1u << n) - 1u, p);
#else
  U16 v{};
  __builtin_memcpy(&v, p, 2 * (unsigned)n);
  return v;
#endif
}
SEQREC_INLINE void store_bits_first(void* p, int n, U16 v) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  _mm256_mask_storeu_epi16(p, (1u << n) - 1u, (__m256i)v);
#else
  __builtin_memcpy(p, &v, 2 * (unsigned)n);
#endif
}

// ---- bf16: the upper half of a float
// ----------------------------------------------------------------------------------

SEQREC_INLINE F32 widen_bf16(U16 bits) { return (F32)(__builtin_convertvector(bits, U32) << 16); }

SEQREC_INLINE U16 narrow_bf16(F32 x) {
  const U32 bits = (U32)x;
  const U32 rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  const U32 is_nan = (U32)(x != x);  // rounding up could carry a NaN's payload into the sign
  return __builtin_convertvector(((rounded & ~is_nan) | (is_nan & 0x7fc00000u)) >> 16, U16);
}

// ---- fp16: by the processor where it can, else by integer steps that treat its denormals exactly
// -----------------------

SEQREC_INLINE F32 widen_f16(U16 bits) {
#if defined(__AVX512F__)
  return (F32)_mm512_cvtph_ps((__m256i)bits);
#elif defined(__AVX2__) && defined(__F16C__)
  return (F32)_mm256_cvtph_ps((__m128i)bits);
#elif defined(__aarch64__)
  return (F32)vcvt_f32_f16((float16x4_t)bits);
#else
  const U32 wide = __builtin_convertvector(bits, U32);
  const U32 shifted = (wide & 0x7fffu) << 13;
  const U32 exponent = shifted & 0x0f800000u;
  const U32 normal = shifted + ((127u - 15u) << 23);
  const U32 inf_or_nan = shifted + ((255u - 31u) << 23);
  // A denormal's digits become the fraction of 2^-14 + value; subtracting 2^-14 leaves the value, exactly.
  const F32 two_to_minus_14 = broadcast(0x1p-14f);
  const U32 denormal = (U32)((F32)(shifted + (113u << 23)) - two_to_minus_14);
  const U32 is_top = (U32)(exponent == 0x0f800000u);
  const U32 is_low = (U32)(exponent == 0u);
  const U32 magnitude = (is_top & inf_or_nan) | (is_low & denormal) | (~(is_top | is_low) & normal);
  return (F32)(magnitude | ((wide & 0x8000u) << 16));
#endif
}

SEQREC_INLINE U16 narrow_f16(F32 x) {
#if defined(__AVX512F__)
  return (U16)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__) && defined(__F16C__)
  return (U16)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__aarch64__)
  return (U16)vcvt_f16_f32((float32x4_t)x);
#else
  const U32 bits = (U32)x;
  const U32 sign = (bits >> 16) & 0x8000u;
  const U32 magnitude = bits & 0x7fffffffu;
  // Normal result: move the exponent bias and round to even in the 13 bits that are dropped.
  const U32 normal = (magnitude - ((127u - 15u) << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Denormal result: adding 0.5 aligns the digits at 2^-24 and rounds; the low bits are the answer.
  const U32 denormal = (U32)((F32)magnitude + broadcast(0.5f)) - 0x3f000000u;
  const U32 is_nan = (U32)(magnitude > 0x7f800000u);
  const U32 is_big = (U32)(magnitude >= 0x47800000u);  // >= 2^16; what rounds up to it carries into infinity by itself
  const U32 is_low = (U32)(magnitude < 0x38800000u);   // < 2^-14
  U32 half = (is_low & denormal) | (~is_low & normal);
  half = (is_big & 0x7c00u) | (~is_big & half);
  half = (is_nan & 0x7e00u) | (~is_nan & half);
  return __builtin_convertvector(half | sign, U16);
#endif
}

// ---- the same names as for float
// --------------------------------------------------------------------------------------

SEQREC_INLINE F32 load(const BF16* p) { return widen_bf16(load_bits(p)); }
SEQREC_INLINE F32 load(const F16* p) { return widen_f16(load_bits(p)); }
SEQREC_INLINE F32 load_first(const BF16* p, int n) { return widen_bf16(load_bits_first(p, n)); }
SEQREC_INLINE F32 load_first(const F16* p, int n) { return widen_f16(load_bits_first(p, n)); }
SEQREC_INLINE void store(BF16* p, F32 v) {
  const U16 bits = narrow_bf16(v);
  __builtin_memcpy(p, &bits, sizeof bits);
}
SEQREC_INLINE void store(F16* p, F32 v) {
  const U16 bits = narrow_f16(v);
  __builtin_memcpy(p, &bits, sizeof bits);
}
SEQREC_INLINE void store_first(BF16* p, int n, F32 v) { store_bits_first(p, n, narrow_bf16(v)); }
SEQREC_INLINE void store_first(F16* p, int n, F32 v) { store_bits_first(p, n, narrow_f16(v)); }

// One value, as arithmetic sees it.
SEQREC_INLINE float value(float x) { return x; }
SEQREC_INLINE double value(double x) { return x; }
SEQREC_INLINE float value(BF16 x) {
  const uint32_t bits = (uint32_t)x.bits << 16;
  float y;
  __builtin_memcpy(&y, &bits, sizeof y);
  return y;
}
SEQREC_INLINE float value(F16 x) { return load_first(&x, 1)[0]; }

}  // namespace seqrec_fast::SEQREC_TIER
