// The gradient of a softmax over the catalogue: ds[i, r] = p·(g_r·v_i - g_r·c_r + w_r), p = exp(s - shift).
//
//     dk_i = Σ_r ds·q'_r        dv_i = Σ_r p·g_r        dbias_i = Σ_r ds        dq_r = Σᵢ ds·k_i (without its factor)
//
// Items stay and rows pass: the gradient of a chunk of items is finished, and written once, before the next is begun.
// A sum over rows goes group by group in the order of the rows; a sum over items as in the forward.
#pragma once

#include "catalogue/softmax_forward.h"
#include "common/lanes.h"

namespace seqrec_fast::SEQREC_TIER {

// The query as it is scored.
template <class T>
SEQREC_INLINE float query_at(const SoftmaxCall& call, int64_t row, int64_t k) {
  const double x = static_cast<double>(value(row_of<T>(call.query, row)[k * call.query.column_stride]));
  return static_cast<float>(x * factor_of(call, row));
}

template <class T>
struct SoftmaxBackward {
  const SoftmaxCall& call;
  const SoftmaxPlan& plan;
  const SoftmaxGradient& gradient;
  SoftmaxChunk<T> chunk;
  float* weights;      // [chunk, group] p
  float* derivatives;  // [chunk, group] ds
  Number<T>* numbers;  // [chunk, group] either of them as numbers that a product takes
  float* zeros;        // [chunk] start values of g·v
  float* ones;         // [kBlock] its factors
  float* item_sums;    // [chunk, d]
  float* value_sums;   // [chunk, d_v]
  float* stack;        // sums over items of unfinished leaves, [B, d] each
  int64_t* list_places;
  int64_t* kept_places;
  float* masses;  // [group] Σ p of a chunk
  SoftmaxRows rows{};
  float* skipped = nullptr;  // [B] of the leaf
  bool begun = false;        // whether the chunk's sums hold anything yet
  bool keeps = false;        // whether the chunk holds a kept pair of the group

  SoftmaxBackward(const SoftmaxCall& call, const SoftmaxPlan& plan, const SoftmaxGradient& gradient, Layout& layout)
      : call(call), plan(plan), gradient(gradient), chunk(call, plan.chunk_items, gradient.query, layout) {
    const int64_t most = up_to(plan.chunk_items, kTile);
    weights = layout.take<float>(most * plan.group_rows);
    derivatives = directed() ? layout.take<float>(most * plan.group_rows) : weights;
    numbers = layout.take<Number<T>>(kPaired<T> ? pairs_in(most) * plan.group_rows : 0);
    zeros = layout.take<float>(most);
    ones = layout.take<float>(kBlock);
    item_sums = layout.take<float>(most * call.width);
    value_sums = layout.take<float>(most * call.value_width);
    stack = gradient.query ? layout.take<float>(levels_of(plan.leaves) * call.num_rows * call.width) : nullptr;
    list_places = layout.take<int64_t>(call.num_rows);
    kept_places = layout.take<int64_t>(call.num_rows);
    masses = layout.take<float>(plan.group_rows + kBlock);
  }

  bool directed() const { return gradient.direction.data != nullptr; }

  void run_leaves(int64_t first_leaf, int64_t num_leaves, float* query_sums) {
    const int64_t size = gradient.query ? call.num_rows * call.width : 0;
    const auto level = [&](int64_t n) { return n == 0 ? query_sums : stack + (n - 1) * size; };
    int64_t top = 0;
    for (int64_t leaf = first_leaf; leaf < first_leaf + num_leaves; ++leaf) {
      float* sums = gradient.query ? level(top) : nullptr;
      for (int64_t k = 0; k < size; ++k) sums[k] = 0.0f;
      skipped = gradient.skipped ? gradient.skipped + leaf * call.num_rows : nullptr;
      for (int64_t r = 0; skipped && r < call.num_rows; ++r) skipped[r] = 0.0f;
      add_chunks(first_chunk_of(plan, leaf), first_chunk_of(plan, leaf + 1), sums);
      ++top;
      for (int64_t n = leaf - first_leaf + 1; gradient.query && n % 2 == 0; n /= 2, --top) {
        float* lower = level(top - 2);
        const float* upper = level(top - 1);
        for (int64_t k = 0; k < size; ++k) lower[k] += upper[k];
      }
    }
  }

