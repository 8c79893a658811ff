// Matrix products through shared memory, 128 bytes of k at a time.
//
// Operands pass through shared memory in slabs: 128 bytes of k of every row of the tile, one row after the other. The
// eight 16-byte chunks of row r stand in the order chunk ^ (r % 8), so that the same chunk of eight neighbouring rows
// lies in eight different sets of banks: neither the copies nor the reads of either product have a bank conflict.
#pragma once

#include "common/device.cuh"

namespace seqrec_fast {

constexpr int kSlabBytes = 128;

// How a tile of 16 rows is multiplied with 8 weight rows over 32 bytes of both: 16 values of 16 bits, or 8 of 32 bits.
// The fragments of all three lie alike in registers, and ldmatrix fills them alike.
struct Bf16Product {
  using Element = bf16;
  static constexpr bool kTensorCores = true;
  __device__ __forceinline__ static void prepare(uint32_t&) {}
  __device__ __forceinline__ static void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    mma_m16n8k16_bf16(d, a, b0, b1);
  }
};
struct F16Product {
  using Element = f16;
  static constexpr bool kTensorCores = true;
  __device__ __forceinline__ static void prepare(uint32_t&) {}
  __device__ __forceinline__ static void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    mma_m16n8k16_f16(d, a, b0, b1);
  }
};
struct Tf32Product {
  using Element = float;
  static constexpr bool kTensorCores = true;
  // The tensor core drops the low 13 bits: rounding first halves the error and removes its bias.
  __device__ __forceinline__ static void prepare(uint32_t& bits) { bits = round_to_tf32(bits); }
  __device__ __forceinline__ static void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    mma_m16n8k8_tf32(d, a, b0, b1);
  }
};
// fp32-accurate: fused multiply-adds.
struct F32Product {
  using Element = float;
  static constexpr bool kTensorCores = false;
};

__device__ __forceinline__ int slab_offset(int row, int chunk) { return row * kSlabBytes + (chunk ^ (row % 8)) * 16; }

// Brings the 128 bytes from element k on of rows first…first + kCount - 1 of a matrix [rows, width] into shared memory.
// What lies outside becomes 0.
template <int kCount, int kThreads, class T>
__device__ __forceinline__ void load_rows(unsigned char* slab, const T* matrix, int64_t first, int64_t rows,
                                          int64_t width, int64_t k) {
  constexpr int kVector = 16 / sizeof(T), kStep = kThreads / 8;  // eight threads a row
  static_assert(kCount % kStep == 0 && kStep % 8 == 0);
  const int row = threadIdx.x / 8, chunk = threadIdx.x % 8;
  unsigned char* to = slab + slab_offset(row, chunk);
  k += chunk * kVector;
  const int64_t last = rows - first;  // of the tile's rows, the first that does not exist
  const T* from = matrix + (first + row) * width + k;
  if (width % kVector == 0) {
#pragma unroll
    for (int step = 0; step < kCount; step += kStep) {
      const bool inside = row + step < last && k < width;
      copy_async_16(to + step * kSlabBytes, inside ? from : matrix, inside);
      from += kStep * width;
    }
  } else {  // rows of such a width are not aligned: element by element, without the asynchronous copy
#pragma unroll 1
    for (int step = 0; step < kCount; step += kStep) {
      T* const elements = reinterpret_cast<T*>(to + step * kSlabBytes);
#pragma unroll 1
      for (int e = 0; e < kVector; ++e) elements[e] = row + step < last && k + e < width ? from[e] : T{};
      from += kStep * width;
    }
  }
}

// z[gate][m][·] += rows · weightᵀ of one slab for a warp's 16·kRowTiles rows from warp_row on and its 8 units from
// warp_unit on, of which the weight slab has kGateRows for each of four gates. The layout is that of mma.sync's
// accumulator, also where it is not used: z[gate][m][2·half + e] is row m·16 + half·8 + lane / 4 and unit 2·(lane % 4)
// + e.
template <class Product, int kGateRows, int kRowTiles>
__device__ __forceinline__ void multiply_slab(float (&z)[4][kRowTiles][4], const unsigned char* rows,
                                              const unsigned char* weight, int warp_row, int warp_unit, int lane) {
  if constexpr (Product::kTensorCores) {
#pragma unroll
    for (int chunk = 0; chunk < 8; chunk += 4) {  // four chunks are two steps of mma.sync
      uint32_t b[4][4];
#pragma unroll
      for (int gate = 0; gate < 4; ++gate) {
        load_matrices(b[gate], weight + slab_offset(gate * kGateRows + warp_unit + lane % 8, chunk + lane / 8));
#pragma unroll
        for (uint32_t& bits : b[gate]) Product::prepare(bits);
      }
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
        for (int step = 0; step < 2; ++step) {
          uint32_t a[4];
          load_matrices(a, rows + slab_offset(warp_row + m * 16 + lane % 16, chunk + 2 * step + lane / 16));
#pragma unroll
          for (uint32_t& bits : a) Product::prepare(bits);
#pragma unroll
          for (int gate = 0; gate < 4; ++gate)
            Product::multiply(z[gate][m], a, b[gate][2 * step], b[gate][2 * step + 1]);
        }
    }
  } else {
    // 8 row vectors and 8 weight vectors of four k serve 256 multiply-adds.
#pragma unroll 1
    for (int chunk = 0; chunk < 8; ++chunk) {
      Pack<float, 4> w[4][2];
#pragma unroll
      for (int gate = 0; gate < 4; ++gate)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int row = gate * kGateRows + warp_unit + 2 * (lane % 4) + e;
          w[gate][e] = load_pack<4>(reinterpret_cast<const float*>(weight + slab_offset(row, chunk)));
        }
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = warp_row + m * 16 + half * 8 + lane / 4;
          const auto v = load_pack<4>(reinterpret_cast<const float*>(rows + slab_offset(row, chunk)));
#pragma unroll
          for (int gate = 0; gate < 4; ++gate)
#pragma unroll
            for (int e = 0; e < 2; ++e)
#pragma unroll
              for (int k = 0; k < 4; ++k) {
                float& sum = z[gate][m][2 * half + e];
                sum = multiply_add(v.value[k], w[gate][e].value[k], sum);
              }
        }
    }
  }
}

}  // namespace seqrec_fast
