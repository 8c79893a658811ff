// A recurrent layer over whole sequences, forward. A tile of rows goes through all steps on its own, so there is no
// barrier between steps; step t works on the rows that still run, a prefix of the tile.
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
#include "sequence_masks.h"

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
    for (int i = 0; i < kSumCount * kWidth; ++i) out[i] = 0;
    for (int g = 0; g < Cell::kGates; ++g)
      for (int j = 0; j < units; ++j) {
        const int64_t at = g * hidden + unit + j;
        if (in.b_ih && !in.shape.has_norm) out[Cell::kInputSum[g] * kWidth + j] += value(((const T*)in.b_ih)[at]);
        if (in.b_hh && !in.shape.has_norm) out[Cell::kHiddenSum[g] * kWidth + j] += value(((const T*)in.b_hh)[at]);
      }
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

// ---- the walk over the steps
// ------------------------------------------------------------------------------------------

// How many rows of a tile run at a step.
SEQREC_INLINE int64_t running(const RowTile& tile, int64_t step, int64_t from) {
  int64_t count = from;
  while (count > 0 && tile.length[count - 1] <= step) --count;
  while (count < tile.count && tile.length[count] > step) ++count;
  return count;
}

// A segment begins here: the step sees zeros instead of the states before it.
SEQREC_INLINE bool segment_begins(const SequenceInputs& in, const RowTile& tile, int64_t place, int64_t step) {
  if (in.reset == nullptr) return false;
  const bool* marks = in.reset + tile.row[place] * in.shape.steps;
  if (!in.shape.reverse) return marks[step];
  return step + 1 < tile.length[place] && marks[step + 1];
}

// The input vector of a token.
template <class T>
SEQREC_INLINE const T* input_vector(const SequenceInputs& in, int64_t token) {
  return (const T*)in.x + (in.ids ? in.ids[token] : token) * in.shape.input;
}

template <class S>
SEQREC_INLINE void copy_rows(const S* from, S* to, int64_t first, int64_t last, int64_t width) {
  for (int64_t i = first * width; i < last * width; ++i) to[i] = from[i];
}

// W_ih·x of several steps at once, before they are taken. Worth it where the weights of a step are read for few rows
// (one row then reads half as much a step), or where both weights together outgrow L2. The sums do not change by a bit.
constexpr int64_t kAheadRows = 16, kAheadBytes = 1 << 20, kAheadTokens = 64;

template <class T>
SEQREC_INLINE bool projects_ahead(const SequenceShape& s, int64_t count) {
  const PackedWeights<T> layout(s);
  return !s.projected && s.steps > 1 &&
         (count <= kAheadRows ||
          layout.blocks() * layout.stride() * (int64_t)sizeof(typename PackedWeights<T>::S) > kAheadBytes);
}

// One tile's states: padded to whole registers, whose further lanes stay 0. A step reads one h and writes the other,
// since every unit needs all of the former h.
template <class T>
class ForwardScratch : public Layout {
 public:
  using S = typename Compute<T>::Scalar;
  int64_t width, state_width;
  int64_t capacity;  // tokens that are gathered, and projected, at a time
  bool ahead;
  S *h[2], *c;       // [count, state_width], [count, width]
  S *x, *projected;  // [capacity, I] where x must be widened; [capacity, 4·width] where it is projected ahead
  CellRow<T>* rows;  // [capacity]
  S *sums, *operand, *factors;       // normalised: [count, 4·width]; h as W_hh sees it; see dropout_factors
  uint8_t *drops_of_h, *drops_of_c;  // [count, drop_width(P)], [count, drop_width(H)]
  S *unprojected, *fresh_h;          // with W_hr: [count, width], [count, P]
  CellRow<T>* hidden_rows;           // normalised: [count]: the operands of W_hh alone
  S *zeros, *fresh_c, *output_gate;  // normalised: [4·width], [width] twice

