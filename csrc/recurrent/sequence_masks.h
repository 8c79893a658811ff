// Zoneout and recurrent dropout of a tile of rows. Forward and backward draw the same masks, each for itself: a mask is
// a function of (seed, stream, row, step, unit), defined in seqrec_fast/backends/reference/_philox.py.
//
// A draw serves a unit for eight steps and leaves one byte, a bit a step. For 16 units and those steps it takes 270
// instructions of AVX-512, so 34 a step; the products of one row and step at H = I = 128 take 1024 for as many units.
#pragma once

#include "common/lanes.h"
#include "common/philox.h"
#include "sequence.h"

namespace seqrec_fast::SEQREC_TIER {

// Bytes of masks for a row of this many units.
SEQREC_INLINE int64_t drop_width(int64_t units) { return (units + kDropUnits - 1) / kDropUnits * kDropUnits; }

SEQREC_INLINE DropStream drop_stream(const SequenceNoise& noise, MaskKind kind, int32_t below) {
  return {noise.seed, noise.stream + (uint32_t)kind, below};
}

// Lanes whose byte has `bit`, for a select between registers of the last argument's type.
SEQREC_INLINE I32 lanes_with(const uint8_t* bytes, int bit, F32) {
  using Bytes = uint8_t __attribute__((vector_size(kLanes)));
  Bytes loaded;
  __builtin_memcpy(&loaded, bytes, sizeof loaded);
  return (__builtin_convertvector(loaded, I32) & bit) != 0;
}
SEQREC_INLINE I64 lanes_with(const uint8_t* bytes, int bit, F64) {
  using Bytes = uint8_t __attribute__((vector_size(kLanes64)));
  Bytes loaded;
  __builtin_memcpy(&loaded, bytes, sizeof loaded);
  return (__builtin_convertvector(loaded, I64) & bit) != 0;
}

// Zoneout of one state, h or c.
template <class T>
class Zoneout {
 public:
  using S = typename Compute<T>::Scalar;
  // drops: [tile.count, drop_width(units)]
  Zoneout(const SequenceNoise& noise, MaskKind kind, int64_t units, uint8_t* drops)
      : drawn_(noise.drawn),
        mean_((S)noise.zoneout),
        stream_(drop_stream(noise, kind, noise.zoneout_below)),
        width_(drop_width(units)),
        drops_(drops) {}

  // Before a step of the first `count` rows. Rows may join within eight steps.
  void begin_step(const RowTile& tile, int64_t count, int64_t step) {
    if (!drawn_) return;
    const int64_t block = step / kStepsOfADraw;
    if (block != block_) made_ = 0;
    block_ = block;
    for (; made_ < count; ++made_)
      draw_drops(stream_, (uint32_t)tile.row[made_], (uint32_t)block, width_, drops_ + made_ * width_);
    bit_ = 1 << step % kStepsOfADraw;
  }

  // The state after the step, from those before it and what the cell makes.
  __attribute__((always_inline)) Vector<T> state(int64_t place, int64_t unit, Vector<T> former, Vector<T> fresh) const {
    if (!drawn_) return fma(former - fresh, broadcast(mean_), fresh);
    return select(lanes_with(drops_ + place * width_ + unit, bit_, Vector<T>{}), former, fresh);
  }

  // The gradient of what the cell makes; to_former: that of the former state.
  __attribute__((always_inline)) Vector<T> gradient(int64_t place, int64_t unit, Vector<T> grad,
                                                    Vector<T>& to_former) const {
    if (!drawn_) {
      to_former = grad * mean_;
      return grad * (1 - mean_);
    }
    const auto keeps = lanes_with(drops_ + place * width_ + unit, bit_, Vector<T>{});
    to_former = select(keeps, grad, Vector<T>{});
    return select(keeps, Vector<T>{}, grad);
  }

 private:
  bool drawn_;
  S mean_;
  DropStream stream_;
  int64_t width_, block_ = -1, made_ = 0;
  int bit_ = 0;
  uint8_t* drops_;
};

// The factors on h before W_hh, [tile.count, drop_width(units)]; one row of bytes to work in.
template <class T>
void dropout_factors(const SequenceNoise& noise, const RowTile& tile, int64_t units, uint8_t* drops,
                     typename Compute<T>::Scalar* factors) {
  const int64_t width = drop_width(units);
  const auto kept = broadcast((typename Compute<T>::Scalar)noise.kept_factor);
  for (int64_t p = 0; p < tile.count; ++p) {
    draw_drops(drop_stream(noise, MaskKind::kRecurrentDropout, noise.dropout_below), (uint32_t)tile.row[p], 0, width,
               drops);
    for (int64_t i = 0; i < width; i += Compute<T>::kWidth)
      store(factors + p * width + i, select(lanes_with(drops + i, 1, Vector<T>{}), Vector<T>{}, kept));
  }
}

}  // namespace seqrec_fast::SEQREC_TIER
