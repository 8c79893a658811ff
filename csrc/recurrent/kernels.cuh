// The recurrent GPU kernels. Device code only: it knows no torch and no PTX (common/device.cuh), and the emulator runs
// this very text on a CPU.
//
// lstm_step computes, in one kernel, both products of a step, the activations and the cell:
//     z = x·W_ihᵀ + b_ih + h·W_hhᵀ + b_hh        c' = σ(z_f)·c + σ(z_i)·tanh(z_g)        h' = σ(z_o)·tanh(c')
// Nothing of size [B, 4H] is written unless the gates are kept for a backward. There are two forms:
//
// lstm_step_streamed, below 16 rows. Bound: every weight read once, 4·H·(I + P)·sizeof(T) bytes at the bandwidth of L2
// or HBM. A warp owns one unit and streams its four weight rows, 512 bytes a load; the rows of x and h come from L1.
//
// lstm_step_tiled, from 16 rows. Bound: 8·B·H·(I + P) FLOPs on the tensor cores through mma.sync (about 62 % of what
// wgmma reaches on sm_90; fp32 at its full accuracy runs on the FMA units). A block owns a tile of rows × units with
// all four gates of those units, so that a thread ends with i, f, g, o of its cells in its own registers.
//
// A row's sums run over k in the same order whichever row it is, whatever rows stand beside it, and in every tile:
// below and from 16 rows a row has the same bits in any batch.
#pragma once

#include "common/device.cuh"
#include "common/launch_shape.h"
#include "common/slab.cuh"

namespace seqrec_fast {

// Contiguous arrays whose start is 16-byte aligned. c_next may be c (each element is read and written by one thread);
// h_next may not be h, nor x (every block reads all of a row).
template <class T>
struct LstmStepArguments {
  int64_t batch, input, projected, hidden;  // B, I, P, H
  const T *x, *h, *c;                       // [B, I]  [B, P]  [B, H]
  const T *w_ih, *w_hh;                     // [4H, I]  [4H, P]
  const T *b_ih, *b_hh;                     // [4H] or null
  T *h_next, *c_next, *gates;               // [B, H]  [B, H]  [B, 4H] or null
};

// ---- the cell --------------------------------------------------------------------------------------------

struct Cell {
  float i, f, g, o, c, h;
};

template <class T>
__device__ __forceinline__ Cell lstm_cell(float z_i, float z_f, float z_g, float z_o, float c) {
  Cell y;
  y.i = sigmoid<T>(z_i);
  y.f = sigmoid<T>(z_f);
  y.g = hyperbolic_tangent<T>(z_g);
  y.o = sigmoid<T>(z_o);
  y.c = multiply_add(y.f, c, y.i * y.g);
  y.h = y.o * hyperbolic_tangent<T>(y.c);
  return y;
}

template <class T>
__device__ __forceinline__ float bias_of(const LstmStepArguments<T>& a, int gate, int64_t unit) {
  const int64_t at = gate * a.hidden + unit;
  return (a.b_ih ? to_float(a.b_ih[at]) : 0.0f) + (a.b_hh ? to_float(a.b_hh[at]) : 0.0f);
}

// ---- few rows: stream the weights ------------------------------------------------------------------------

constexpr int kStreamedWarps = 4;  // and as many units a block

// The elements of 16 bytes from p[0], those from `left` on as 0. kWhole: p is aligned and left is 0 or less, or enough.
template <bool kWhole, class T, int kCount>
__device__ __forceinline__ void load_elements(float (&to)[kCount], const T* p, int64_t left) {
  if constexpr (kWhole) {
    const auto pack = load_pack<kCount>(p);
#pragma unroll
    for (int e = 0; e < kCount; ++e) to[e] = to_float(pack.value[e]);
  } else {
#pragma unroll
    for (int e = 0; e < kCount; ++e) to[e] = e < left ? to_float(p[e]) : 0.0f;
  }
}

// z[gate][row] += rows[row] · weight[gate·hidden + unit], this lane's share of k: 16 bytes of every 512.
template <bool kWhole, int kRows, class T>
__device__ __forceinline__ void add_lane_dots(float (&z)[4][kRows], const T* rows, const T* weight, int64_t width,
                                              int batch, int64_t gate_stride, int lane) {
  constexpr int kVector = 16 / sizeof(T);
  // Two trips at once keep 4 KB a warp in flight; with 16 rows the registers hold one, and the arithmetic is the limit
  // anyway.
  [[maybe_unused]] constexpr int kTrips = kRows < 16 ? 2 : 1;
#pragma unroll kTrips
  for (int64_t k = lane * kVector; k < width; k += 32 * kVector) {
    float w[4][kVector];
#pragma unroll
    for (int gate = 0; gate < 4; ++gate) load_elements<kWhole>(w[gate], weight + gate * gate_stride + k, width - k);
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      if (row >= batch) break;
      float v[kVector];
      load_elements<kWhole>(v, rows + row * width + k, width - k);
#pragma unroll
      for (int gate = 0; gate < 4; ++gate)
#pragma unroll
        for (int e = 0; e < kVector; ++e) z[gate][row] = multiply_add(w[gate][e], v[e], z[gate][row]);
    }
  }
}

