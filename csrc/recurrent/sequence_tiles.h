// The sums and products of a recurrent layer on matrix tiles (AMX, or what stands in for it): the same as LaneSums and
// LaneProducts, from bf16 parts of the numbers (see tile_operands.h).
//
// A step of up to 32 rows: their x and h become left operands in L1; then the weights of one block of 16 units after
// the other stream by. A pass has four accumulators: two groups of 16 rows × two gates, or one group × four. The sums
// of a pass are stored when the next one needs its accumulators, for a store right behind the last product would hold
// the tiles up; so a block's sums are used under the products of the block after it.
#pragma once

#include "common/tile_product.h"
#include "sequence_lanes.h"
#include "sum_gates.h"

#if defined(SEQREC_TILES)
namespace seqrec_fast::SEQREC_TIER {

template <class T, class C, int kParts>
class TileSums {
 public:
  using Cell = C;
  static constexpr int64_t kUnits = kTileRows;  // of a block

  // The weights: for each block four biases, then by gate, chunk and part the images of W_ih and those of W_hh.
  struct Packed {
    int64_t input_chunks, hidden_chunks, blocks;

    explicit Packed(const SequenceShape& s)
        : input_chunks(s.projected ? 0 : tile_count(s.input, kTileDepth)),
          hidden_chunks(tile_count(s.hidden, kTileDepth)),
          blocks(tile_count(s.hidden, kUnits)) {}
    static constexpr int64_t kBiasBytes = kSumCount * kUnits * sizeof(float);
    int64_t hidden_image() const { return Cell::kGates * input_chunks * kParts; }
    int64_t block_bytes() const {
      return kBiasBytes + (hidden_image() + Cell::kGates * hidden_chunks * kParts) * (int64_t)sizeof(TileImage);
    }
    float* bias(void* packed, int64_t block) const { return (float*)((char*)packed + block * block_bytes()); }
    TileImage* images(void* packed, int64_t block) const {
      return (TileImage*)((char*)packed + block * block_bytes() + kBiasBytes);
    }
  };

  static int64_t packed_bytes(const SequenceShape& s) { return Packed(s).blocks * Packed(s).block_bytes(); }
  static int64_t pack_blocks(const SequenceShape& s) { return Packed(s).blocks; }

  static void pack(const SequenceInputs& in, void* packed, int64_t begin, int64_t end) {
    const Packed layout(in.shape);
    const int64_t hidden = in.shape.hidden, input = in.shape.input;
    for (int64_t block = begin; block < end; ++block) {
      const int64_t unit = block * kUnits, units = hidden - unit < kUnits ? hidden - unit : kUnits;
      pack_bias<T, Cell>(in, unit, (int)units, layout.bias(packed, block));
      TileImage* to = layout.images(packed, block);
      if (!in.shape.projected)
        for (int64_t g = 0; g < Cell::kGates; ++g)
          for (int64_t k = 0; k < input; k += kTileDepth, to += kParts)
            put_right_transposed<kParts>((const T*)in.w_ih + (g * hidden + unit) * input + k, input, input - k, units,
                                         to);
      for (int64_t g = 0; g < Cell::kGates; ++g)
        for (int64_t k = 0; k < hidden; k += kTileDepth, to += kParts)
          put_right_transposed<kParts>((const T*)in.w_hh + (g * hidden + unit) * hidden + k, hidden, hidden - k, units,
                                       to);
    }
  }

  // Rows that a caller's array of sums ahead must have beyond the last.
  static constexpr int64_t kSpareRows = kPanelRows;

  TileSums(const SequenceShape& s, const void* packed, Layout& scratch)
      : layout_(s), packed_(const_cast<void*>(packed)), hidden_(s.hidden), input_(s.input) {
    left_ = scratch.take<TileImage>(2 * (layout_.input_chunks + layout_.hidden_chunks) * kParts);
    sums_ = scratch.take<float>(2 * kSumCount * kPanelRows * kUnits);
  }

  // See LaneSums.
  template <class Use>
  __attribute__((always_inline)) void operator()(const CellRow<T>* rows, int64_t count, const Use& use) const {
    for (int64_t first = 0; first < count; first += kPanelRows) {
      const int64_t here = count - first < kPanelRows ? count - first : kPanelRows;
      const auto use_here = [&](int64_t p, int64_t unit, const F32(&sums)[kSumCount])
                                __attribute__((always_inline)) { use(first + p, unit, sums); };
      put_rows(rows + first, here);
      if (here > kTileRows)
        sweep<2>(rows + first, here, use_here);
      else
        sweep<1>(rows + first, here, use_here);
    }
  }

 private:
  int64_t group_images() const { return (layout_.input_chunks + layout_.hidden_chunks) * kParts; }

