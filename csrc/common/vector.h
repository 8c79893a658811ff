// Vectors of one register, the same source for every CPU tier.
//
// A kernel file is compiled once per tier (SEQREC_TIER names the namespace), and the compiler's flags decide how wide a
// register is. GCC's vector types give +, -, *, /, <, & and so on; what they do not give is here: loads of a part,
// a fused multiply-add, max/min with a fixed NaN rule, masks as bits, and reductions in a fixed order.
// vector_half.h adds bf16/fp16 memory formats, vector_math.h adds exp, sigmoid and tanh.
//
// Raw pointers only and nothing from std: a function with linkage shared between tiers could be taken from the wrong
// one.
#pragma once

#include <stdint.h>

#if defined(__x86_64__)
// GCC 12's own header reads a value it calls undefined, and -Wall says so wherever an AVX-512 intrinsic is inlined.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define SEQREC_INLINE static inline __attribute__((always_inline))

namespace seqrec_fast::SEQREC_TIER {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

constexpr int kLanes = kVectorBytes / 4;    // floats in a register: 16, 8 or 4
constexpr int kLanes64 = kVectorBytes / 8;  // doubles in a register

using F32 = float __attribute__((vector_size(kVectorBytes)));
using F64 = double __attribute__((vector_size(kVectorBytes)));
using I32 = int32_t __attribute__((vector_size(kVectorBytes)));  // also the result of comparing F32: 0 or -1
using I64 = int64_t __attribute__((vector_size(kVectorBytes)));  // also the result of comparing F64
using U32 = uint32_t __attribute__((vector_size(kVectorBytes)));

// ---- whole registers ------------------------------------------------------------------------------------------------

// Any address is allowed, aligned or not.
SEQREC_INLINE F32 load(const float* p) {
  F32 v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
SEQREC_INLINE F64 load(const double* p) {
  F64 v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
SEQREC_INLINE I32 load(const int32_t* p) {
  I32 v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
SEQREC_INLINE void store(float* p, F32 v) { __builtin_memcpy(p, &v, sizeof v); }
SEQREC_INLINE void store(double* p, F64 v) { __builtin_memcpy(p, &v, sizeof v); }
SEQREC_INLINE void store(int32_t* p, I32 v) { __builtin_memcpy(p, &v, sizeof v); }

// Written as x - {0}: an addition would turn -0 into +0, and this folds into one broadcast instruction.
SEQREC_INLINE F32 broadcast(float x) { return x - F32{}; }
SEQREC_INLINE F64 broadcast(double x) { return x - F64{}; }
SEQREC_INLINE I32 broadcast(int32_t x) { return x - I32{}; }

// ---- the first n lanes, 0 <= n <= lanes; nothing past p + n is touched, the other lanes read as zero
// -----------------

#if defined(__AVX512F__)
SEQREC_INLINE F32 load_first(const float* p, int n) { return (F32)_mm512_maskz_loadu_ps((1u << n) - 1u, p); }
SEQREC_INLINE F64 load_first(const double* p, int n) { return (F64)_mm512_maskz_loadu_pd((1u << n) - 1u, p); }
SEQREC_INLINE void store_first(float* p, int n, F32 v) { _mm512_mask_storeu_ps(p, (1u << n) - 1u, (__m512)v); }
SEQREC_INLINE void store_first(double* p, int n, F64 v) { _mm512_mask_storeu_pd(p, (1u << n) - 1u, (__m512d)v); }
#elif defined(__AVX2__)
SEQREC_INLINE I32 first_lanes(int n) { return n > I32{0, 1, 2, 3, 4, 5, 6, 7}; }
SEQREC_INLINE I64 first_lanes64(int n) { return n > I64{0, 1, 2, 3}; }
SEQREC_INLINE F32 load_first(const float* p, int n) { return (F32)_mm256_maskload_ps(p, (__m256i)first_lanes(n)); }
SEQREC_INLINE F64 load_first(const double* p, int n) { return (F64)_mm256_maskload_pd(p, (__m256i)first_lanes64(n)); }
SEQREC_INLINE void store_first(float* p, int n, F32 v) { _mm256_maskstore_ps(p, (__m256i)first_lanes(n), (__m256)v); }
SEQREC_INLINE void store_first(double* p, int n, F64 v) {
  _mm256_maskstore_pd(p, (__m256i)first_lanes64(n), (__m256d)v);
}
#else
SEQREC_INLINE F32 load_first(const float* p, int n) {
  F32 v{};
  for (int i = 0; i < kLanes; ++i)
    if (i < n) v[i] = p[i];
  return v;
}
SEQREC_INLINE F64 load_first(const double* p, int n) {
  F64 v{};
  for (int i = 0; i < kLanes64; ++i)
    if (i < n) v[i] = p[i];
  return v;
}
SEQREC_INLINE void store_first(float* p, int n, F32 v) {
  for (int i = 0; i < kLanes; ++i)
    if (i < n) p[i] = v[i];
}
SEQREC_INLINE void store_first(double* p, int n, F64 v) {
  for (int i = 0; i < kLanes64; ++i)
    if (i < n) p[i] = v[i];
}
#endif

// ---- arithmetic -----------------------------------------------------------------------------------------------------

// a·b + c: one rounding where the tier has a fused instruction, two in tier_default on x86.
// max and min: when either operand is NaN (or both are zero) the result is b, as x86 does it; so `max(limit, x)` lets a
// NaN in x through.
#if defined(__AVX512F__)
SEQREC_INLINE F32 fma(F32 a, F32 b, F32 c) { return (F32)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
SEQREC_INLINE F64 fma(F64 a, F64 b, F64 c) { return (F64)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c); }
SEQREC_INLINE F32 max(F32 a, F32 b) { return (F32)_mm512_max_ps((__m512)a, (__m512)b); }
SEQREC_INLINE F32 min(F32 a, F32 b) { return (F32)_mm512_min_ps((__m512)a, (__m512)b); }
#elif defined(__AVX2__)
SEQREC_INLINE F32 fma(F32 a, F32 b, F32 c) { return (F32)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
SEQREC_INLINE F64 fma(F64 a, F64 b, F64 c) { return (F64)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c); }
SEQREC_INLINE F32 max(F32 a, F32 b) { return (F32)_mm256_max_ps((__m256)a, (__m256)b); }
SEQREC_INLINE F32 min(F32 a, F32 b) { return (F32)_mm256_min_ps((__m256)a, (__m256)b); }
#elif defined(__aarch64__)
SEQREC_INLINE F32 fma(F32 a, F32 b, F32 c) { return (F32)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
SEQREC_INLINE F64 fma(F64 a, F64 b, F64 c) { return (F64)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b); }
SEQREC_INLINE F32 max(F32 a, F32 b) { return a > b ? a : b; }
SEQREC_INLINE F32 min(F32 a, F32 b) { return a < b ? a : b; }
#elif defined(__SSE2__)
SEQREC_INLINE F32 fma(F32 a, F32 b, F32 c) { return a * b + c; }
SEQREC_INLINE F64 fma(F64 a, F64 b, F64 c) { return a * b + c; }
SEQREC_INLINE F32 max(F32 a, F32 b) { return (F32)_mm_max_ps((__m128)a, (__m128)b); }
SEQREC_INLINE F32 min(F32 a, F32 b) { return (F32)_mm_min_ps((__m128)a, (__m128)b); }
#else
SEQREC_INLINE F32 fma(F32 a, F32 b, F32 c) { return a * b + c; }
SEQREC_INLINE F64 fma(F64 a, F64 b, F64 c) { return a * b + c; }
SEQREC_INLINE F32 max(F32 a, F32 b) { return a > b ? a : b; }
SEQREC_INLINE F32 min(F32 a, F32 b) { return a < b ? a : b; }
#endif

SEQREC_INLINE F64 max(F64 a, F64 b) { return a > b ? a : b; }
SEQREC_INLINE F64 min(F64 a, F64 b) { return a < b ? a : b; }

SEQREC_INLINE F32 select(I32 mask, F32 where_true, F32 where_false) { return mask ? where_true : where_false; }
SEQREC_INLINE F64 select(I64 mask, F64 where_true, F64 where_false) { return mask ? where_true : where_false; }
SEQREC_INLINE I32 select(I32 mask, I32 where_true, I32 where_false) { return mask ? where_true : where_false; }

SEQREC_INLINE F32 abs(F32 x) { return (F32)((I32)x & 0x7fffffff); }
SEQREC_INLINE F32 copy_sign(F32 magnitude, F32 sign) {  // magnitude must not be negative
  return (F32)((I32)magnitude | ((I32)sign & (int32_t)0x80000000));
}

// ---- across lanes ---------------------------------------------------------------------------------------------------

// Lane i of a comparison's result -> bit i.
SEQREC_INLINE uint32_t mask_bits(I32 mask) {
#if defined(__AVX512F__) && defined(__AVX512DQ__)
  return _mm512_movepi32_mask((__m512i)mask);
#elif defined(__AVX2__)
  return (uint32_t)_mm256_movemask_ps((__m256)mask);
#elif defined(__SSE2__)
  return (uint32_t)_mm_movemask_ps((__m128)mask);
#else
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= (uint32_t)(mask[i] & 1) << i;
  return bits;
#endif
}
SEQREC_INLINE uint32_t mask_bits(I64 mask) {
#if defined(__AVX512F__) && defined(__AVX512DQ__)
  return _mm512_movepi64_mask((__m512i)mask);
#elif defined(__AVX2__)
  return (uint32_t)_mm256_movemask_pd((__m256d)mask);
#elif defined(__SSE2__)
  return (uint32_t)_mm_movemask_pd((__m128d)mask);
#else
  uint32_t bits = 0;
  for (int i = 0; i < kLanes64; ++i) bits |= (uint32_t)(mask[i] & 1) << i;
  return bits;
#endif
}
SEQREC_INLINE bool any(I32 mask) { return mask_bits(mask) != 0; }
SEQREC_INLINE bool any(I64 mask) { return mask_bits(mask) != 0; }

// Sum of the lanes by halving: (0 + n/2, 1 + n/2 + 1, …), then halves again. One order per tier.
SEQREC_INLINE float reduce_add(F32 v) {
#if defined(__AVX512F__)
  const __m512 w = (__m512)v;
  const __m256 y = _mm256_add_ps(_mm512_castps512_ps256(w), _mm256_castpd_ps(_mm512_extractf64x4_pd((__m512d)w, 1)));
  const __m128 x = _mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
#elif defined(__AVX2__)
  const __m256 y = (__m256)v;
  const __m128 x = _mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
#elif defined(__SSE2__)
  const __m128 x = (__m128)v;
#endif
#if defined(__SSE2__)
  const __m128 two = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
#else
  return (v[0] + v[2]) + (v[1] + v[3]);
#endif
}
SEQREC_INLINE double reduce_add(F64 v) {
#if defined(__AVX512F__)
  const __m512d w = (__m512d)v;
  const __m256d y = _mm256_add_pd(_mm512_castpd512_pd256(w), _mm512_extractf64x4_pd(w, 1));
  const __m128d x = _mm_add_pd(_mm256_castpd256_pd128(y), _mm256_extractf128_pd(y, 1));
#elif defined(__AVX2__)
  const __m256d y = (__m256d)v;
  const __m128d x = _mm_add_pd(_mm256_castpd256_pd128(y), _mm256_extractf128_pd(y, 1));
#elif defined(__SSE2__)
  const __m128d x = (__m128d)v;
#endif
#if defined(__SSE2__)
  return _mm_cvtsd_f64(_mm_add_sd(x, _mm_unpackhi_pd(x, x)));
#else
  return v[0] + v[1];
#endif
}

#if defined(__AVX512F__)
// rows[i] lane j -> rows[j] lane i.
SEQREC_INLINE void transpose(F32 (&rows)[16]) {
  __m512 pairs[16], quads[16];  // quads[4g + j]: column 4b + j of rows 4g … 4g + 3 in its quarter b
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    pairs[i] = _mm512_unpacklo_ps((__m512)rows[i], (__m512)rows[i + 1]);
    pairs[i + 1] = _mm512_unpackhi_ps((__m512)rows[i], (__m512)rows[i + 1]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const __m512d a = _mm512_castps_pd(pairs[i + j]), b = _mm512_castps_pd(pairs[i + j + 2]);
      quads[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
      quads[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512 even_low = _mm512_shuffle_f32x4(quads[j], quads[4 + j], 0x88);
    const __m512 odd_low = _mm512_shuffle_f32x4(quads[j], quads[4 + j], 0xdd);
    const __m512 even_high = _mm512_shuffle_f32x4(quads[8 + j], quads[12 + j], 0x88);
    const __m512 odd_high = _mm512_shuffle_f32x4(quads[8 + j], quads[12 + j], 0xdd);
    rows[j] = (F32)_mm512_shuffle_f32x4(even_low, even_high, 0x88);
    rows[4 + j] = (F32)_mm512_shuffle_f32x4(odd_low, odd_high, 0x88);
    rows[8 + j] = (F32)_mm512_shuffle_f32x4(even_low, even_high, 0xdd);
    rows[12 + j] = (F32)_mm512_shuffle_f32x4(odd_low, odd_high, 0xdd);
  }
}
#endif

}  // namespace seqrec_fast::SEQREC_TIER