// Adds z over the lanes. While there is more than one row, a lane gives half of its rows away for the other half of its
// partner's: z[gate][0] ends as the sum of row lane / (32 / kRows), in all lanes of that row, after 4·(kRows +
// log₂(32/kRows)) shuffles and not 4·5·kRows. The tree of sums is the same for every kRows.
template <int kHeld, int kPartner, int kRows>
__device__ __forceinline__ void add_over_lanes(float (&z)[4][kRows], int lane) {
  if constexpr (kPartner > 0) {
#pragma unroll
    for (int gate = 0; gate < 4; ++gate) {
      if constexpr (kHeld > 1) {
        const bool upper = lane & kPartner;
#pragma unroll
        for (int row = 0; row < kHeld / 2; ++row) {
          const float lower_row = z[gate][row], upper_row = z[gate][row + kHeld / 2];
          z[gate][row] = (upper ? upper_row : lower_row) + shuffle_xor(upper ? lower_row : upper_row, kPartner);
        }
      } else {
        z[gate][0] += shuffle_xor(z[gate][0], kPartner);
      }
    }
    add_over_lanes<(kHeld > 1 ? kHeld / 2 : 1), kPartner / 2>(z, lane);
  }
}

// Grid: blocks of kStreamedWarps units. batch <= kRows, kRows a power of two of at most 16.
template <class T, int kRows>
__global__ void __launch_bounds__(32 * kStreamedWarps) lstm_step_streamed(const LstmStepArguments<T> a) {
  const int lane = threadIdx.x % 32;
  const int64_t unit = int64_t{blockIdx.x} * kStreamedWarps + threadIdx.x / 32;
  if (unit >= a.hidden) return;  // a whole warp

  // What the end needs is asked for first, so that its latency is hidden.
  const int row = lane / (32 / kRows), batch = int(a.batch);
  const bool finishes = row < batch && lane % (32 / kRows) == 0;
  const int64_t at = row * a.hidden + unit;
  const float c = finishes ? to_float(a.c[at]) : 0.0f;
  float bias[4];
#pragma unroll
  for (int gate = 0; gate < 4; ++gate) bias[gate] = bias_of(a, gate, unit);

  float z[4][kRows] = {};
#pragma unroll 1
  for (int factor = 0; factor < 2; ++factor) {
    const int64_t width = factor == 0 ? a.input : a.projected;
    const T* rows = factor == 0 ? a.x : a.h;
    const T* weight = (factor == 0 ? a.w_ih : a.w_hh) + unit * width;
    const int64_t gate_stride = a.hidden * width;
    if (width % (16 / sizeof(T)) == 0)
      add_lane_dots<true>(z, rows, weight, width, batch, gate_stride, lane);
    else
      add_lane_dots<false>(z, rows, weight, width, batch, gate_stride, lane);
  }
  add_over_lanes<kRows, 16>(z, lane);

  if (!finishes) return;
  const Cell y = lstm_cell<T>(z[0][0] + bias[0], z[1][0] + bias[1], z[2][0] + bias[2], z[3][0] + bias[3], c);
  a.c_next[at] = from_float<T>(y.c);
  a.h_next[at] = from_float<T>(y.h);
  if (a.gates) {
    T* gates = a.gates + row * 4 * a.hidden + unit;
    gates[0] = from_float<T>(y.i);
    gates[a.hidden] = from_float<T>(y.f);
    gates[2 * a.hidden] = from_float<T>(y.g);
    gates[3 * a.hidden] = from_float<T>(y.o);
  }
}

// ---- many rows: tiles ------------------------------------------------------------------------------------