  void add_chunks(int64_t begin, int64_t end, float* query_sums) {
    Cursors lists(call.lists, list_places), kept(call.kept, kept_places);
    lists.seek(0, call.num_rows, begin * plan.chunk_items);
    kept.seek(0, call.num_rows, begin * plan.chunk_items);
    for (int64_t i = 0; i < up_to(plan.chunk_items, kTile); ++i) zeros[i] = 0.0f;
    for (int64_t lane = 0; lane < kBlock; ++lane) ones[lane] = 1.0f;
    for (int64_t c = begin; c < end; ++c) {
      const int64_t first = c * plan.chunk_items;
      chunk.stage(first, least(plan.chunk_items, call.num_items - first));
      float* of_items = sums_for(gradient.items, gradient.item_stride, call.width, item_sums);
      float* of_values = sums_for(gradient.values, gradient.value_stride, call.value_width, value_sums);
      if (gradient.bias && !gradient.add_bias)
        for (int64_t i = 0; i < chunk.count; ++i) gradient.bias[first + i] = 0.0f;
      begun = false;
      for (int64_t row = 0; row < call.num_rows; row += plan.group_rows) {
        keeps = false;
        const int64_t count = least(plan.group_rows, call.num_rows - row);
        for (int64_t block = 0; block < count; block += kBlock) {
          const int64_t lanes = least(kBlock, count - block);
          // A block of few rows is narrower in the panel only where it is the last.
          if (lanes > kLanes)
            derive<kWide>(row + block, lanes, block, lists, kept);
          else
            derive<1>(row + block, lanes, block, lists, kept);
        }
        if (leaves_out(row, count)) continue;
        add_group(row, count, of_items, of_values, query_sums);
        begun = true;
      }
      if (!begun) clear(of_items, call.width), clear(of_values, call.value_width);
      write(gradient.items, gradient.item_stride, call.width, of_items);
      write(gradient.values, gradient.value_stride, call.value_width, of_values);
    }
  }

  // Where the sums of a chunk are formed: in the result itself where that is fp32 and contiguous.
  float* sums_for(void* result, int64_t stride, int64_t width, float* own) const {
    if (!result) return nullptr;
    if (gradient.item_format != Format::kF32 || stride != width) return own;
    return static_cast<float*>(result) + chunk.first * stride;
  }
  void clear(float* sums, int64_t width) const {
    if (!sums) return;
    for (int64_t k = 0; k < chunk.count * width; ++k) sums[k] = 0.0f;
  }
  void write(void* result, int64_t stride, int64_t width, const float* sums) const {
    if (!result || (gradient.item_format == Format::kF32 && stride == width)) return;
    with_format(gradient.item_format, [&](auto element) {
      using Out = decltype(element);
      if constexpr (!kIsDouble<Out>)
        for (int64_t i = 0; i < chunk.count; ++i)
          narrow(sums + i * width, width, static_cast<Out*>(result) + (chunk.first + i) * stride);
    });
  }

