// A chunk of items on its way through the softmax kernels: vectors as fp32 or pairs, scores of a block of rows, and
// the pairs among them that are excluded or kept.
#pragma once

#include "catalogue/exact.h"
#include "catalogue/softmax_call.h"
#include "catalogue/softmax_numbers.h"
#include "common/scratch.h"
#include "common/vector_math.h"

namespace seqrec_fast::SEQREC_TIER {

SEQREC_INLINE int64_t up_to(int64_t n, int64_t step) { return (n + step - 1) / step * step; }
SEQREC_INLINE float infinity() { return __builtin_inff(); }
SEQREC_INLINE bool is_finite(float x) { return __builtin_fabsf(x) < infinity(); }

SEQREC_INLINE float option_at(const VectorView& vector, Format format, int64_t i) {
  return with_format(format, [&](auto element) { return static_cast<float>(at<decltype(element)>(vector, i)); });
}

// The factor of one row's query.
SEQREC_INLINE double factor_of(const SoftmaxCall& call, int64_t row) {
  return call.row_scale.data ? call.scale * static_cast<double>(option_at(call.row_scale, call.scale_format, row))
                             : call.scale;
}

// First place in [begin, end) whose id is not below `id`.
SEQREC_INLINE int64_t first_not_below(const int64_t* ids, int64_t begin, int64_t end, int64_t id) {
  while (begin < end) {
    const int64_t middle = begin + (end - begin) / 2;
    if (ids[middle] < id)
      begin = middle + 1;
    else
      end = middle;
  }
  return begin;
}

// Walks the rows' sorted lists as the items pass by.
class Cursors {
 public:
  Cursors(const SortedLists& lists, int64_t* places) : lists_(lists), places_(places) {}

  // The next items will be those from `item` on.
  void seek(int64_t first_row, int64_t num_rows, int64_t item) {
    first_row_ = first_row;
    if (!lists_.begin) return;
    for (int64_t r = 0; r < num_rows; ++r)
      places_[r] = first_not_below(lists_.ids, lists_.begin[first_row + r], lists_.begin[first_row + r + 1], item);
  }

  // Calls visit(row - first row, item, place) for the pairs of rows [begin, end) with items below `last`, once each.
  template <class Visit>
  SEQREC_METHOD void pass(int64_t begin, int64_t end, int64_t last, bool advance, const Visit& visit) {
    if (!lists_.begin) return;
    for (int64_t r = begin; r < end; ++r) {
      int64_t place = places_[r];
      const int64_t stop = lists_.begin[first_row_ + r + 1];
      for (; place < stop && lists_.ids[place] < last; ++place) visit(r, lists_.ids[place], place);
      if (advance) places_[r] = place;
    }
  }

  bool any() const { return lists_.begin != nullptr; }

 private:
  SortedLists lists_;
  int64_t* places_;
  int64_t first_row_ = 0;
};

// Vectors of a chunk of items, zeros behind the last, for products with probabilities.
//
// Products meet probabilities of 0 with vectors that hold NaN or ±∞, which must leave no trace there. Such vectors are
// cleared for the products, and their pairs added one by one.
template <class T>
struct ChunkVectors {
  MatrixView from;
  int64_t width = 0, first = 0, count = 0, padded = 0;
  const Number<T>* rows = nullptr;  // [padded] at row_stride, as a tile of scores takes them
  int64_t row_stride = 0;
  const Number<T>* data = nullptr;  // [numbers_in(count), width], summed over items; see interleave
  int64_t num_special = 0;
  int32_t* special = nullptr;  // the vectors that were cleared

  void reserve(const MatrixView& matrix, int64_t columns, int64_t most, Layout& layout) {
    from = matrix, width = columns;
    staged_ = layout.take<Number<T>>(most * numbers_in<T>(width));
    interleaved_ = layout.take<Number<T>>(kPaired<T> ? pairs_in(most) * width : 0);
    special = layout.take<int32_t>(most);
  }

