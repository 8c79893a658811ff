// Which kernel runs a step, and how it is launched: once for the GPU and the emulator. `launch` is either one's
// launcher: launch.template operator()<kernel>(LaunchShape, arguments).
#pragma once

#include "recurrent/kernels.cuh"

namespace seqrec_fast {

// The classes of a forward step, by rows. Within a class a row's bits do not depend on the rest of the batch.
constexpr int64_t kTiledFrom = 16, kMediumFrom = 64, kLargeFrom = 256;

// 16 rows: little work, so the unit tile is small for the sake of more blocks, and four stages keep 30 KB a block in
// flight.
using SmallTile = StepTile<16, 16, 16, 4, 4>;
// Two blocks of 72 KB a multiprocessor.
using MediumTile = StepTile<64, 32, 64, 3, 2>;
// Half the weight traffic of the medium tile.
using LargeTile = StepTile<128, 32, 64, 3, 2>;

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
  if (a.batch >= kLargeFrom) return launch_tiled<Product, LargeTile>(a, launch);
  if (a.batch >= kMediumFrom) return launch_tiled<Product, MediumTile>(a, launch);
  if (a.batch >= kTiledFrom) return launch_tiled<Product, SmallTile>(a, launch);
  if (a.batch > 4) return launch_streamed<16>(a, launch);
  if (a.batch > 1) return launch_streamed<4>(a, launch);
  return launch_streamed<1>(a, launch);
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
