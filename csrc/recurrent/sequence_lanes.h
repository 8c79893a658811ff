// The sums and products of a recurrent layer by fused multiply-adds, units along the lanes of a register.
//
// Weights are packed by blocks of as many units as a register holds: for each block four biases, then for every k one
// register of each gate. Six rows × four sums of one block are 24 accumulators, which leave the products as the four
// sums of 6 × 16 cells and go through the activations in registers.
//
// The order in which a sum is formed (products of x, of h, each in chains; then the bias) is the same for every row,
// whatever rows are beside it.
#pragma once

#include "common/lanes.h"
#include "common/scratch.h"
#include "sequence_cells.h"

namespace seqrec_fast::SEQREC_TIER {

// Rows at once: their sums and one register of weights must fit. As kDotRows, whose accumulators are as many.
constexpr int kCellRows = kDotRows;
constexpr int64_t kCellChain = 128;

template <class T>
struct PackedWeights {
  static constexpr int kWidth = Compute<T>::kWidth;
  using S = typename Compute<T>::Scalar;
  int64_t input, hidden, state, gates;

  explicit PackedWeights(const SequenceShape& s)
      : input(s.projected ? 0 : s.input), hidden(s.hidden), state(s.state), gates(gate_count(s.kind)) {}
  int64_t blocks() const { return (hidden + kWidth - 1) / kWidth; }
  int64_t hidden_part() const { return kWidth * (kSumCount + gates * input); }  // from a block's begin
  int64_t stride() const { return hidden_part() + kWidth * gates * state; }     // between blocks
  // After the blocks W_hrᵀ, [H, P], as a product reads it.
  int64_t blocks_bytes() const { return blocks() * stride() * (int64_t)sizeof(S); }
  const T* transposed_w_hr(const void* packed) const { return (const T*)((const char*)packed + blocks_bytes()); }
};

// Lane j of out[k] = row j of `from`, entry k, for the first `units` rows; 0 in the other lanes. out is strided.
template <class T, class S>
SEQREC_INLINE void pack_gate(const T* from, int64_t depth, int units, S* out, int64_t stride) {
  constexpr int kWidth = Compute<T>::kWidth;
  int64_t k = 0;
#if defined(__AVX512F__)
  if constexpr (sizeof(S) == 4)
    for (; units == kWidth && k + kWidth <= depth; k += kWidth, out += kWidth * stride) {
      F32 rows[kWidth];
      for (int j = 0; j < kWidth; ++j) rows[j] = load(from + j * depth + k);
      transpose(rows);
      for (int j = 0; j < kWidth; ++j) store(out + j * stride, rows[j]);
    }
#endif
  for (; k < depth; ++k, out += stride)
    for (int j = 0; j < kWidth; ++j) out[j] = j < units ? value(from[j * depth + k]) : 0;
}

// out[sum][unit] = the biases of a block of units that begins at `unit`, of which `units` are real; none where they are
// added after normalisation.
template <class T, class Cell, class S>
void pack_bias(const SequenceInputs& in, int64_t unit, int units, S* out) {
  constexpr int kWidth = Compute<T>::kWidth;
  for (int i = 0; i < kSumCount * kWidth; ++i) out[i] = 0;
  if (in.shape.has_norm) return;
  for (int g = 0; g < Cell::kGates; ++g)
    for (int j = 0; j < units; ++j) {
      const int64_t at = g * in.shape.hidden + unit + j;
      if (in.b_ih) out[Cell::kInputSum[g] * kWidth + j] += value(((const T*)in.b_ih)[at]);
      if (in.b_hh) out[Cell::kHiddenSum[g] * kWidth + j] += value(((const T*)in.b_hh)[at]);
    }
}

template <class T, class Cell>
void pack_sequence(const SequenceInputs& in, void* packed, int64_t begin, int64_t end) {
  using S = typename Compute<T>::Scalar;
  constexpr int kWidth = Compute<T>::kWidth;
  const PackedWeights<T> layout(in.shape);
  const int64_t hidden = layout.hidden;
  for (int64_t block = begin; block < end; ++block) {
    const int64_t unit = block * kWidth;
    const int units = hidden - unit < kWidth ? (int)(hidden - unit) : kWidth;
    S* out = (S*)packed + block * layout.stride();
    pack_bias<T, Cell>(in, unit, units, out);
    for (int g = 0; g < Cell::kGates; ++g) {
      const int64_t row = g * hidden + unit, stride = Cell::kGates * kWidth;
      pack_gate((const T*)in.w_ih + row * layout.input, layout.input, units, out + (kSumCount + g) * kWidth, stride);
      pack_gate((const T*)in.w_hh + row * layout.state, layout.state, units, out + layout.hidden_part() + g * kWidth,
                stride);
    }
    if (in.shape.has_w_hr) {
      T* const transposed = (T*)((char*)packed + layout.blocks_bytes());
      for (int64_t i = unit; i < unit + units; ++i)
        for (int64_t k = 0; k < layout.state; ++k)
          transposed[i * layout.state + k] = ((const T*)in.w_hr)[k * hidden + i];
    }
  }
}

// What the sums of one row are made from at a step. Each may be null but for one of the first three.
template <class T>
struct CellRow {
  using S = typename Compute<T>::Scalar;
  const S* x;          // [I]
  const T* projected;  // [gates·H]: what W_ih makes of x, by the caller
  const S* ahead;      // the same, by project_ahead
  const S* h;          // [P]
};

// sums += weights·v of kRows rows for kBlocks blocks of units, in chains of kCellChain products: rounding errors grow
// with the chain. The sums go to memory between two chains; all registers hold accumulators.
template <class Cell, int kRows, int kBlocks, class V, class S>
SEQREC_INLINE void add_products(V (&sums)[kRows][kBlocks][kSumCount], const S* const (&v)[kRows], const S* weights,
                                int64_t block_stride, int64_t depth, const int (&target)[Cell::kGates]) {
  constexpr int kWidth = sizeof(V) / sizeof(S);
  for (int64_t begin = 0; begin < depth; begin += kCellChain) {
    const int64_t end = begin + kCellChain < depth ? begin + kCellChain : depth;
    V chain[kRows][kBlocks][Cell::kGates] = {};
    for (int64_t k = begin; k < end; ++k, weights += Cell::kGates * kWidth) {
      V factor[kRows];
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) factor[r] = broadcast(v[r][k]);
#pragma GCC unroll 4
      for (int b = 0; b < kBlocks; ++b)
#pragma GCC unroll 4
        for (int g = 0; g < Cell::kGates; ++g) {
          const V w = load(weights + b * block_stride + g * kWidth);
#pragma GCC unroll 8
          for (int r = 0; r < kRows; ++r) chain[r][b][g] = fma(factor[r], w, chain[r][b][g]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int b = 0; b < kBlocks; ++b)
#pragma GCC unroll 4
        for (int g = 0; g < Cell::kGates; ++g) sums[r][b][target[g]] = sums[r][b][target[g]] + chain[r][b][g];
  }
}

// Adds the gates that x already is.
template <class T, class Cell>
SEQREC_INLINE void add_projected(Vector<T> (&sums)[kSumCount], const T* projected, int64_t hidden, int64_t unit) {
  constexpr int kWidth = Compute<T>::kWidth;
  const int units = hidden - unit < kWidth ? (int)(hidden - unit) : kWidth;
#pragma GCC unroll 4
  for (int g = 0; g < Cell::kGates; ++g)
    sums[Cell::kInputSum[g]] = sums[Cell::kInputSum[g]] + load_first(projected + g * hidden + unit, units);
}

// The four sums of kRows rows for kBlocks blocks of units, the first of which begins at `unit`.
template <class T, class Cell, int kRows, int kBlocks>
SEQREC_INLINE void cell_sums(Vector<T> (&sums)[kRows][kBlocks][kSumCount], const CellRow<T>* rows,
                             const PackedWeights<T>& layout, const void* packed, int64_t unit) {
  using S = typename Compute<T>::Scalar;
  constexpr int kWidth = Compute<T>::kWidth;
  const S* block = (const S*)packed + unit / kWidth * layout.stride();
  const S *x[kRows], *h[kRows];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    x[r] = rows[r].x;
    h[r] = rows[r].h;
#pragma GCC unroll 4
    for (int b = 0; b < kBlocks; ++b) {
      const S* const ahead = rows[r].ahead ? rows[r].ahead + (unit + b * kWidth) * kSumCount : nullptr;
#pragma GCC unroll 4
      for (int s = 0; s < kSumCount; ++s) sums[r][b][s] = ahead ? load(ahead + s * kWidth) : Vector<T>{};
      if (rows[r].projected) add_projected<T, Cell>(sums[r][b], rows[r].projected, layout.hidden, unit + b * kWidth);
    }
  }
  if (x[0])
    add_products<Cell, kRows, kBlocks>(sums, x, block + kSumCount * kWidth, layout.stride(), layout.input,
                                       Cell::kInputSum);
  if (h[0] == nullptr) return;
  add_products<Cell, kRows, kBlocks>(sums, h, block + layout.hidden_part(), layout.stride(), layout.state,
                                     Cell::kHiddenSum);
#pragma GCC unroll 4
  for (int b = 0; b < kBlocks; ++b)
#pragma GCC unroll 4
    for (int s = 0; s < kSumCount; ++s) {
      const Vector<T> bias = load(block + b * layout.stride() + s * kWidth);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) sums[r][b][s] = sums[r][b][s] + bias;
    }
}

