// Softmax sums of a group of rows over runs of the catalogue.
//
// A chunk of items meets the group block by block: scores (items × lanes of rows, tile.h), their largest, exp, and the
// product with the values. Sums of a leaf are added chunk after chunk, those of leaves by halves, so the order of every
// sum depends on the number of items and the widths alone. Milakov & Gimelshein (2018), "Online normalizer
// calculation": a larger score raises the shift, and what was summed before is scaled down.
#pragma once

#include "catalogue/softmax_chunk.h"
#include "common/gemm.h"

namespace seqrec_fast::SEQREC_TIER {

constexpr int64_t kLeafItems = 2048, kMostLeaves = 64;

// A power of two: the most leaves of at least kLeafItems.
SEQREC_INLINE int64_t count_leaves(int64_t num_items, int64_t most_leaves) {
  int64_t leaves = 1;
  while (leaves < most_leaves && num_items >= 2 * leaves * kLeafItems) leaves *= 2;
  return leaves;
}
SEQREC_INLINE int64_t first_chunk_of(const SoftmaxPlan& plan, int64_t leaf) { return plan.chunks * leaf / plan.leaves; }

SEQREC_INLINE int64_t levels_of(int64_t leaves) {
  int64_t levels = 1;
  for (; leaves > 1; leaves /= 2) ++levels;
  return levels;
}

SEQREC_INLINE int64_t floats_of_sums(int64_t rows, int64_t value_width) { return rows * (value_width + 2); }

SEQREC_INLINE SoftmaxSums sums_at(float* memory, int64_t rows, bool context) {
  return {memory, memory + rows, context ? memory + 2 * rows : nullptr};
}

// lower += upper.
void merge_sums(const SoftmaxSums& lower, const SoftmaxSums& upper, int64_t rows, int64_t width) {
  for (int64_t r = 0; r < rows; ++r) {
    const float a = lower.shift[r], b = upper.shift[r], top = a > b ? a : b;
    // A side without a score has sums of 0 (or, with scores of +∞ or NaN, sums that no factor changes).
    const float of_a =
        a == top || a == -infinity() ? 1.0f : static_cast<float>(__builtin_exp(static_cast<double>(a) - top));
    const float of_b =
        b == top || b == -infinity() ? 1.0f : static_cast<float>(__builtin_exp(static_cast<double>(b) - top));
    lower.shift[r] = top;
    lower.total[r] = lower.total[r] * of_a + upper.total[r] * of_b;
    if (!lower.context) continue;
    float* to = lower.context + r * width;
    const float* from = upper.context + r * width;
    int64_t k = 0;
    for (; k + kLanes <= width; k += kLanes) store(to + k, fma(load(to + k), broadcast(of_a), load(from + k) * of_b));
    for (; k < width; ++k) to[k] = to[k] * of_a + from[k] * of_b;
  }
}

template <class T>
struct SoftmaxForward {
  const SoftmaxCall& call;
  const SoftmaxPlan& plan;
  SoftmaxChunk<T> chunk;
  Number<T>* panel;
  float* factors;      // [group] of the rows' queries
  float* scores;       // [chunk, kBlock] of one block
  Number<T>* weights;  // the same as numbers that a product takes
  float* stack;        // sums of unfinished leaves
  int64_t* list_places;
  int64_t* kept_places;
  bool context;
  int64_t first_row = 0, num_rows = 0;
  float* kept_score = nullptr;

  SoftmaxForward(const SoftmaxCall& call, const SoftmaxPlan& plan, bool context, Layout& layout)
      : call(call), plan(plan), chunk(call, plan.chunk_items, false, layout), context(context) {
    panel = layout.take<Number<T>>(plan.group_rows * numbers_in<T>(call.width));
    factors = layout.take<float>(plan.group_rows);
    scores = layout.take<float>(up_to(plan.chunk_items, kTile) * kBlock);
    weights = layout.take<Number<T>>(kPaired<T> ? pairs_in(up_to(plan.chunk_items, kTile)) * kBlock : 0);
    stack = layout.take<float>((levels_of(plan.leaves) + 1) * floats_of_sums(plan.group_rows, call.value_width));
    list_places = layout.take<int64_t>(plan.group_rows);
    kept_places = layout.take<int64_t>(plan.group_rows);
  }

