// Matrix tiles (AMX): eight registers of 16 rows × 64 bytes, and one instruction that multiplies two of them.
//
// Tile numbers are compile-time constants. Here 0 … 3 hold sums, 4 and 5 left operands (a row of A in each row), 6 and
// 7 right operands. The assembly is ours because the compiler's macros take literals only, and its _tile_loadconfig
// tells the optimiser of 8 of the 64 bytes that it reads.
//
// With SEQREC_EMULATED_TILES plain C++ stands in for the instructions (see tiles_emulated.h), so that everything built
// on them can be run, and compared, on any processor with AVX-512.
#pragma once

#include "vector.h"

#if defined(__AMX_BF16__) && !defined(SEQREC_EMULATED_TILES)
#define SEQREC_TILES 1
#elif defined(SEQREC_EMULATED_TILES)
#define SEQREC_TILES 1
#include "tiles_emulated.h"
#endif

#if defined(SEQREC_TILES)
namespace seqrec_fast::SEQREC_TIER {

// An operand as it lies in memory. Left: row m holds A[m][0 … 31] in bf16. Right: row k holds B[2k][n] and B[2k + 1][n]
// for each n of 16, the first in the low half.
struct TileImage {
  alignas(64) uint32_t row[16][16];
};

struct alignas(64) TileShapes {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  explicit TileShapes(int used_rows) {
    for (int i = 0; i < 8; ++i) {
      row_bytes[i] = 64;
      rows[i] = i < 6 ? used_rows : 16;
    }
  }
};
static_assert(sizeof(TileShapes) == 64);

#if defined(SEQREC_EMULATED_TILES)
SEQREC_INLINE void tiles_configure(const TileShapes& shapes) { emulated::configure(&shapes); }
SEQREC_INLINE void tiles_release() { emulated::configure(nullptr); }
template <int kTile>
SEQREC_INLINE void tile_zero() {
  emulated::zero(kTile);
}
template <int kTile>
SEQREC_INLINE void tile_load(const void* from, int64_t stride) {
  emulated::load(kTile, from, stride);
}
template <int kTile>
SEQREC_INLINE void tile_store(void* to, int64_t stride) {
  emulated::store(kTile, to, stride);
}
template <int kSum, int kLeft, int kRight>
SEQREC_INLINE void tile_multiply() {
  emulated::multiply(kSum, kLeft, kRight);
}
#else
SEQREC_INLINE void tiles_configure(const TileShapes& shapes) { asm volatile("ldtilecfg %0" ::"m"(shapes)); }
SEQREC_INLINE void tiles_release() { asm volatile("tilerelease"); }
template <int kTile>
SEQREC_INLINE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}
// Rows are `stride` bytes apart.
template <int kTile>
SEQREC_INLINE void tile_load(const void* from, int64_t stride) {
  asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(kTile), "r"(from), "r"(stride) : "memory");
}
template <int kTile>
SEQREC_INLINE void tile_store(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(kTile), "r"(to), "r"(stride) : "memory");
}
// sum += left · right, in fp32.
template <int kSum, int kLeft, int kRight>
SEQREC_INLINE void tile_multiply() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kLeft), "i"(kRight));
}
#endif

// The tile registers of this thread, configured for as long as this lives. Tiles 0 … 5 have `rows` rows: a product
// takes one cycle a row.
class TileScope {
 public:
  explicit TileScope(int64_t rows = 16) { tiles_configure(TileShapes(rows < 16 ? (int)rows : 16)); }
  TileScope(const TileScope&) = delete;
  ~TileScope() { tiles_release(); }
};

}  // namespace seqrec_fast::SEQREC_TIER
#endif