  ForwardScratch(const SequenceShape& s, int64_t count, void* memory)
      : Layout(memory),
        width(PackedWeights<T>(s).blocks() * Compute<T>::kWidth),
        state_width((s.state + Compute<T>::kWidth - 1) / Compute<T>::kWidth * Compute<T>::kWidth) {
    ahead = s.has_norm || projects_ahead<T>(s, count);
    capacity = ahead && count < kAheadTokens ? kAheadTokens : count;
    h[0] = take<S>(count * state_width);
    h[1] = take<S>(count * state_width);
    c = take<S>(count * width);
    x = take<S>(kIsHalf<T> && !s.projected ? capacity * s.input : 0);
    projected = take<S>(ahead ? capacity * kSumCount * width : 0);
    rows = take<CellRow<T>>(capacity);
    sums = take<S>(s.has_norm ? count * kSumCount * width : 0);
    operand = take<S>(s.recurrent_dropout ? count * state_width : 0);
    factors = take<S>(s.recurrent_dropout ? count * drop_width(s.state) : 0);
    drops_of_h = take<uint8_t>(has_options(s) ? count * drop_width(s.state) : 0);
    drops_of_c = take<uint8_t>(s.zoneout ? count * drop_width(s.hidden) : 0);
    unprojected = take<S>(s.has_w_hr ? count * width : 0);
    fresh_h = take<S>(s.has_w_hr ? count * s.state : 0);
    hidden_rows = take<CellRow<T>>(s.has_norm ? count : 0);
    zeros = take<S>(s.has_norm ? kSumCount * width : 0);
    fresh_c = take<S>(s.has_norm ? width : 0);
    output_gate = take<S>(s.has_norm ? width : 0);
  }
};

template <class T, class Cell>
struct SequenceWalk {
  using S = typename Compute<T>::Scalar;
  static constexpr int kWidth = Compute<T>::kWidth;
  const SequenceForward& call;
  const SequenceShape& shape;
  const RowTile& tile;
  const PackedWeights<T> layout;
  ForwardScratch<T> scratch;
  int now = 0;  // which h is read

  SequenceWalk(const SequenceForward& call, const RowTile& tile, void* memory)
      : call(call), shape(call.in.shape), tile(tile), layout(shape), scratch(shape, tile.count, memory) {}

  int64_t step_at(int64_t i) const { return shape.reverse ? shape.steps - 1 - i : i; }

  // The input of `count` rows at a step, as rows first … of the scratch.
  void gather(int64_t first, int64_t count, int64_t step) {
    for (int64_t p = 0; p < count; ++p) {
      const T* x = input_vector<T>(call.in, token_index(shape, step, tile.row[p]));
      CellRow<T>& row = scratch.rows[first + p];
      row = {nullptr, shape.projected ? x : nullptr, nullptr, nullptr};
      if (shape.projected) continue;
      if constexpr (kIsHalf<T>) {
        S* const wide = scratch.x + (first + p) * shape.input;
        widen(x, shape.input, wide);
        row.x = wide;
      } else {
        row.x = x;
      }
    }
  }

  virtual void project_ahead(int64_t tokens) {
    write_sums<T, Cell>(scratch.rows, tokens, layout, call.packed, scratch.projected);
    for (int64_t p = 0; p < tokens; ++p)
      scratch.rows[p] = {nullptr, nullptr, scratch.projected + p * scratch.width * kSumCount, nullptr};
  }

  // The states that a step of `count` rows starts from, as its operands.
  void begin_step(CellRow<T>* rows, int64_t count, int64_t step) {
    for (int64_t p = 0; p < count; ++p) {
      S *const h = scratch.h[now] + p * scratch.state_width, *const c = scratch.c + p * scratch.width;
      rows[p].h = h;
      if (!segment_begins(call.in, tile, p, step)) continue;
      for (int64_t i = 0; i < scratch.state_width; ++i) h[i] = 0;
      for (int64_t i = 0; i < scratch.width; ++i) c[i] = 0;
    }
  }