// Calls use(row, unit, sums) for the sums of `count` rows and every block of units.
template <class T, class Cell, int kRows, int kBlocks, class Use>
SEQREC_INLINE int64_t group_sums(const CellRow<T>* rows, const PackedWeights<T>& layout, const void* packed,
                                 int64_t block, int64_t end, const Use& use) {
  constexpr int kWidth = Compute<T>::kWidth;
  for (; block + kBlocks <= end; block += kBlocks) {
    Vector<T> sums[kRows][kBlocks][kSumCount];
    cell_sums<T, Cell, kRows, kBlocks>(sums, rows, layout, packed, block * kWidth);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int b = 0; b < kBlocks; ++b) use(r, (block + b) * kWidth, sums[r][b]);
  }
  return block;
}

// Few rows take several blocks at once: four sums would leave the multipliers waiting for each other. Otherwise the
// rows of a step go over one block of weights after another, in groups of nearly equal size.
template <class T, class Cell, class Use>
SEQREC_INLINE void all_sums(const CellRow<T>* rows, int64_t count, const PackedWeights<T>& layout, const void* packed,
                            const Use& use) {
  constexpr int kMany = kCellRows >= 6 ? 4 : 2;
  const int64_t blocks = layout.blocks();
  if (count == 1) {
    const int64_t block = group_sums<T, Cell, 1, kMany>(rows, layout, packed, 0, blocks, use);
    group_sums<T, Cell, 1, 1>(rows, layout, packed, block, blocks, use);
    return;
  }
  const int64_t groups = (count + kCellRows - 1) / kCellRows;
  for (int64_t block = 0; block < blocks; ++block)
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t first = count * g / groups, size = count * (g + 1) / groups - first;
      const auto use_here = [&](int r, int64_t unit, const Vector<T>(&sums)[kSumCount])
                                __attribute__((always_inline)) { use(first + r, unit, sums); };
      switch (size) {
        case 1:
          group_sums<T, Cell, 1, 1>(rows + first, layout, packed, block, block + 1, use_here);
          break;
        case 2:
          group_sums<T, Cell, 2, 1>(rows + first, layout, packed, block, block + 1, use_here);
          break;
#if defined(__AVX2__) || defined(__aarch64__)
        case 3:
          group_sums<T, Cell, 3, 1>(rows + first, layout, packed, block, block + 1, use_here);
          break;
#endif
#if defined(__AVX512F__) || defined(__aarch64__)
        case 4:
          group_sums<T, Cell, 4, 1>(rows + first, layout, packed, block, block + 1, use_here);
          break;
        case 5:
          group_sums<T, Cell, 5, 1>(rows + first, layout, packed, block, block + 1, use_here);
          break;
        case 6:
          group_sums<T, Cell, 6, 1>(rows + first, layout, packed, block, block + 1, use_here);
          break;
#endif
      }
    }
}