  // p and ds of one block of rows, at `column` of the group's buffers.
  template <int kVectors>
  SEQREC_METHOD void derive(int64_t row, int64_t lanes, int64_t column, Cursors& lists, Cursors& kept) {
    const int64_t stride = plan.group_rows;
    float *p = weights + column, *ds = derivatives + column;
    const Ahead nothing{reinterpret_cast<const char*>(chunk.keys), 0};
    const Number<T>* queries = static_cast<const Number<T>*>(rows.queries) + row * numbers_in<T>(call.width);
    chunk.template score<kVectors>(queries, rows.factors + row, p, stride, nothing);
    if (row == 0) {
      chunk.template look_at<kVectors>(p, stride);
      if (gradient.query) chunk.keys_to_multiply().interleave();
    }
    exclude<kVectors>(chunk, lists, kept, row, lanes, p, stride);
    F32 shift[kVectors], weight[kVectors];
#pragma GCC unroll 4
    for (int u = 0; u < kVectors; ++u) {
      const int left = static_cast<int>(least(kLanes, most(lanes - u * kLanes, 0)));
      shift[u] = load_first(gradient.shift + row + (left ? u * kLanes : 0), left);
      weight[u] = load_first(gradient.weight + row + (left ? u * kLanes : 0), left);
    }
    if (directed())
      derive_directed<kVectors>(row, lanes, p, ds, shift, weight);
    else
      weigh<kVectors>(p, shift, weight, masses + column);
    kept.pass(row, row + lanes, chunk.first + chunk.count, true, [&](int64_t r, int64_t item, int64_t place) {
      keeps = true;
      if (gradient.kept_gradient)
        ds[(item - chunk.first) * stride + r - row] -= gradient.kept_gradient[call.kept_slot[place]];
    });
  }

  // p·w, and the probabilities' sums.
  template <int kVectors>
  SEQREC_METHOD void weigh(float* p, const F32 (&shift)[kVectors], const F32 (&weight)[kVectors], float* mass) {
    F32 sum[kVectors]{};
    for (int64_t i = 0; i < chunk.count; ++i)
#pragma GCC unroll 4
      for (int u = 0; u < kVectors; ++u) {
        float* at = p + i * plan.group_rows + u * kLanes;
        const F32 probability = exp_of_difference<false>(load(at) - shift[u]);
        sum[u] = sum[u] + probability;
        store(at, probability * weight[u]);
      }
#pragma GCC unroll 4
    for (int u = 0; u < kVectors; ++u) store(mass + u * kLanes, sum[u]);
  }

  // Whether this chunk's gradients from this group of rows are left out; then it is noted for each row how much.
  bool leaves_out(int64_t row, int64_t count) {
    if (!skipped || keeps) return false;
    const float most_mass = gradient.skip_mass;
    for (int64_t r = 0; r < count; ++r)
      if (!(skipped[row + r] + masses[r] <= most_mass)) return false;
    for (int64_t r = 0; r < count; ++r) skipped[row + r] += masses[r];
    return true;
  }

  template <int kVectors>
  SEQREC_METHOD void derive_directed(int64_t row, int64_t lanes, float* p, float* ds, const F32 (&shift)[kVectors],
                                     const F32 (&weight)[kVectors]) {
    const int64_t stride = plan.group_rows;
    const ChunkVectors<T>& values = chunk.values;
    const int64_t width = numbers_in<T>(values.width);
    const Number<T>* directions = static_cast<const Number<T>*>(rows.directions) + row * width;
    F32 offset[kVectors];
#pragma GCC unroll 4
    for (int u = 0; u < kVectors; ++u) offset[u] = load(rows.offsets + row + u * kLanes);
    score_items<kVectors>(directions, width, values.rows, values.row_stride, zeros, ones, chunk.padded, ds, stride, {});
    // A pass of its own: with the tile's sums at hand, 16 registers do not hold what exp needs.
    for (int64_t i = 0; i < chunk.count; ++i)
#pragma GCC unroll 4
      for (int u = 0; u < kVectors; ++u) {
        const int64_t at = i * stride + u * kLanes;
        const F32 probability = exp_of_difference<false>(load(p + at) - shift[u]);
        store(p + at, probability);
        // A pair of no probability has no gradient, whatever its vectors hold.
        const F32 product = probability * (load(ds + at) - offset[u] + weight[u]);
        store(ds + at, (F32)((I32)product & ~(I32)(probability == 0.0f)));
      }
    for (int64_t s = 0; s < values.num_special; ++s)
      for (int64_t lane = 0; lane < lanes; ++lane) {
        const int64_t at = values.special[s] * stride + lane;
        if (p[at] == 0.0f) continue;
        const float* direction = row_of<float>(gradient.direction, row + lane);
        float product = 0.0f;
        for (int64_t k = 0; k < values.width; ++k) product += direction[k] * values.special_value(s, k);
        ds[at] = p[at] * (product - rows.offsets[row + lane] + weight[lane / kLanes][lane % kLanes]);
      }
  }

