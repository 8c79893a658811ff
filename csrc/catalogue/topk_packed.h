// The parts of a top-k scan that multiply codes, of the packed int8 copy or made on the way: queries and items on their
// way into the products of a tile, and the dot products of a few rows. What they find goes through the same candidates
// as the scan in fp32.
#pragma once

#include "catalogue/quantise.h"

namespace seqrec_fast::SEQREC_TIER {

struct PackedScan {
  bool used;
  int64_t stride, products;  // of an item's codes; of kTileCodes codes that a score takes
  // By slot.
  int32_t* panel;    // as Panel, with kTileCodes codes in the place of a number; for dot products rows of stride / 2
  int32_t* offsets;  // [group] what makes up for kByteOffset
  float* scale;      // [group]
  float* coarse;     // [group] times an item's error; what belongs to its norm is Candidates::slope
  // Of the chunk, rounded up to whole registers, and a tile or a register more.
  int32_t* codes;  // rows of stride / kTileCodes, for tiles
  float* item_scale;
  float* error;
  float* norm;
  float* tile_error;  // [chunk / kTile] the largest of each tile

  // Nothing where the call is scanned in fp32.
  void take(Layout& layout, const TopkCall& call, const ScanPlan& plan) {
    used = scans_codes(call);
    const int64_t group = used * round_up(plan.group_rows, kBlock), chunk = used * round_up(plan.chunk_items, kLanes);
    const int64_t more = used * 2 * kLanes;  // a tile, or a register, behind the last
    stride = packed_stride(call.width), products = (call.width + kTileCodes - 1) / kTileCodes;
    panel = layout.take<int32_t>(most(group * products, used * kDotRows * stride / 2));
    offsets = layout.take<int32_t>(group);
    scale = layout.take<float>(group);
    coarse = layout.take<float>(group);
    codes = layout.take<int32_t>((chunk + more) * stride / kTileCodes);
    item_scale = layout.take<float>(chunk + more);
    error = layout.take<float>(chunk + more);
    norm = layout.take<float>(chunk + more);
    tile_error = layout.take<float>(chunk / kTile + used);
  }