  // copy: contiguous rows of numbers that are there already, or null.
  void stage(int64_t first_item, int64_t num_items, const Number<T>* copy) {
    first = first_item, count = num_items, padded = up_to(num_items, kTile);
    num_special = 0;
    row_stride = numbers_in<T>(width);
    rows = copy ? copy : staged_;
    if (!copy) {
      // fp32 products take whole rows.
      const bool dense = kPaired<T> || from.row_stride == width || count == 1;
      if (padded == count && dense && lies_as_numbers<T>(from, width)) {
        rows = reinterpret_cast<const Number<T>*>(row_of<T>(from, first));
        if (kPaired<T>) row_stride = from.row_stride / 2;
      } else {
        copy_to(staged_);
      }
    }
    if constexpr (!kPaired<T>) data = rows;
  }

  void copy_to(Number<T>* to) const {
    const int64_t numbers = numbers_in<T>(width);
    for (int64_t i = 0; i < count; ++i)
      read_numbers(row_of<T>(from, first + i), from.column_stride, width, to + i * numbers);
    for (int64_t k = count * numbers; k < padded * numbers; ++k) to[k] = Number<T>{};
  }

  void clear_special() {
    for (int64_t i = 0; i < count; ++i)
      if (!is_all_finite(rows + i * row_stride)) special[num_special++] = static_cast<int32_t>(i);
    if (!num_special) return;
    if (rows != staged_) copy_to(staged_);
    rows = staged_, row_stride = numbers_in<T>(width);
    for (int64_t s = 0; s < num_special; ++s)
      for (int64_t k = 0; k < row_stride; ++k) staged_[special[s] * row_stride + k] = Number<T>{};
    if constexpr (!kPaired<T>) data = rows;
  }

  // Makes `data`, once clear_special had its chance.
  void interleave() {
    if constexpr (kPaired<T>) {
      for (int64_t i = 0; i < count; i += 2) {
        const BF16* low = reinterpret_cast<const BF16*>(rows + i * row_stride);
        const BF16* high = i + 1 < count ? reinterpret_cast<const BF16*>(rows + (i + 1) * row_stride) : nullptr;
        Number<T>* to = interleaved_ + i / 2 * width;
        int64_t k = 0;
        for (; k + kLanes <= width; k += kLanes)
          store_pairs(to + k, load_bits(low + k), high ? load_bits(high + k) : U16{});
        for (; k < width; ++k) to[k].bits = low[k].bits | (high ? uint32_t{high[k].bits} << 16 : 0u);
      }
      data = interleaved_;
    }
  }

  float special_value(int64_t s, int64_t k) const {
    return static_cast<float>(value(row_of<T>(from, first + special[s])[k * from.column_stride]));
  }

 private:
  bool is_all_finite(const Number<T>* row) const {
    const T* numbers = reinterpret_cast<const T*>(row);
    float sum = 0.0f;  // NaN where anything is not finite
    if constexpr (kPaired<T>)
      for (int64_t k = 0; k < width; ++k) sum += value(numbers[k]) * 0.0f;
    else
      for (int64_t k = 0; k < width; ++k) sum += row[k] * 0.0f;
    return sum == 0.0f;
  }

  Number<T>*staged_, *interleaved_;
};

template <class T>
struct SoftmaxChunk {
  const SoftmaxCall& call;
  int64_t first = 0, count = 0, padded = 0;
  const Number<T>* keys = nullptr;  // as they are
  int64_t key_stride = 0;
  ChunkVectors<T> values;
  ChunkVectors<T> own_keys;      // where the values are others, and the keys go into products too
  const float* start = nullptr;  // [padded] bias

  // With the layout's memory null only the size is counted.
  SoftmaxChunk(const SoftmaxCall& call, int64_t chunk_items, bool multiply_keys, Layout& layout)
      : call(call), multiply_keys_(multiply_keys && call.own_values) {
    const int64_t most = up_to(chunk_items, kTile);
    staged_keys_ = layout.take<Number<T>>(most * numbers_in<T>(call.width));
    values.reserve(call.values, call.value_width, most, layout);
    if (multiply_keys_) own_keys.reserve(call.items, call.width, most, layout);
    start_ = layout.take<float>(most);
    dead_ = layout.take<int32_t>(most);
  }