  // One product of the chunk's pairs with vectors of rows, out[i] += Σ_r pair[i, r]·vector[r]. by_row: these vectors,
  // without those that vector_at(row, k) is needed for. factors: of vectors that are not scaled, see by_lanes.
  template <class VectorAt>
  SEQREC_METHOD void add_rows(const float* pairs, const float* factors, int64_t row, int64_t count, const void* by_row,
                              int64_t width, float* out, bool accumulate, const VectorAt& vector_at) {
    const int64_t stride = plan.group_rows;
    const Number<T>* a = by_lanes<T>(pairs, stride, chunk.count, count, factors, numbers);
    const Number<T>* vectors = static_cast<const Number<T>*>(by_row) + numbers_in<T>(row) * width;
    product_part(Product<Number<T>, float>{a, numbers_in<T>(stride), 1, vectors, out, chunk.count, width,
                                           numbers_in<T>(count), accumulate},
                 0, 1, 1);
    for (int64_t r = 0; r < count; ++r) {
      if (!rows.special[row + r]) continue;
      for (int64_t i = 0; i < chunk.count; ++i)
        if (pairs[i * stride + r] != 0.0f)
          for (int64_t k = 0; k < width; ++k) out[i * width + k] += pairs[i * stride + r] * vector_at(row + r, k);
    }
  }
  void add_queries(int64_t row, int64_t count, float* out, bool accumulate) {
    add_rows(derivatives, rows.factors + row, row, count, rows.query_rows, call.width, out, accumulate,
             [&](int64_t r, int64_t k) { return query_at<T>(call, r, k); });
  }
  void add_directions(int64_t row, int64_t count, float* out, bool accumulate) {
    add_rows(weights, nullptr, row, count, rows.direction_rows, call.value_width, out, accumulate,
             [&](int64_t r, int64_t k) { return row_of<float>(gradient.direction, r)[k]; });
  }

  // The products of a group of rows, whose pairs are in the buffers.
  void add_group(int64_t row, int64_t count, float* of_items, float* of_values, float* query_sums) {
    const bool more = begun;
    if (of_items) {
      add_queries(row, count, of_items, more);
      if (directed() && !call.own_values) add_directions(row, count, of_items, true);
    }
    if (of_values) add_directions(row, count, of_values, more);
    if (query_sums) add_items(count, query_sums + row * call.width);
    if (gradient.bias) add_bias(count);
  }

  // out[r] += Σᵢ ds[i, r]·k_i.
  void add_items(int64_t count, float* out) {
    const int64_t stride = plan.group_rows;
    const ChunkVectors<T>& keys = chunk.keys_to_multiply();
    const int64_t lanes = up_to(count, kLanes);
    const Number<T>* a = by_items<T>(derivatives, stride, chunk.count, lanes, numbers);
    product_part(Product<Number<T>, float>{a, 1, kPaired<T> ? lanes : stride, keys.data, out, count, keys.width,
                                           numbers_in<T>(chunk.count), true},
                 0, 1, 1);
    for (int64_t s = 0; s < keys.num_special; ++s)
      for (int64_t r = 0; r < count; ++r) {
        const float ds = derivatives[keys.special[s] * stride + r];
        if (ds == 0.0f) continue;
        for (int64_t k = 0; k < keys.width; ++k) out[r * keys.width + k] += ds * keys.special_value(s, k);
      }
  }

