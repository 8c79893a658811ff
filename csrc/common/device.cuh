// What kernels are written with. Everything that is not plain C++ (PTX, intrinsics, shared memory, shuffles) hides
// behind the functions of device_ptx.cuh; the emulator has the same functions with bodies for a CPU. So a kernels.cuh
// is one text for both.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__CUDACC__)
#include "common/device_ptx.cuh"
#else
#include "emulator/device.h"
#endif

namespace seqrec_fast {

// kCount neighbours in memory, moved by one instruction.
template <class T, int kCount>
struct Pack {
  T value[kCount];
};

template <int kBytes>
struct WordOf;
template <>
struct WordOf<16> {
  using type = uint4;
};
template <>
struct WordOf<8> {
  using type = uint2;
};
template <>
struct WordOf<4> {
  using type = uint32_t;
};
template <>
struct WordOf<2> {
  using type = uint16_t;
};

template <int kCount, class T>
__device__ __forceinline__ Pack<T, kCount> load_pack(const T* p) {
  using Word = typename WordOf<kCount * sizeof(T)>::type;
  require_aligned(p, sizeof(Word));
  const Word word = *reinterpret_cast<const Word*>(p);
  Pack<T, kCount> pack;
  memcpy(&pack, &word, sizeof word);
  return pack;
}

// To global memory.
template <int kCount, class T>
__device__ __forceinline__ void store_pack(T* p, const Pack<T, kCount>& pack) {
  using Word = typename WordOf<kCount * sizeof(T)>::type;
  require_aligned(p, sizeof(Word));
  Word word;
  memcpy(&word, &pack, sizeof word);
  store_global(reinterpret_cast<Word*>(p), word);
}

// The activations, as exact as the result's type can show. fp32: libm (2 ulp). fp16: two MUFU instructions, absolute
// error 2e-7. bf16: one MUFU instruction, relative error 2⁻¹¹, a quarter of what rounding to bf16 adds.
template <class T>
__device__ __forceinline__ float sigmoid(float x);
template <>
__device__ __forceinline__ float sigmoid<float>(float x) {
  return 1.0f / (1.0f + exp_precise(-x));
}
template <>
__device__ __forceinline__ float sigmoid<f16>(float x) {
  return reciprocal_fast(1.0f + exp_fast(-x));
}
template <>
__device__ __forceinline__ float sigmoid<bf16>(float x) {
  return 0.5f * tanh_approximate(0.5f * x) + 0.5f;
}

template <class T>
__device__ __forceinline__ float hyperbolic_tangent(float x);
template <>
__device__ __forceinline__ float hyperbolic_tangent<float>(float x) {
  return tanh_precise(x);
}
template <>
__device__ __forceinline__ float hyperbolic_tangent<f16>(float x) {
  return 1.0f - 2.0f * reciprocal_fast(1.0f + exp_fast(2.0f * x));
}
template <>
__device__ __forceinline__ float hyperbolic_tangent<bf16>(float x) {
  return tanh_approximate(x);
}

}  // namespace seqrec_fast