// The same, to memory: [count, blocks, kSumCount, kWidth].
template <class T, class Cell>
__attribute__((noinline)) void write_sums(const CellRow<T>* rows, int64_t count, const PackedWeights<T>& layout,
                                          const void* packed, typename Compute<T>::Scalar* to) {
  constexpr int kWidth = Compute<T>::kWidth;
  const int64_t width = layout.blocks() * kWidth;
  all_sums<T, Cell>(rows, count, layout, packed,
                    [&](int64_t p, int64_t unit, const Vector<T>(&sums)[kSumCount]) __attribute__((always_inline)) {
                      for (int s = 0; s < kSumCount; ++s)
                        store(to + (p * width + unit) * kSumCount + s * kWidth, sums[s]);
                    });
}

// How the sums of a step are formed from weights packed once. The other way is TileSums.
template <class T, class C>
class LaneSums {
 public:
  using Cell = C;

  static int64_t packed_bytes(const SequenceShape& s) {
    return PackedWeights<T>(s).blocks_bytes() + (s.has_w_hr ? s.hidden * s.state * (int64_t)sizeof(T) : 0);
  }
  static int64_t pack_blocks(const SequenceShape& s) { return PackedWeights<T>(s).blocks(); }
  static void pack(const SequenceInputs& in, void* packed, int64_t begin, int64_t end) {
    pack_sequence<T, Cell>(in, packed, begin, end);
  }