  void pack() {
    const int64_t padded = up_to(num_rows, kLanes);
    for (int64_t k = 0; k < padded * numbers_in<T>(call.width); ++k) panel[k] = Number<T>{};
    for (int64_t r = 0; r < padded; ++r) factors[r] = 0.0f;
    for (int64_t r = 0; r < num_rows; ++r) {
      const double factor = factor_of(call, first_row + r);
      factors[r] = static_cast<float>(factor);
      pack_numbers<T>(panel, call.width, num_rows, r, row_of<T>(call.query, first_row + r), call.query.column_stride,
                      factor);
    }
  }

  void run(int64_t first_leaf, int64_t num_leaves, const SoftmaxSums& out) {
    pack();
    const int64_t step = floats_of_sums(num_rows, call.value_width);
    int64_t top = 0;
    const auto level = [&](int64_t n) { return n == 0 ? out : sums_at(stack + n * step, num_rows, context); };
    for (int64_t leaf = 0; leaf < num_leaves; ++leaf) {
      sum_leaf(first_leaf + leaf, level(top++));
      for (int64_t n = leaf + 1; n % 2 == 0; n /= 2, --top)
        merge_sums(level(top - 2), level(top - 1), num_rows, call.value_width);
    }
  }

  void sum_leaf(int64_t leaf, const SoftmaxSums& sums) {
    for (int64_t r = 0; r < num_rows; ++r) sums.shift[r] = -infinity(), sums.total[r] = 0.0f;
    if (context)
      for (int64_t k = 0; k < num_rows * call.value_width; ++k) sums.context[k] = 0.0f;
    const int64_t begin = first_chunk_of(plan, leaf), end = first_chunk_of(plan, leaf + 1);
    Cursors lists(call.lists, list_places), kept(call.kept, kept_places);
    lists.seek(first_row, num_rows, begin * plan.chunk_items);
    kept.seek(first_row, num_rows, begin * plan.chunk_items);
    for (int64_t c = begin; c < end; ++c) {
      const int64_t first = c * plan.chunk_items;
      chunk.stage(first, least(plan.chunk_items, call.num_items - first));
      const Ahead ahead = ahead_of(c + 1 < plan.chunks ? c + 1 : c);
      for (int64_t row = 0; row < num_rows; row += kBlock) {
        const int64_t rows = least(kBlock, num_rows - row);
        const int64_t turns = chunk.padded / kTile * (numbers_in<T>(call.width) / kTurn);
        const Ahead here{ahead.address + row / kBlock * turns * ahead.step, ahead.step};
        if (rows > kLanes)
          block<kWide>(row, rows, here, lists, kept, sums);
        else
          block<1>(row, rows, here, lists, kept, sums);
      }
    }
  }

  // Bytes to fetch a turn, so that the next chunk is there when this one is done.
  Ahead ahead_of(int64_t next) const {
    const int64_t turns =
        numbers_in<T>(call.width) / kTurn * (chunk.padded / kTile) * (up_to(num_rows, kBlock) / kBlock);
    const int64_t row_bytes = call.items.row_stride * static_cast<int64_t>(sizeof(T));
    const bool dense = call.items.column_stride == 1 && call.items.row_stride < 2 * call.width;
    const char* from = reinterpret_cast<const char*>(row_of<T>(call.items, next * plan.chunk_items));
    return {from, dense && turns > 0 ? plan.chunk_items * row_bytes / turns : 0};
  }