  void put_rows(const CellRow<T>* rows, int64_t count) const {
    for (int64_t p = 0; p < count; ++p) {
      TileImage* const to = left_ + p / kTileRows * group_images();
      if (rows[p].x) put_left_row<kParts>(rows[p].x, input_, to, (int)(p % kTileRows));
      if (rows[p].h) put_left_row<kParts>(rows[p].h, hidden_, to + layout_.input_chunks * kParts, (int)(p % kTileRows));
    }
  }

  // Of kColumns sums from `first` on, those that a gate has; see SumGates.
  template <int kColumns>
  static constexpr int present(const int (&gate_of_sum)[kSumCount], int first) {
    int bits = 0;
    for (int i = 0; i < kColumns; ++i) bits |= (gate_of_sum[first + i] >= 0) << i;
    return bits;
  }

  // Accumulator n·kGroups + r: its former sums to `done` (null: none), then its first value from `begin`.
  template <int kGroups, int kTile = 0>
  SEQREC_INLINE void turn_over(TileScope& tiles, float* done, const float* begin, int64_t column_step,
                               int64_t group_step, int64_t row_bytes) {
    constexpr int kColumn = kTile / kGroups, kGroup = kTile % kGroups;
    if (done) tiles.store<kTile>(done + (kColumn * kPanelRows + kGroup * kTileRows) * kUnits, 64);
    if (begin) tiles.load<kTile>(begin + kColumn * column_step + kGroup * group_step, row_bytes);
    if constexpr (kTile < 3) turn_over<kGroups, kTile + 1>(tiles, done, begin, column_step, group_step, row_bytes);
  }

  // += the products of one kind of input for the sums kFirst … kFirst + kColumns - 1.
  template <int kGroups, int kFirst, int kPresent>
  inline __attribute__((always_inline)) void add(TileScope& tiles, const TileImage* left, int64_t group_images,
                                                 const TileImage* weights, int64_t chunks,
                                                 const int (&gate_of_sum)[kSumCount]) const {
    constexpr int kColumns = 4 / kGroups;
    if constexpr (kPresent != 0) {
      const TileImage* right[kColumns];
#pragma GCC unroll 4
      for (int n = 0; n < kColumns; ++n)
        right[n] = kPresent >> n & 1 ? weights + gate_of_sum[kFirst + n] * chunks * kParts : nullptr;
      TileSquare<kGroups, kColumns>::template multiply<kParts, kPresent>(tiles, left, group_images, right, chunks,
                                                                         layout_.block_bytes());
    }
  }

  template <int kGroups, int kFirst>
  __attribute__((always_inline)) void pass(TileScope& tiles, const CellRow<T>* rows, int64_t block, float* done) const {
    constexpr int kColumns = 4 / kGroups;
    const float* const bias = layout_.bias(packed_, block);
    if (rows[0].ahead) {
      const int64_t stride = layout_.blocks * kUnits * kSumCount;  // between rows
      turn_over<kGroups>(tiles, done, rows[0].ahead + (block * kSumCount + kFirst) * kUnits, kUnits, kTileRows * stride,
                         stride * (int64_t)sizeof(float));
    } else {
      turn_over<kGroups>(tiles, done, bias + kFirst * kUnits, kUnits, 0, 0);
    }
    const TileImage* const weights = layout_.images(packed_, block);
    if (rows[0].x)
      add<kGroups, kFirst, present<kColumns>(kSumGates<Cell>.input, kFirst)>(
          tiles, left_, group_images(), weights, layout_.input_chunks, kSumGates<Cell>.input);
    if (rows[0].h)
      add<kGroups, kFirst, present<kColumns>(kSumGates<Cell>.hidden, kFirst)>(
          tiles, left_ + layout_.input_chunks * kParts, group_images(), weights + layout_.hidden_image(),
          layout_.hidden_chunks, kSumGates<Cell>.hidden);
  }

  template <int kGroups, class Use>
  __attribute__((always_inline)) void sweep(const CellRow<T>* rows, int64_t count, const Use& use) const {
    TileScope tiles(kGroups == 1 ? count : kTileRows);
    constexpr int64_t kBlockSums = kSumCount * kPanelRows * kUnits;
    float* done = nullptr;  // where the sums go that are still in the accumulators
    for (int64_t block = 0; block < layout_.blocks; ++block) {
      float* const sums = sums_ + block % 2 * kBlockSums;
      pass<kGroups, 0>(tiles, rows, block, done);
      done = sums;
      if constexpr (kGroups == 2) {
        pass<2, 2>(tiles, rows, block, done);
        done = sums + 2 * kPanelRows * kUnits;
      }
      if (block > 0) use_block(rows, count, block - 1, use);
    }
    turn_over<kGroups>(tiles, done, nullptr, 0, 0, 0);
    use_block(rows, count, layout_.blocks - 1, use);
  }