  // Rows that a caller's array of sums ahead must have beyond the last.
  static constexpr int64_t kSpareRows = 0;

  LaneSums(const SequenceShape& s, const void* packed, Layout&) : layout_(s), packed_(packed) {}

  // Calls use(row, unit, sums) for the sums of `count` rows and every block of units. The rows are of one kind: which
  // of x, projected, ahead and h they have.
  template <class Use>
  __attribute__((always_inline)) void operator()(const CellRow<T>* rows, int64_t count, const Use& use) const {
    all_sums<T, Cell>(rows, count, layout_, packed_, use);
  }

 private:
  PackedWeights<T> layout_;
  const void* packed_;
};

// The products of the backward over the tokens of a step or of a chunk; `sums` are their gradients of the four sums,
// `stride` apart. The other way is TileProducts.
template <class T, class C>
class LaneProducts {
 public:
  using Cell = C;
  using S = typename Compute<T>::Scalar;

  static int64_t packed_bytes(const SequenceShape&) { return 0; }  // the weights as they lie
  static int64_t pack_blocks(const SequenceShape&) { return 0; }
  static void pack(const SequenceInputs&, void*, int64_t, int64_t) {}

  LaneProducts(const SequenceInputs& in, const void*, int64_t, Layout&) : in_(in) {}

  // dh = (or +=) sums·W_hh.
  void to_hidden(const S* sums, int64_t stride, int64_t count, S* dh, bool accumulate) const {
    const int64_t hidden = in_.shape.hidden, state = in_.shape.state;
    for (const GateRange& range : Cell::kHidden) {
      const T* const w_hh = (const T*)in_.w_hh + range.row * hidden * state;
      whole(Product<T, S>{sums + range.sum * hidden, stride, 1, w_hh, dh, count, state, range.count * hidden,
                          accumulate});
      accumulate = true;
    }
  }

  // dx = sums·W_ih.
  void to_input(const S* sums, int64_t stride, int64_t count, S* dx) const {
    whole(Product<T, S>{sums, stride, 1, (const T*)in_.w_ih, dx, count, in_.shape.input, gate_rows(in_.shape)});
  }

  // dw += sumsᵀ·x.
  void to_input_weight(const S* sums, int64_t stride, int64_t count, const S* x, S* dw) const {
    whole(Product<S>{sums, 1, stride, x, dw, gate_rows(in_.shape), in_.shape.input, count, true});
  }

  // dw += sumsᵀ·h.
  void to_hidden_weight(const S* sums, int64_t stride, int64_t count, const S* h, S* dw) const {
    const int64_t hidden = in_.shape.hidden, state = in_.shape.state;
    for (const GateRange& range : Cell::kHidden)
      whole(Product<S>{sums + range.sum * hidden, 1, stride, h, dw + range.row * hidden * state, range.count * hidden,
                       state, count, true});
  }

 private:
  template <class P>
  static void whole(const P& product) {
    product_part(product, 0, 1, 1);
  }

  const SequenceInputs& in_;
};

}  // namespace seqrec_fast::SEQREC_TIER