  // One step of `count` rows, whose inputs are rows first … of the scratch.
  virtual void take_step(int64_t first, int64_t count, int64_t step) {
    const int64_t width = scratch.width;
    CellRow<T>* const rows = scratch.rows + first;
    begin_step(rows, count, step);
    S* const h_next = scratch.h[1 - now];
    all_sums<T, Cell>(rows, count, layout, call.packed,
                      [&](int64_t p, int64_t unit, const Vector<T>(&sums)[kSumCount]) __attribute__((always_inline)) {
                        S* const c = scratch.c + p * width + unit;
                        const auto next = Cell::step(sums, load(scratch.h[now] + p * width + unit), load(c));
                        store(h_next + p * width + unit, rounded<T>(next.h));
                        if constexpr (Cell::kHasCellState) store(c, next.c);
                        keep_output(step, tile.row[p], unit, next.h);
                        keep_saved(step, tile.row[p], unit, next);
                      });
    now = 1 - now;
  }

  __attribute__((always_inline)) void keep_output(int64_t step, int64_t row, int64_t unit, Vector<T> h) const {
    const int64_t state = shape.state;
    const int units = state - unit < kWidth ? (int)(state - unit) : kWidth;
    if (call.output) store_first((T*)call.output + token_index(shape, step, row) * state + unit, units, h);
  }
  __attribute__((always_inline)) void keep_saved(int64_t step, int64_t row, int64_t unit,
                                                 const CellStates<Vector<T>>& next) const {
    const int64_t hidden = shape.hidden;
    const int units = hidden - unit < kWidth ? (int)(hidden - unit) : kWidth;
    if (Cell::kHasCellState && call.cells)
      store_first((S*)call.cells + saved_index(shape, step, row) * hidden + unit, units, next.c);
    if (call.gates == nullptr) return;
    T* gates = (T*)call.gates + saved_index(shape, step, row) * kSumCount * hidden + unit;
    for (int s = 0; s < kSumCount; ++s) store_first(gates + s * hidden, units, next.saved[s]);
  }

  // Rows that do not run have their state in h[0]: rows former … count begin here, or count … former end here.
  void change_rows(int64_t former, int64_t count) {
    if (now == 0) return;
    copy_rows(scratch.h[1], scratch.h[0], count, former, scratch.state_width);
    copy_rows(scratch.h[0], scratch.h[1], former, count, scratch.state_width);
  }

  void run() {
    const int64_t hidden = shape.hidden, width = scratch.width, state = shape.state, state_width = scratch.state_width;
    for (int64_t i = 0; i < tile.count * state_width; ++i) scratch.h[0][i] = scratch.h[1][i] = 0;
    for (int64_t i = 0; i < tile.count * width; ++i) scratch.c[i] = 0;
    for (int64_t p = 0; p < tile.count; ++p) {
      widen((const T*)call.in.h + tile.row[p] * state, state, scratch.h[0] + p * state_width);
      if (Cell::kHasCellState) widen((const T*)call.in.c + tile.row[p] * hidden, hidden, scratch.c + p * width);
    }
    int64_t count = 0, gathered = 0;  // rows that run; rows that ran at the last gathered step
    for (int64_t begin = 0, end = 0; begin < shape.steps; begin = end) {
      int64_t tokens = 0;
      for (; end < shape.steps; ++end) {
        const int64_t here = running(tile, step_at(end), gathered);
        if (end > begin && tokens + here > scratch.capacity) break;
        gather(tokens, here, step_at(end));
        tokens += here;
        gathered = here;
        if (!scratch.ahead) {
          ++end;
          break;
        }
      }
      if (scratch.ahead) project_ahead(tokens);
      for (int64_t i = begin, first = 0; i < end; first += count, ++i) {
        const int64_t former = count;
        count = running(tile, step_at(i), former);
        change_rows(former, count);
        take_step(first, count, step_at(i));
      }
    }
    change_rows(count, 0);
    for (int64_t p = 0; p < tile.count; ++p) {
      narrow(scratch.h[0] + p * state_width, state, (T*)call.h_n + tile.row[p] * state);
      if (Cell::kHasCellState) narrow(scratch.c + p * width, hidden, (T*)call.c_n + tile.row[p] * hidden);
    }
  }
};

}  // namespace seqrec_fast::SEQREC_TIER