  template <class Use>
  __attribute__((always_inline)) void use_block(const CellRow<T>* rows, int64_t count, int64_t block,
                                                const Use& use) const {
    const float* const from = sums_ + block % 2 * kSumCount * kPanelRows * kUnits;
    for (int64_t p = 0; p < count; ++p) {
      F32 sums[kSumCount];
#pragma GCC unroll 4
      for (int s = 0; s < kSumCount; ++s) sums[s] = load(from + (s * kPanelRows + p) * kUnits);
      if (rows[p].projected) add_projected<T, Cell>(sums, rows[p].projected, hidden_, block * kUnits);
      use(p, block * kUnits, sums);
    }
  }

  Packed layout_;
  void* packed_;
  int64_t hidden_, input_;
  TileImage* left_;  // [group][x, h][chunk][part]
  float* sums_;      // [parity of the block][sum][row][unit]
};

// See LaneProducts.
template <class T, class C, int kParts>
class TileProducts {
 public:
  using Cell = C;
  using Operand = RightOperand<kParts>;

  // W_hh by its ranges, then W_ih, each as it is multiplied by gradients of sums.
  static int64_t packed_bytes(const SequenceShape& s) {
    return (input_image(s) + (s.projected ? 0 : Operand(gate_rows(s), s.input).images())) * (int64_t)sizeof(TileImage);
  }
  static int64_t pack_blocks(const SequenceShape& s) {
    return tile_count(s.hidden, kTileRows) + (s.projected ? 0 : tile_count(s.input, kTileRows));
  }
  static void pack(const SequenceInputs& in, void* packed, int64_t begin, int64_t end) {
    const SequenceShape& s = in.shape;
    const int64_t hidden = s.hidden, own = tile_count(hidden, kTileRows);
    TileImage* to = (TileImage*)packed;
    for (const GateRange& range : Cell::kHidden) {
      const int64_t depth = range.count * hidden;
      Operand::pack((const T*)in.w_hh + range.row * hidden * hidden, depth, hidden, to, begin < own ? begin : own,
                    end < own ? end : own);
      to += Operand(depth, hidden).images();
    }
    if (end > own)
      Operand::pack((const T*)in.w_ih, gate_rows(s), s.input, to, begin > own ? begin - own : 0, end - own);
  }

  TileProducts(const SequenceInputs& in, const void* packed, int64_t capacity, Layout& scratch)
      : shape_(in.shape),
        packed_((const TileImage*)packed),
        scratch_(capacity > kSumCount * in.shape.hidden ? capacity : kSumCount * in.shape.hidden, scratch) {
    const int64_t widest = !shape_.projected && shape_.input > shape_.hidden ? shape_.input : shape_.hidden;
    right_ = scratch.take<TileImage>(Operand(capacity, widest).images());
  }

  void to_hidden(const float* sums, int64_t stride, int64_t count, float* dh, bool accumulate) const {
    const int64_t hidden = shape_.hidden;
    const TileImage* right = packed_;
    for (const GateRange& range : Cell::kHidden) {
      const int64_t depth = range.count * hidden;
      tile_product<kParts>(
          Product<float>{sums + range.sum * hidden, stride, 1, nullptr, dh, count, hidden, depth, accumulate}, right,
          scratch_);
      right += Operand(depth, hidden).images();
      accumulate = true;
    }
  }

  void to_input(const float* sums, int64_t stride, int64_t count, float* dx) const {
    tile_product<kParts>(Product<float>{sums, stride, 1, nullptr, dx, count, shape_.input, gate_rows(shape_), false},
                         packed_ + input_image(shape_), scratch_);
  }

  void to_input_weight(const float* sums, int64_t stride, int64_t count, const float* x, float* dw) const {
    to_weight(sums, stride, count, x, shape_.input, gate_rows(shape_), dw);
  }

  void to_hidden_weight(const float* sums, int64_t stride, int64_t count, const float* h, float* dw) const {
    const int64_t hidden = shape_.hidden;
    Operand::pack(h, count, hidden, right_, 0, tile_count(hidden, kTileRows));
    for (const GateRange& range : Cell::kHidden)
      tile_product<kParts>(Product<float>{sums + range.sum * hidden, 1, stride, h, dw + range.row * hidden * hidden,
                                          range.count * hidden, hidden, count, true},
                           right_, scratch_);
  }

 private:
  static int64_t input_image(const SequenceShape& s) {
    int64_t images = 0;
    for (const GateRange& range : Cell::kHidden) images += Operand(range.count * s.hidden, s.hidden).images();
    return images;
  }

  void to_weight(const float* sums, int64_t stride, int64_t count, const float* v, int64_t columns, int64_t rows,
                 float* dw) const {
    Operand::pack(v, count, columns, right_, 0, tile_count(columns, kTileRows));
    tile_product<kParts>(Product<float>{sums, 1, stride, v, dw, rows, columns, count, true}, right_, scratch_);
  }

  const SequenceShape& shape_;
  const TileImage* packed_;
  ProductScratch<kParts> scratch_;
  TileImage* right_;  // x or h of a chunk's tokens
};

}  // namespace seqrec_fast::SEQREC_TIER
#endif