// A block's tile. Warps lie kUnits / 8 across and kRows / kWarpRows down; each owns kWarpRows rows × 8 units × 4 gates.
// The registers must allow `blocks` of them on a multiprocessor.
template <int rows, int units, int warp_rows, int stages, int blocks>
struct StepTile {
  static constexpr int kRows = rows, kUnits = units, kWarpRows = warp_rows, kStages = stages, kBlocks = blocks;
  static constexpr int kWeightRows = 4 * kUnits;
  static constexpr int kWarpsAcross = kUnits / 8;
  static constexpr int kThreads = 32 * kWarpsAcross * (kRows / kWarpRows);
  static constexpr int kStageBytes = (kRows + kWeightRows) * kSlabBytes;
  static constexpr int kSharedBytes = kStages * kStageBytes;
  static_assert(kRows % kWarpRows == 0 && kWarpRows % 16 == 0 && kUnits % 8 == 0 && kStages >= 2);
};

// A thread's two units of one row: at once where `even` says that they are aligned, else the `count` that exist.
template <class T>
__device__ __forceinline__ void load_units(float (&to)[2], const T* p, bool even, int count) {
  if (even) {
    const auto pack = load_pack<2>(p);
    to[0] = to_float(pack.value[0]);
    to[1] = to_float(pack.value[1]);
  } else {
    to[0] = to_float(p[0]);
    to[1] = count == 2 ? to_float(p[1]) : 0.0f;
  }
}
template <class T>
__device__ __forceinline__ void store_units(T* p, float first, float second, bool even, int count) {
  if (even) {
    store_pack(p, Pack<T, 2>{from_float<T>(first), from_float<T>(second)});
  } else {
    p[0] = from_float<T>(first);
    if (count == 2) p[1] = from_float<T>(second);
  }
}

// Grid: x over row tiles, y over unit tiles: blocks that run together share their weights.
template <class Product, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    lstm_step_tiled(const LstmStepArguments<typename Product::Element> a) {
  using T = typename Product::Element;
  constexpr int kSlab = kSlabBytes / sizeof(T), kRowTiles = Tile::kWarpRows / 16;
  unsigned char* const shared = shared_memory();  // [stage][rows of x or h, then of the weight][128 bytes]
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_unit = warp % Tile::kWarpsAcross * 8, warp_row = warp / Tile::kWarpsAcross * Tile::kWarpRows;
  const int64_t block_row = int64_t{blockIdx.x} * Tile::kRows, block_unit = int64_t{blockIdx.y} * Tile::kUnits;

  const int64_t input_slabs = ceil_div(a.input, kSlab), slabs = input_slabs + ceil_div(a.projected, kSlab);
  const auto load = [&](int64_t slab, int stage) {
    if (slab < slabs) {
      const bool is_input = slab < input_slabs;
      const int64_t width = is_input ? a.input : a.projected, k = (is_input ? slab : slab - input_slabs) * kSlab;
      const T* const weight = is_input ? a.w_ih : a.w_hh;
      unsigned char* to = shared + stage * Tile::kStageBytes;
      load_rows<Tile::kRows, Tile::kThreads>(to, is_input ? a.x : a.h, block_row, a.batch, width, k);
      to += Tile::kRows * kSlabBytes;
#pragma unroll
      for (int gate = 0; gate < 4; ++gate, to += Tile::kUnits * kSlabBytes)
        load_rows<Tile::kUnits, Tile::kThreads>(to, weight + gate * a.hidden * width, block_unit, a.hidden, width, k);
    }
    copy_async_commit();  // also when empty: the waits count groups
  };

  // 1. The products. While one slab is multiplied, the next kStages - 1 are on their way.
  float z[4][kRowTiles][4] = {};
#pragma unroll 1
  for (int stage = 0; stage < Tile::kStages - 1; ++stage) load(stage, stage);
  int stage = 0;
  for (int64_t slab = 0; slab < slabs; ++slab) {
    copy_async_wait<Tile::kStages - 2>();
    __syncthreads();  // this slab is there for everyone, and everyone has left the stage that is filled next
    load(slab + Tile::kStages - 1, stage == 0 ? Tile::kStages - 1 : stage - 1);
    const unsigned char* const rows = shared + stage * Tile::kStageBytes;
    multiply_slab<Product, Tile::kUnits>(z, rows, rows + Tile::kRows * kSlabBytes, warp_row, warp_unit, lane);
    stage = stage == Tile::kStages - 1 ? 0 : stage + 1;
  }

  // 2. The cells: this thread's two units of every eighth row. All loads first: they wait for memory once.
  const int64_t unit = block_unit + warp_unit + 2 * (lane % 4), first_row = block_row + warp_row + lane / 4;
  if (unit >= a.hidden) return;
  const int count = unit + 1 < a.hidden ? 2 : 1;
  const bool even = a.hidden % 2 == 0;  // then there are two, and they are aligned in every row
  float bias[4][2], c[2 * kRowTiles][2];
#pragma unroll
  for (int i = 0; i < 2 * kRowTiles; ++i)
    if (first_row + 8 * i < a.batch) load_units(c[i], a.c + (first_row + 8 * i) * a.hidden + unit, even, count);
#pragma unroll
  for (int gate = 0; gate < 4; ++gate)
#pragma unroll
    for (int e = 0; e < 2; ++e) bias[gate][e] = e < count ? bias_of(a, gate, unit + e) : 0.0f;
#pragma unroll
  for (int i = 0; i < 2 * kRowTiles; ++i) {
    const int64_t row = first_row + 8 * i, at = row * a.hidden + unit;
    if (row >= a.batch) return;
    Cell y[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const auto pre = [&](int gate) { return z[gate][i / 2][i % 2 * 2 + e] + bias[gate][e]; };
      y[e] = lstm_cell<T>(pre(0), pre(1), pre(2), pre(3), c[i][e]);
    }
    store_units(a.c_next + at, y[0].c, y[1].c, even, count);
    store_units(a.h_next + at, y[0].h, y[1].h, even, count);
    if (a.gates) {
      T* const gates = a.gates + row * 4 * a.hidden + unit;
      store_units(gates, y[0].i, y[1].i, even, count);
      store_units(gates + a.hidden, y[0].f, y[1].f, even, count);
      store_units(gates + 2 * a.hidden, y[0].g, y[1].g, even, count);
      store_units(gates + 3 * a.hidden, y[0].o, y[1].o, even, count);
    }
  }
}