  void add_bias(int64_t count) {
    for (int64_t i = 0; i < chunk.count; ++i) {
      const float* ds = derivatives + i * plan.group_rows;
      F32 sum{};
      int64_t r = 0;
      for (; r + kLanes <= count; r += kLanes) sum = sum + load(ds + r);
      if (r < count) sum = sum + load_first(ds + r, static_cast<int>(count - r));
      gradient.bias[chunk.first + i] += reduce_add(sum);
    }
  }
};

// g·c, summed as a tile of scores sums g·v: where one item has all the probability, nothing of their difference is
// left.
template <class T>
SEQREC_INLINE float product_as_scored(const float* g, const float* c, int64_t width) {
  F32 sum{};
  if constexpr (kPaired<T>) {
    const auto pair_at = [&](const float* x, int64_t k) {
      return Number<T>{bf16_bits(x[k]) | (k + 1 < width ? uint32_t{bf16_bits(x[k + 1])} << 16 : 0u)};
    };
    for (int64_t k = 0; k < width; k += 2)
      sum = multiply_add<Number<T>>(broadcast(pair_at(c, k)), broadcast(pair_at(g, k)), sum);
  } else {
    for (int64_t k = 0; k < width; ++k) sum = fma(broadcast(g[k]), broadcast(c[k]), sum);
  }
  return sum[0];
}

// to[r, k] of what a product sums over rows: [B, width], or in pairs of rows.
template <class T>
SEQREC_INLINE void put_by_row(void* to, int64_t width, int64_t row, int64_t k, float x) {
  if constexpr (kPaired<T>) {
    uint16_t* pair = static_cast<uint16_t*>(to) + (row / 2 * width + k) * 2;
    pair[row % 2] = bf16_bits(x);
  } else {
    static_cast<float*>(to)[row * width + k] = x;
  }
}

// Rows [begin, end), begin a multiple of kBlock: queries and directions, as panels and by row.
template <class T>
void prepare_rows(const SoftmaxCall& call, const SoftmaxGradient& gradient, int64_t begin, int64_t end,
                  const SoftmaxRows& rows) {
  const int64_t padded = up_to(end, end == call.num_rows ? kLanes : kBlock);
  for (int64_t r = begin; r < padded; ++r) rows.factors[r] = r < end ? static_cast<float>(factor_of(call, r)) : 0.0f;
  const auto put = [&]<class Element>(Element, const MatrixView& from, int64_t width, bool scaled, void* to,
                                      void* by_row) {
    Number<T>* panel = static_cast<Number<T>*>(to);
    const int64_t numbers = numbers_in<T>(width);
    for (int64_t k = begin * numbers; k < padded * numbers; ++k) panel[k] = Number<T>{};
    // An odd row has no other half.
    if (kPaired<T> && end % 2)
      for (int64_t k = 0; k < width; ++k) static_cast<Number<T>*>(by_row)[end / 2 * width + k] = Number<T>{};
    for (int64_t r = begin; r < end; ++r) {
      const Element* source = row_of<Element>(from, r);
      const double factor = scaled ? factor_of(call, r) : 1.0;
      pack_numbers<T>(panel, width, call.num_rows, r, source, from.column_stride, factor);
      const auto x = [&](int64_t k) {
        const float number = value(source[k * from.column_stride]);
        return kPaired<T> ? number : static_cast<float>(static_cast<double>(number) * factor);
      };
      float sum = kPaired<T> ? static_cast<float>(factor) * 0.0f : 0.0f;
      for (int64_t k = 0; k < width; ++k) sum += x(k) * 0.0f;
      if (sum != 0.0f) rows.special[r] = 1;
      for (int64_t k = 0; k < width; ++k) put_by_row<T>(by_row, width, r, k, x(k));
    }
  };
  for (int64_t r = begin; r < end; ++r) rows.special[r] = 0;
  put(T{}, call.query, call.width, true, rows.queries, rows.query_rows);
  if (gradient.direction.data) {
    put(float{}, gradient.direction, call.value_width, false, rows.directions, rows.direction_rows);
    for (int64_t r = begin; r < end; ++r)
      rows.offsets[r] = product_as_scored<T>(row_of<float>(gradient.direction, r), row_of<float>(gradient.context, r),
                                             call.value_width);
  }
  for (int64_t r = begin; r < end; ++r) {
    if (!rows.special[r]) continue;
    for (int64_t k = 0; k < call.width; ++k) put_by_row<T>(rows.query_rows, call.width, r, k, 0.0f);
    if (gradient.direction.data)
      for (int64_t k = 0; k < call.value_width; ++k) put_by_row<T>(rows.direction_rows, call.value_width, r, k, 0.0f);
  }
}

}  // namespace seqrec_fast::SEQREC_TIER
