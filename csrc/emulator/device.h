// The functions of common/device_ptx.cuh with bodies for a CPU. What an instruction only promises approximately is as
// wrong here as its documentation allows.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "emulator/cuda.h"

namespace seqrec_fast {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// ---- values ----------------------------------------------------------------------------------------------

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return std::bit_cast<float>(uint32_t{x.bits} << 16); }
inline float to_float(f16 x) { return float(std::bit_cast<_Float16>(x.bits)); }

template <class T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline bf16 from_float<bf16>(float x) {
  if (std::isnan(x)) return {0x7FFF};
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return {uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}
template <>
inline f16 from_float<f16>(float x) {
  return {std::bit_cast<uint16_t>(_Float16(x))};
}

// To nearest, ties away from zero: 10 bits of fraction stay.
inline uint32_t round_to_tf32(uint32_t bits) {
  const bool finite = (bits & 0x7F800000) != 0x7F800000;
  return finite ? (bits + 0x1000) & 0xFFFFE000 : bits;
}

inline float multiply_add(float a, float b, float c) { return std::fma(a, b, c); }
inline float exp_precise(float x) { return std::exp(x); }
inline float tanh_precise(float x) { return std::tanh(x); }
inline float exp_fast(float x) { return std::exp(x); }
inline float reciprocal_fast(float x) { return 1.0f / x; }
// Relative error 2⁻¹¹, always towards zero.
inline float tanh_approximate(float x) {
  const float y = std::tanh(x);
  return std::isnan(y) ? y : std::bit_cast<float>(std::bit_cast<uint32_t>(y) & 0xFFFFF000);
}

// ---- memory ----------------------------------------------------------------------------------------------

inline void require_aligned(const void* p, int bytes) {
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0) throw emulator::Error("an access to a misaligned address");
}

template <class Word>
void store_global(Word* p, Word word) {
  *p = word;
}

inline unsigned char* shared_memory() { return emulator::Machine::instance().shared_memory(); }

inline void copy_async_16(void* to, const void* from, bool valid) {
  require_aligned(to, 16);
  require_aligned(from, 16);
  emulator::Machine::instance().copy_async({to, valid ? from : nullptr});
}
inline void copy_async_commit() { emulator::Machine::instance().commit_copies(); }
template <int kPending>
void copy_async_wait() {
  emulator::Machine::instance().wait_for_copies(kPending);
}

// ---- warps -----------------------------------------------------------------------------------------------

namespace emulator {

// Hands `mine` to the collective `run`, which sees the arguments of all 32 lanes, and returns when all have arrived.
template <class Lane, void (*run)(Lane* const*)>
void together(const char* name, Lane& mine) {
  static const Collective kWhat{name, [](void* const* lanes) {
                                  Lane* typed[kWarpSize];
                                  for (int i = 0; i < kWarpSize; ++i) typed[i] = static_cast<Lane*>(lanes[i]);
                                  run(typed);
                                }};
  Machine::instance().collective(kWhat, &mine);
}

struct ShuffleLane {
  float value, result;
  int partner;  // lane ^ partner
};
inline void shuffle_lanes(ShuffleLane* const* lanes) {
  for (int i = 0; i < kWarpSize; ++i) {
    if (lanes[i]->partner != lanes[0]->partner) throw Error("the lanes of a warp shuffle with different masks");
    lanes[i]->result = lanes[i ^ lanes[i]->partner]->value;
  }
}

struct MatricesLane {
  const void* row;
  uint32_t* result;
};
inline void load_matrices_lanes(MatricesLane* const* lanes) {
  for (int matrix = 0; matrix < 4; ++matrix)
    for (int i = 0; i < kWarpSize; ++i) {
      const auto* row = static_cast<const unsigned char*>(lanes[matrix * 8 + i / 4]->row);
      std::memcpy(&lanes[i]->result[matrix], row + i % 4 * 4, 4);
    }
}

struct MmaLane {
  float* d;
  const uint32_t* a;
  uint32_t b[2];
};

// The value `part` of a register as a float: T is bf16, f16 or float (of which a register holds one).
template <class T>
float element_of(uint32_t bits, int part) {
  if constexpr (sizeof(T) == 4)
    return std::bit_cast<float>(bits & 0xFFFFE000);  // what tf32 hardware reads
  else
    return to_float(T{uint16_t(bits >> 16 * part)});
}

// d (16×8) += a (16×k) · b (k×8). A register covers kPer neighbouring k; lane = 4·group + place.
template <class T>
void mma_lanes(MmaLane* const* lanes) {
  constexpr int kPer = 4 / sizeof(T), kDepth = 8 * kPer;
  float a[16][kDepth], b[kDepth][8];
  for (int i = 0; i < kWarpSize; ++i)
    for (int part = 0; part < kPer; ++part) {
      const int group = i / 4, k = i % 4 * kPer + part;
      for (int r = 0; r < 4; ++r) a[group + r % 2 * 8][k + r / 2 * 4 * kPer] = element_of<T>(lanes[i]->a[r], part);
      for (int r = 0; r < 2; ++r) b[k + r * 4 * kPer][group] = element_of<T>(lanes[i]->b[r], part);
    }
  for (int i = 0; i < kWarpSize; ++i)
    for (int r = 0; r < 4; ++r) {
      float& sum = lanes[i]->d[r];
      for (int k = 0; k < kDepth; ++k) sum += a[i / 4 + r / 2 * 8][k] * b[k][i % 4 * 2 + r % 2];
    }
}

template <class T>
void mma(const char* name, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  MmaLane mine{d, a, {b0, b1}};
  together<MmaLane, mma_lanes<T>>(name, mine);
}

}  // namespace emulator

inline float shuffle_xor(float x, int lanes) {
  emulator::ShuffleLane mine{x, 0.0f, lanes};
  emulator::together<emulator::ShuffleLane, emulator::shuffle_lanes>("shuffle_xor", mine);
  return mine.result;
}

inline void load_matrices(uint32_t (&r)[4], const void* row) {
  require_aligned(row, 16);
  emulator::MatricesLane mine{row, r};
  emulator::together<emulator::MatricesLane, emulator::load_matrices_lanes>("load_matrices", mine);
}

inline void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulator::mma<bf16>("mma_m16n8k16_bf16", d, a, b0, b1);
}
inline void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulator::mma<f16>("mma_m16n8k16_f16", d, a, b0, b1);
}
inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulator::mma<float>("mma_m16n8k8_tf32", d, a, b0, b1);
}

}  // namespace seqrec_fast
