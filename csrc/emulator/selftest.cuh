// Small kernels that test the emulator. Each has a right form and forms with one planted defect of the kind that a GPU
// would punish some day and forgive today.
#pragma once

#include "common/device.cuh"

namespace seqrec_fast::emulator {

enum class Defect {
  kNone,
  kNoBarrier,          // shared memory is read before the other warps have written it
  kNoTrailingBarrier,  // shared memory is overwritten while other warps still read it
  kNoWait,             // an asynchronous copy is used before it has landed
  kWeakWait,           // as above: the wait allows one group too many in flight
  kOutOfBounds,        // a write just behind the shared memory that was asked for
  kInFlight,           // a thread leaves before its copies have landed
};

struct SelftestArguments {
  const float* in;
  float* out;
  int64_t size;  // elements of in
};

// out[i] = in[size - 1 - i] by way of shared memory; one block of `size` threads.
template <Defect kDefect>
__global__ void reverse(const SelftestArguments a) {
  float* const shared = reinterpret_cast<float*>(shared_memory());
  shared[threadIdx.x] = a.in[threadIdx.x];
  if (kDefect == Defect::kOutOfBounds && threadIdx.x == 0) shared[a.size] = 1.0f;
  if (kDefect != Defect::kNoBarrier) __syncthreads();
  a.out[threadIdx.x] = shared[a.size - 1 - threadIdx.x];
}

// out[i] = Σ_trip in[trip·n + neighbour of i], n threads, through two buffers that asynchronous copies fill one trip
// ahead: the pipeline of every tiled kernel. The neighbour is the one in the next warp.
template <Defect kDefect>
__global__ void pipeline(const SelftestArguments a) {
  const int n = blockDim.x, trips = int(a.size / (4 * n));
  float* const shared = reinterpret_cast<float*>(shared_memory());  // [2][n][4]
  const auto load = [&](int trip) {
    if (trip < trips)
      copy_async_16(shared + (trip % 2 * n + threadIdx.x) * 4, a.in + (int64_t{trip} * n + threadIdx.x) * 4, true);
    copy_async_commit();
  };
  float sum[4] = {};
  load(0);
  for (int trip = 0; trip < trips; ++trip) {
    load(trip + 1);
    if (kDefect == Defect::kWeakWait)
      copy_async_wait<2>();
    else if (kDefect != Defect::kNoWait)
      copy_async_wait<1>();
    if (kDefect != Defect::kNoBarrier) __syncthreads();
    const float* const row = shared + (trip % 2 * n + (threadIdx.x + 32) % n) * 4;
    for (int e = 0; e < 4; ++e) sum[e] += row[e];
    if (kDefect != Defect::kNoTrailingBarrier) __syncthreads();
  }
  if (kDefect != Defect::kInFlight)
    copy_async_wait<0>();
  else
    copy_async_16(shared + threadIdx.x * 4, a.in, true);
  for (int e = 0; e < 4; ++e) a.out[threadIdx.x * 4 + e] = sum[e];
}

// Barriers and warp operations that not every thread reaches.
enum class Divergence {
  kBarrierInOneWarp,
  kBarriersOfTwoBranches,
  kShuffleInHalfAWarp,
  kTwoWarpOperations,
  kBarrierAfterExit
};

template <Divergence kKind>
__global__ void diverge(const SelftestArguments a) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (kKind == Divergence::kBarrierInOneWarp && warp == 0) __syncthreads();
  if (kKind == Divergence::kBarriersOfTwoBranches) {
    if (warp == 0)
      __syncthreads();
    else
      __syncthreads();
  }
  if (kKind == Divergence::kShuffleInHalfAWarp && lane < 16) shuffle_xor(1.0f, 1);
  if (kKind == Divergence::kTwoWarpOperations) {
    uint32_t r[4];
    if (lane < 16)
      shuffle_xor(1.0f, 1);
    else
      load_matrices(r, shared_memory());
  }
  if (kKind == Divergence::kBarrierAfterExit) {
    if (threadIdx.x == 5) return;
    __syncthreads();
  }
  a.out[threadIdx.x] = 1.0f;
}

// out = what shared memory holds before anyone has written it.
__global__ inline void read_unwritten(const SelftestArguments a) {
  a.out[threadIdx.x] = reinterpret_cast<const float*>(shared_memory())[threadIdx.x];
}

__global__ inline void misaligned_copy(const SelftestArguments a) {
  copy_async_16(shared_memory() + 16, a.in + 1, true);
  copy_async_wait<0>();
}

// A grid of blocks: out[block·n + thread] = block's number.
__global__ inline void number_blocks(const SelftestArguments a) {
  const uint32_t block = blockIdx.y * gridDim.x + blockIdx.x;
  a.out[block * blockDim.x + threadIdx.x] = float(block);
}

// out[lane] = Σ over the lanes whose number differs from this one's in bit 2.
__global__ inline void shuffle(const SelftestArguments a) { a.out[threadIdx.x] = shuffle_xor(a.in[threadIdx.x], 4); }

// out (16×8) = rows (16×k) · weight (8×k)ᵀ on one warp, operands of 32-byte rows behind one another in `in`: what
// common/slab.cuh relies on. Product is one of its structs.
template <class Product>
__global__ void multiply(const SelftestArguments a) {
  const int lane = threadIdx.x;
  unsigned char* const shared = shared_memory();  // [24][32 bytes]
  if (lane < 24)
    for (int part = 0; part < 2; ++part)
      copy_async_16(shared + lane * 32 + part * 16, a.in + lane * 8 + part * 4, true);
  copy_async_commit();
  copy_async_wait<0>();
  __syncthreads();
  uint32_t rows[4], weight[4];
  float d[4] = {};
  load_matrices(rows, shared + lane % 16 * 32 + lane / 16 * 16);
  load_matrices(weight, shared + (16 + lane % 8) * 32 + lane / 8 % 2 * 16);
  for (int i = 0; i < 4; ++i) {
    Product::prepare(rows[i]);
    Product::prepare(weight[i]);
  }
  Product::multiply(d, rows, weight[0], weight[1]);
  for (int i = 0; i < 4; ++i) a.out[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = d[i];
}

}  // namespace seqrec_fast::emulator