  template <int kVectors>
  SEQREC_METHOD void block(int64_t row, int64_t rows, const Ahead& ahead, Cursors& lists, Cursors& kept,
                           const SoftmaxSums& sums) {
    constexpr int64_t kStride = kVectors * kLanes;
    chunk.template score<kVectors>(panel + row * numbers_in<T>(call.width), factors + row, scores, kStride, ahead);
    if (row == 0 && context) {
      chunk.template look_at<kVectors>(scores, kStride);
      chunk.values.interleave();
    }
    exclude<kVectors>(chunk, lists, kept, row, rows, scores, kStride);
    kept.pass(row, row + rows, chunk.first + chunk.count, true, [&](int64_t r, int64_t item, int64_t place) {
      kept_score[call.kept_slot[place]] = scores[(item - chunk.first) * kStride + r - row];
    });
    weigh<kVectors>(row, rows, sums);
    if (!context) return;
    float* out = sums.context + row * call.value_width;
    const ChunkVectors<T>& values = chunk.values;
    const Number<T>* a = by_items<T>(scores, kStride, chunk.count, kStride, weights);
    product_part(Product<Number<T>, float>{a, 1, kStride, values.data, out, rows, values.width,
                                           numbers_in<T>(chunk.count), true},
                 0, 1, 1);
    for (int64_t s = 0; s < values.num_special; ++s)
      for (int64_t lane = 0; lane < rows; ++lane) {
        const float weight = scores[values.special[s] * kStride + lane];
        if (weight == 0.0f) continue;
        for (int64_t k = 0; k < values.width; ++k) out[lane * values.width + k] += weight * values.special_value(s, k);
      }
  }

  // Scores become exp(score - shift), with the shift raised where a score is larger, and are added up.
  template <int kVectors>
  SEQREC_METHOD void weigh(int64_t row, int64_t rows, const SoftmaxSums& sums) {
    constexpr int64_t kStride = kVectors * kLanes;
    float former[kStride], total[kStride], factor[kStride];
    F32 top[kVectors], base[kVectors], sum[kVectors]{};
    for (int64_t lane = 0; lane < kStride; ++lane) {
      former[lane] = lane < rows ? sums.shift[row + lane] : 0.0f;
      total[lane] = lane < rows ? sums.total[row + lane] : 0.0f;
    }
#pragma GCC unroll 4
    for (int u = 0; u < kVectors; ++u) top[u] = load(former + u * kLanes);
    for (int64_t i = 0; i < chunk.count; ++i)
#pragma GCC unroll 4
      for (int u = 0; u < kVectors; ++u)
        top[u] = max(load(scores + i * kStride + u * kLanes), top[u]);  // NaN stays out
    I32 raised{};
#pragma GCC unroll 4
    for (int u = 0; u < kVectors; ++u) {
      const F32 old = load(former + u * kLanes);
      top[u] = select(top[u] < infinity(), top[u], old);  // a score of +∞ is no shift: it makes the sum infinite
      raised |= top[u] > old;
      // Before any finite score the shift was none, and the sum 0, +∞ or NaN.
      store(factor + u * kLanes, select(old > -infinity(), exp_of_difference<false>(old - top[u]), broadcast(1.0f)));
      base[u] = select(top[u] > -infinity(), top[u], broadcast(0.0f));
      store(former + u * kLanes, top[u]);
    }
    for (int64_t i = 0; i < chunk.count; ++i)
#pragma GCC unroll 4
      for (int u = 0; u < kVectors; ++u) {
        float* at = scores + i * kStride + u * kLanes;
        const F32 weight = exp_of_difference<true>(load(at) - base[u]);
        store(at, weight);
        sum[u] = sum[u] + weight;
      }
    const bool rescale = any(raised);
#pragma GCC unroll 4
    for (int u = 0; u < kVectors; ++u) {
      const F32 before = load(total + u * kLanes) * load(factor + u * kLanes);
      store(total + u * kLanes, before + sum[u]);
    }
    for (int64_t lane = 0; lane < rows; ++lane) {
      sums.shift[row + lane] = former[lane];
      sums.total[row + lane] = total[lane];
      if (!context || !rescale || factor[lane] == 1.0f) continue;
      float* out = sums.context + (row + lane) * call.value_width;
      for (int64_t k = 0; k < call.value_width; ++k) out[k] *= factor[lane];
    }
  }
};

}  // namespace seqrec_fast::SEQREC_TIER