  // The keys as products take them.
  ChunkVectors<T>& keys_to_multiply() { return call.own_values ? own_keys : values; }

  void stage(int64_t first_item, int64_t num_items) {
    first = first_item, count = num_items, padded = up_to(num_items, kTile);
    const Number<T>* copy = nullptr;
    const int64_t numbers = numbers_in<T>(call.width);
    if (padded == count && lies_as_numbers<T>(call.items, call.width)) {
      keys = reinterpret_cast<const Number<T>*>(row_of<T>(call.items, first));
      key_stride = kPaired<T> ? call.items.row_stride / 2 : call.items.row_stride;
    } else {
      for (int64_t i = 0; i < count; ++i)
        read_numbers(row_of<T>(call.items, first + i), call.items.column_stride, call.width,
                     staged_keys_ + i * numbers);
      for (int64_t k = count * numbers; k < padded * numbers; ++k) staged_keys_[k] = Number<T>{};
      keys = copy = staged_keys_, key_stride = numbers;
    }
    values.stage(first, count, call.own_values ? nullptr : copy);
    if (multiply_keys_) own_keys.stage(first, count, copy);
    num_dead_ = 0;
    for (int64_t i = 0; i < count; ++i) {
      const float bias = call.bias.data ? option_at(call.bias, call.bias_format, first + i) : 0.0f;
      start_[i] = bias;
      if (bias == -infinity()) dead_[num_dead_++] = static_cast<int32_t>(i);
    }
    for (int64_t i = count; i < padded; ++i) start_[i] = 0.0f;
    start = start_;
    first_skipped_ = first_not_below(call.skipped, 0, call.num_skipped, first);
    if (call.own_values) values.clear_special();
  }

  // Called with the scores of a block of rows, before exclusion: where a vector of keys is not finite, no row's score
  // is.
  template <int kVectors>
  void look_at(const float* scores, int64_t stride) {
    F32 sum{};
    for (int64_t i = 0; i < count; ++i)
      for (int u = 0; u < kVectors; ++u) sum = sum + load(scores + i * stride + u * kLanes) * 0.0f;
    if (!any((I32)(sum != 0.0f))) return;
    if (!call.own_values)
      values.clear_special();
    else if (multiply_keys_)
      own_keys.clear_special();
  }

  // scores[i][lane] of kVectors registers of rows, `stride` floats from item to item.
  template <int kVectors>
  SEQREC_METHOD void score(const Number<T>* queries, const float* factors, float* scores, int64_t stride,
                           const Ahead& ahead) const {
    score_items<kVectors>(queries, numbers_in<T>(call.width), keys, key_stride, start, factors, padded, scores, stride,
                          ahead);
  }

  // Items that are excluded for every row.
  template <class Clear>
  SEQREC_METHOD void each_skipped(const Clear& clear) const {
    for (int64_t s = first_skipped_; s < call.num_skipped && call.skipped[s] < first + count; ++s)
      clear(call.skipped[s] - first);
  }
  template <class Clear>
  SEQREC_METHOD void each_dead(const Clear& clear) const {
    for (int64_t d = 0; d < num_dead_; ++d) clear(dead_[d]);
  }
  bool skips() const { return first_skipped_ < call.num_skipped && call.skipped[first_skipped_] < first + count; }