  PackedRows rows(int64_t slot) const { return {panel + slot * products, scale + slot, offsets + slot}; }
};

// The rows of the first `plain` slots, as rows for dot products or as a panel for tiles.
template <class T>
void pack_queries(Candidates<T>& best, PackedScan& s, int64_t plain, bool dots) {
  const int64_t size = dots ? plain * s.stride / 2 : round_up(plain, kLanes) * s.products;
  for (int64_t i = 0; i < size; ++i) s.panel[i] = 0;
  for (int64_t slot = 0; slot < round_up(plain, kLanes); ++slot)
    s.scale[slot] = s.coarse[slot] = 0.0f, s.offsets[slot] = 0;
  for (int64_t slot = 0; slot < plain; ++slot) {
    const int64_t block = slot / kBlock, lane = slot % kBlock, row = best.row[slot];
    const int64_t lanes = plain - block * kBlock <= kLanes ? kLanes : kBlock;
    const double norm = best.norm[slot];
    const PackedQuery query =
        dots ? pack_query<2, T>(best.call, row, norm, s.panel + slot * s.stride / 2, 1)
             : pack_query<kTileCodes, T>(best.call, row, norm, s.panel + block * kBlock * s.products + lane, lanes);
    s.scale[slot] = query.scale, s.coarse[slot] = query.coarse, best.slope[slot] = query.slope;
    s.offsets[slot] = static_cast<int32_t>(-kByteOffset * query.sum);
  }
}

// Takes out the items that fp64 must decide.
SEQREC_INLINE void take_out_special(ScanChunk& chunk, PackedScan& s) {
  chunk.num_special = 0;
  for (int64_t i = 0; i < chunk.count; i += kLanes) {
    const I32 within =
        (I32)(load(s.norm + i) <= static_cast<float>(kNormLimit)) & (I32)(abs(load(chunk.start + i)) <= kBiasLimit);
    const int64_t left = least(kLanes, chunk.count - i);
    for (uint32_t odd = ~mask_bits(within) & ((1u << left) - 1u); odd; odd &= odd - 1) {
      const int64_t item = i + __builtin_ctz(odd);
      make_special(chunk, item);
      s.item_scale[item] = s.error[item] = s.norm[item] = 0.0f;
    }
  }
}

// A whole tile and, for dot products, a whole register.
SEQREC_INLINE int64_t padded_facts(const ScanChunk& chunk) {
  return most(chunk.count + kLanes, round_up(chunk.count, kTile));
}

// The facts of the chunk's items, whole registers of them.
template <class T>
void stage_facts(const TopkCall& call, ScanChunk& chunk, PackedScan& s) {
  const int64_t padded = padded_facts(chunk);
  set_start<T>(call, chunk, padded);
  const float* facts = call.packed.facts + chunk.first;
  float* const arrays[] = {s.item_scale, s.error, s.norm};
  for (int64_t fact = 0; fact < 3; ++fact) {
    const float* from = facts + fact * call.packed.facts_stride;
    __builtin_memcpy(arrays[fact], from, static_cast<size_t>(chunk.count) * sizeof(float));
    for (int64_t i = chunk.count; i < padded; ++i) arrays[fact][i] = 0.0f;
  }
  take_out_special(chunk, s);
}

// The band of each tile.
SEQREC_INLINE void stage_bands(const TopkCall& call, ScanChunk& chunk, const PackedScan& s) {
  const float c = static_cast<float>(relative_band(call.width));
  for (int64_t tile = 0; tile < round_up(chunk.count, kTile); tile += kTile) {
    float norm = 0.0f, error = 0.0f, bias = 0.0f;
    for (int64_t i = tile; i < tile + kTile; ++i) {
      const float own = __builtin_fabsf(chunk.start[i]);  // NaN: not scanned
      norm = s.norm[i] > norm ? s.norm[i] : norm;
      error = s.error[i] > error ? s.error[i] : error;
      bias = own > bias ? own : bias;
    }
    chunk.band[tile / kTile] = {norm, c * bias};
    s.tile_error[tile / kTile] = error;
  }
}

// Codes of the packed copy as the tile takes them, for as many rows as will meet them.
template <class T>
void stage_packed(const TopkCall& call, ScanChunk& chunk, PackedScan& s) {
  stage_facts<T>(call, chunk, s);
  const int64_t bytes = chunk.count * s.stride, padded = round_up(chunk.count, kTile) * s.stride;
  const int8_t* codes = call.packed.codes + chunk.first * s.stride;
  if constexpr (kTileCodes == 4) {
    const uint64_t top_bits = 0x8080808080808080u;
    for (int64_t i = 0; i < bytes; i += 8) {
      uint64_t eight;
      __builtin_memcpy(&eight, codes + i, sizeof eight);
      eight ^= top_bits;
      __builtin_memcpy(s.codes + i / 4, &eight, sizeof eight);
    }
  } else {
    for (int64_t i = 0; i < bytes; i += kHalves) store(s.codes + i / 2, widened(codes + i));
  }
  for (int64_t i = bytes; i < padded; i += kTileCodes) s.codes[i / kTileCodes] = 0;
  stage_bands(call, chunk, s);
}

// Codes of the chunk's items, made here.
template <class T>
void stage_coded(const TopkCall& call, ScanChunk& chunk, PackedScan& s) {
#if defined(__AVX512VNNI__)
  const int64_t padded = padded_facts(chunk);
  set_start<T>(call, chunk, padded);
  const SquareBound bound(call.width);
  for (int64_t i = 0; i < chunk.count; i += kLanes) {
    const ItemFacts facts = code_items<T>(call, bound, chunk.first + i, least(kLanes, chunk.count - i),
                                          reinterpret_cast<int8_t*>(s.codes) + i * s.stride, s.stride);
    store(s.item_scale + i, facts.scale), store(s.error + i, facts.error), store(s.norm + i, facts.norm);
  }
  for (int64_t i = chunk.count; i < padded; ++i) s.item_scale[i] = s.error[i] = s.norm[i] = 0.0f;
  take_out_special(chunk, s);
  stage_bands(call, chunk, s);
#endif
}

// The chunk against the first Rows slots. ahead: how many items on the next chunk lies.
template <int Rows, class T>
void scan_packed_dots(Candidates<T>& best, ScanChunk& chunk, PackedScan& s, int64_t ahead) {
  const TopkCall& call = best.call;
  stage_facts<T>(call, chunk, s);
  for (int64_t fact = 0; fact < 3; ++fact)
    for (int64_t i = 0; ahead && i < chunk.count; i += 16)
      __builtin_prefetch(call.packed.facts + fact * call.packed.facts_stride + chunk.first + ahead + i, 0, 2);
  const float relative = static_cast<float>(relative_band(call.width));
  const int64_t half = s.stride / 2;
  for (int64_t i = 0; i < chunk.count; i += kLanes) {
    I32 parts[Rows][kLanes];
    for (int64_t j = 0; j < kLanes; ++j) {
      const int64_t item = chunk.first + least(i + j, chunk.count - 1);
      const int8_t* codes = call.packed.codes + item * s.stride;
      I32 sum[Rows]{};
      for (int64_t k = 0; k < half; k += 16) {
        __builtin_prefetch(codes + ahead * s.stride + 2 * k, 0, 2);
        unrolled<32 / kHalves>([&]<int part>() {
          const int64_t at = k + part * kLanes;
          const I32 wide = widened(codes + 2 * at);
          unrolled<Rows>([&]<int r>() { sum[r] += pair_products(load(s.panel + r * half + at), wide); });
        });
      }
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) parts[r][j] = sum[r];
    }
    const F32 start = load(chunk.start + i), bias = abs(start) * relative, scale = load(s.item_scale + i);
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
      const F32 scaled = __builtin_convertvector(sums_of(parts[r]), F32) * s.scale[r];
      const F32 score = fma(scaled, scale, start);
      const F32 of_norm = fma(load(s.norm + i), broadcast(best.slope[r]), bias);
      const F32 error = fma(load(s.error + i), broadcast(s.coarse[r]), of_norm);
      uint32_t bits = mask_bits((I32)(score >= best.low[r] - error));
      for (; __builtin_expect(bits != 0, 0); bits &= bits - 1) {
        const int lane = __builtin_ctz(bits);
        best.add_approximate(r, chunk.first + i + lane, score[lane], static_cast<double>(error[lane]));
      }
    }
  }
}

}  // namespace seqrec_fast::SEQREC_TIER
