// Layer normalisation of rows that lie in whole registers, whose lanes past the units are 0 afterwards: of the sums of
// one weight, as write_sums stores them, and of c.
//
// Mean and variance are taken in two passes, as the difference of two sums would lose a small variance.
#pragma once

#include "common/lanes.h"
#include "sequence_cells.h"

namespace seqrec_fast::SEQREC_TIER {

constexpr double kNormEpsilon = 1e-5;

// From every block of `stride` registers those at kAt belong to the row.
template <class T, int kCount>
class NormRow {
 public:
  using S = typename Compute<T>::Scalar;
  static constexpr int kWidth = Compute<T>::kWidth;

  NormRow(const int (&at)[kCount], int stride, int64_t units) : at_(at), stride_(stride * kWidth), units_(units) {}

  // row = (row - mean)·rstd; returns rstd.
  S normalise(S* row) const {
    Vector<T> total{}, squares{};
    each([&](int64_t i, int) { total = total + load(row + i); });
    const S mean = reduce_add(total) / numbers();
    each([&](int64_t i, int units) {
      S* const p = row + i;
      const Vector<T> centred = units == kWidth ? load(p) - mean : load_first(p, units) - mean;
      store(p, Vector<T>{});
      store_first(p, units, centred);
      const Vector<T> counted = load(p);
      squares = fma(counted, counted, squares);
    });
    const S rstd = 1 / (S)__builtin_sqrt(reduce_add(squares) / numbers() + (S)kNormEpsilon);
    each([&](int64_t i, int) { store(row + i, load(row + i) * rstd); });
    return rstd;
  }

  // grad: from that of unit = (v - mean)·rstd to that of v.
  void gradient(S* grad, const S* unit, S rstd) const {
    Vector<T> total{}, along{};
    each([&](int64_t i, int) {
      total = total + load(grad + i);
      along = fma(load(grad + i), load(unit + i), along);
    });
    const Vector<T> mean = broadcast(reduce_add(total) / numbers()), slope = broadcast(reduce_add(along) / numbers());
    each([&](int64_t i, int) { store(grad + i, (load(grad + i) - mean - load(unit + i) * slope) * rstd); });
  }

 private:
  S numbers() const { return (S)(units_ * kCount); }
  template <class Use>
  __attribute__((always_inline)) void each(const Use& use) const {
    for (int64_t unit = 0, block = 0; unit < units_; unit += kWidth, block += stride_)
      for (int k = 0; k < kCount; ++k)
        use(block + at_[k] * kWidth, units_ - unit < kWidth ? (int)(units_ - unit) : kWidth);
  }

  const int (&at_)[kCount];
  int64_t stride_, units_;
};

inline constexpr int kAlone[1] = {0};

// The sums of a normalised cell from its two products u = W_ih·x and v = W_hh·h.
template <class T, class Cell>
class NormedSums {
 public:
  using S = typename Compute<T>::Scalar;
  static constexpr int kWidth = Compute<T>::kWidth;
  NormRow<T, Cell::kGates> input, hidden;

  explicit NormedSums(const SequenceInputs& in)
      : input(Cell::kInputSum, kSumCount, in.shape.hidden),
        hidden(Cell::kHiddenSum, kSumCount, in.shape.hidden),
        in_(in) {}

  // sums = γ_ih ⊙ u + b_ih + b_hh for the units of one block, where `u` is normalised.
  __attribute__((always_inline)) void from_input(const S* u, int64_t unit, Vector<T> (&sums)[kSumCount]) const {
    const int units = units_from(unit);
    for (int s = 0; s < kSumCount; ++s) sums[s] = Vector<T>{};
    for (int g = 0; g < Cell::kGates; ++g) {
      Vector<T>& sum = sums[Cell::kInputSum[g]];
      sum = load(u + Cell::kInputSum[g] * kWidth) * gate(in_.ln_ih, g, unit, units);
      if (in_.b_ih) sum = sum + gate(in_.b_ih, g, unit, units);
    }
    if (in_.b_hh)
      for (int g = 0; g < Cell::kGates; ++g) {
        Vector<T>& sum = sums[Cell::kHiddenSum[g]];
        sum = sum + gate(in_.b_hh, g, unit, units);
      }
  }

  // sums += γ_hh ⊙ v
  __attribute__((always_inline)) void add_hidden(const S* v, int64_t unit, Vector<T> (&sums)[kSumCount]) const {
    const int units = units_from(unit);
    for (int g = 0; g < Cell::kGates; ++g) {
      Vector<T>& sum = sums[Cell::kHiddenSum[g]];
      sum = fma(load(v + Cell::kHiddenSum[g] * kWidth), gate(in_.ln_hh, g, unit, units), sum);
    }
  }

 private:
  int units_from(int64_t unit) const {
    return in_.shape.hidden - unit < kWidth ? (int)(in_.shape.hidden - unit) : kWidth;
  }
  __attribute__((always_inline)) Vector<T> gate(const void* vector, int g, int64_t unit, int units) const {
    return load_first((const T*)vector + g * in_.shape.hidden + unit, units);
  }
  const SequenceInputs& in_;
};

// y = γ_c ⊙ c + β_c, where `c` is normalised.
template <class T>
SEQREC_INLINE Vector<T> normed_cell(const SequenceInputs& in, Vector<T> c, int64_t unit) {
  constexpr int kWidth = Compute<T>::kWidth;
  const int units = in.shape.hidden - unit < kWidth ? (int)(in.shape.hidden - unit) : kWidth;
  const Vector<T> y = c * load_first((const T*)in.ln_c + unit, units);
  return in.ln_c_bias ? y + load_first((const T*)in.ln_c_bias + unit, units) : y;
}

}  // namespace seqrec_fast::SEQREC_TIER