 private:
  Number<T>* staged_keys_;
  float* start_;
  int32_t* dead_;
  int64_t num_dead_ = 0, first_skipped_ = 0;
  bool multiply_keys_;
};

// One row with many kept pairs: an excluded id is looked up among them.
template <class T>
__attribute__((noinline)) void exclude_around(const SoftmaxChunk<T>& chunk, Cursors& lists, Cursors& kept, int64_t r,
                                              float* scores, int64_t stride) {
  const int64_t last = chunk.first + chunk.count;
  const auto out = [&](int64_t id) {
    bool is_kept = false;
    kept.pass(r, r + 1, last, false, [&](int64_t, int64_t item, int64_t) { is_kept |= item == id; });
    if (!is_kept) scores[(id - chunk.first) * stride] = -infinity();
  };
  lists.pass(r, r + 1, last, true, [&](int64_t, int64_t item, int64_t) { out(item); });
  chunk.each_skipped([&](int64_t i) { out(chunk.first + i); });
}

// Excluded scores of a block become -inf, but those of kept pairs stay; items with a bias of -inf are out whatever
// their vectors hold. Rows [begin, begin + rows) of the group whose lists the cursors walk, at `scores` lane 0 ….
// The cursors of the kept pairs stay where they are.
template <int kVectors, class T>
SEQREC_INLINE void exclude(const SoftmaxChunk<T>& chunk, Cursors& lists, Cursors& kept, int64_t begin, int64_t rows,
                           float* scores, int64_t stride) {
  const int64_t end = begin + rows, last = chunk.first + chunk.count;
  constexpr int kSaved = 64;
  const bool restores = kept.any() && (lists.any() || chunk.skips());
  const auto clear = [&](int64_t i) {
    for (int u = 0; u < kVectors; ++u) store(scores + i * stride + u * kLanes, broadcast(-infinity()));
  };
  if (restores) {
    // Kept scores are put aside a few rows at a time: a row may have any number of them.
    for (int64_t r = begin; r < end; ++r) {
      float saved[kSaved];
      int64_t count = 0;
      kept.pass(r, r + 1, last, false, [&](int64_t, int64_t item, int64_t) {
        if (count < kSaved) saved[count] = scores[(item - chunk.first) * stride + r - begin];
        ++count;
      });
      if (count > kSaved) {
        exclude_around(chunk, lists, kept, r, scores + (r - begin), stride);
        continue;
      }
      const auto out = [&](int64_t, int64_t item, int64_t) {
        scores[(item - chunk.first) * stride + r - begin] = -infinity();
      };
      lists.pass(r, r + 1, last, true, out);
      chunk.each_skipped([&](int64_t i) { scores[i * stride + r - begin] = -infinity(); });
      int64_t next = 0;
      kept.pass(r, r + 1, last, false, [&](int64_t, int64_t item, int64_t) {
        scores[(item - chunk.first) * stride + r - begin] = saved[next++];
      });
    }
  } else {
    lists.pass(begin, end, last, true, [&](int64_t r, int64_t item, int64_t) {
      scores[(item - chunk.first) * stride + r - begin] = -infinity();
    });
    chunk.each_skipped(clear);
  }
  chunk.each_dead(clear);
}

// e^x for x at most a little above 0 (a score less the largest), to 2 units in the last place; 0 below 2^-126, NaN for
// NaN, and where kMayBeInfinite +∞ for +∞. 13 instructions where the general exp has 20: x = n·ln2 + r, and n + 127
// falls out of the sum that rounds, as the exponent of 2^n, which is 0 for n = -127. The polynomial is the minimax one
// of degree 6 that begins 1 + r (relative error 4e-9).
template <bool kMayBeInfinite>
SEQREC_INLINE F32 exp_of_difference(F32 x) {
  if constexpr (kMayBeInfinite) x = min(broadcast(89.0f), x);  // n = 128 gives 2^n = +∞
  x = max(broadcast(-88.1f), x);                               // n = -127
  const F32 magic = broadcast(0x1.8p23f + 127.0f);
  const F32 shifted = fma(x, broadcast(0x1.715476p0f), magic);
  const F32 n = shifted - magic;
  // ln2 in two parts; the first has 9 trailing zeros, so n times it is exact.
  F32 r = fma(n, broadcast(-0x1.62e4p-1f), x);
  r = fma(n, broadcast(-0x1.7f7d1cp-20f), r);
  F32 p = fma(broadcast(0x1.6a23dp-10f), r, broadcast(0x1.123a2p-7f));
  p = fma(p, r, broadcast(0x1.5558f2p-5f));
  p = fma(p, r, broadcast(0x1.555492p-3f));
  p = fma(p, r, broadcast(0x1.fffffcp-2f));
  p = fma(p, r, broadcast(1.0f));
  p = fma(p, r, broadcast(1.0f));
  return p * (F32)((I32)shifted << 23);
}

}  // namespace seqrec_fast::SEQREC_TIER