// ---- backward --------------------------------------------------------------------------------------------

template <class T>
struct LstmStepBackwardArguments {
  int64_t batch, hidden;
  const T *grad_h, *grad_c, *c, *c_next;  // [B, H]
  const T* gates;                         // [B, 4H]
  T *dz, *dc;                             // [B, 4H]  [B, H]
};

constexpr int kGradientThreads = 256;

// The gradients of the pre-activations and of c; what is left of the backward are products with dz. Bound: 13 elements
// a cell at the bandwidth of memory. kVector units a thread, where H divides by it.
template <class T, int kVector>
__global__ void __launch_bounds__(kGradientThreads) lstm_step_gate_gradients(const LstmStepBackwardArguments<T> a) {
  const int64_t at = (int64_t{blockIdx.x} * kGradientThreads + threadIdx.x) * kVector;
  if (at >= a.batch * a.hidden) return;
  const int64_t row = at / a.hidden, gate_at = at + row * 3 * a.hidden;
  const auto grad_h = load_pack<kVector>(a.grad_h + at), grad_c = load_pack<kVector>(a.grad_c + at);
  const auto c = load_pack<kVector>(a.c + at), c_next = load_pack<kVector>(a.c_next + at);
  Pack<T, kVector> gates[4], dz[4], dc;
#pragma unroll
  for (int gate = 0; gate < 4; ++gate) gates[gate] = load_pack<kVector>(a.gates + gate_at + gate * a.hidden);
#pragma unroll
  for (int e = 0; e < kVector; ++e) {
    const float i = to_float(gates[0].value[e]), f = to_float(gates[1].value[e]);
    const float g = to_float(gates[2].value[e]), o = to_float(gates[3].value[e]);
    const float tanh_c = hyperbolic_tangent<T>(to_float(c_next.value[e])), dh = to_float(grad_h.value[e]);
    const float dc_next = to_float(grad_c.value[e]) + dh * o * (1.0f - tanh_c * tanh_c);
    dz[0].value[e] = from_float<T>(dc_next * g * i * (1.0f - i));
    dz[1].value[e] = from_float<T>(dc_next * to_float(c.value[e]) * f * (1.0f - f));
    dz[2].value[e] = from_float<T>(dc_next * i * (1.0f - g * g));
    dz[3].value[e] = from_float<T>(dh * tanh_c * o * (1.0f - o));
    dc.value[e] = from_float<T>(dc_next * f);
  }
#pragma unroll
  for (int gate = 0; gate < 4; ++gate) store_pack(a.dz + gate_at + gate * a.hidden, dz[gate]);
  store_pack(a.dc + at, dc);
}

}  // namespace seqrec_fast
