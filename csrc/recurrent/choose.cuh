// Which kernel runs a step, and how it is launched: once for the GPU and the emulator. `launch` is either one's
// launcher: launch.template operator()<kernel>(LaunchShape, arguments).
#pragma once

#include "recurrent/kernels.cuh"

namespace seqrec_fast {

// From here on a step is tiled: a tile of mma.sync has 16 rows, and fewer rows than that are bound by the bytes of the
// weights. The one limit at which the bits of a row may change: all tiles add the same products in the same order.
constexpr int64_t kTiledFrom = 16;

// Blocks of 10 KB a stage, four stages: many of them for little work.
using SmallTile = StepTile<16, 16, 16, 4, 4>;
// Reads 0.3 of the operand bytes of the small tile. Two blocks of 72 KB fit a multiprocessor.
using MediumTile = StepTile<64, 32, 64, 3, 2>;
// Two thirds of the bytes of the medium tile. Two blocks of 96 KB fit a multiprocessor of sm_90, one fits one of sm_80.
using LargeTile = StepTile<128, 32, 64, 3, 2>;

// The fewest blocks for which a tile is taken. Derived, not measured: a medium block lasts as long as eight small ones,
// which have their multiprocessor to themselves until there are some 256; a large one as long as two medium ones, of
// which two fit each of 108 (A100) or 132 (H100) multiprocessors.
constexpr int64_t kMediumFromBlocks = 32, kLargeFromBlocks = 128;

template <class Tile>
int64_t blocks_of(int64_t batch, int64_t hidden) {
  return ceil_div(batch, Tile::kRows) * ceil_div(hidden, Tile::kUnits);
}

template <class Product, class Tile, class Launch>
void launch_tiled(const LstmStepArguments<typename Product::Element>& a, Launch&& launch) {
  const LaunchShape shape{uint32_t(ceil_div(a.batch, Tile::kRows)), uint32_t(ceil_div(a.hidden, Tile::kUnits)),
                          Tile::kThreads, Tile::kSharedBytes};
  launch.template operator()<lstm_step_tiled<Product, Tile>>(shape, a);
}

template <int kRows, class T, class Launch>
void launch_streamed(const LstmStepArguments<T>& a, Launch&& launch) {
  const LaunchShape shape{uint32_t(ceil_div(a.hidden, kStreamedWarps)), 1, 32 * kStreamedWarps, 0};
  launch.template operator()<lstm_step_streamed<T, kRows>>(shape, a);
}

// batch and hidden are not 0. Product: how the tiled form multiplies elements of its type.
template <class Product, class Launch>
void launch_lstm_step(const LstmStepArguments<typename Product::Element>& a, Launch&& launch) {
  if (a.batch == 1) return launch_streamed<1>(a, launch);
  if (a.batch <= 4) return launch_streamed<4>(a, launch);
  if (a.batch < kTiledFrom) return launch_streamed<16>(a, launch);
  if (blocks_of<LargeTile>(a.batch, a.hidden) >= kLargeFromBlocks) return launch_tiled<Product, LargeTile>(a, launch);
  if (blocks_of<MediumTile>(a.batch, a.hidden) >= kMediumFromBlocks)
    return launch_tiled<Product, MediumTile>(a, launch);
  return launch_tiled<Product, SmallTile>(a, launch);
}

template <class T, class Launch>
void launch_lstm_step_gate_gradients(const LstmStepBackwardArguments<T>& a, Launch&& launch) {
  const int vector = a.hidden % 4 == 0 ? 4 : 1;
  const LaunchShape shape{uint32_t(ceil_div(a.batch * a.hidden, int64_t{kGradientThreads} * vector)), 1,
                          kGradientThreads, 0};
  if (vector == 4)
    launch.template operator()<lstm_step_gate_gradients<T, 4>>(shape, a);
  else
    launch.template operator()<lstm_step_gate_gradients<T, 1>>(shape, a);
}

}  // namespace seqrec_fast
