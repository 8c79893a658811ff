// Matrix tiles (AMX): eight registers of 16 rows × 64 bytes, and one instruction that multiplies two of them.
//
// Tile numbers are compile-time constants. Here 0 … 3 hold sums, 4 and 5 left operands (a row of A in each row), 6 and
// 7 right operands. The assembly is ours because the compiler's macros take literals only, and its _tile_loadconfig
// tells the optimiser of 8 of the 64 bytes that it reads.
//
// Two things stand in for the instructions. With AVX512_BF16 and no tiles, products of pairs (tiles_dots.h). And with
// SEQREC_EMULATED_TILES plain C++ (tiles_emulated.h), which is slow and strict: what is built on tiles can be run, and
// compared, on any processor with AVX-512.
#pragma once

#include "vector.h"

#if defined(SEQREC_EMULATED_TILES)
#define SEQREC_TILES 1
#include "tiles_emulated.h"
#elif defined(__AMX_BF16__)
#define SEQREC_TILES 1
#elif defined(__AVX512BF16__)
#define SEQREC_TILES 1
#define SEQREC_TILES_OF_DOTS 1
#include "tiles_dots.h"
#endif

#if defined(SEQREC_TILES)
namespace seqrec_fast::SEQREC_TIER {

// An operand as it lies in memory. Left: row m holds A[m][0 … 31] in bf16. Right: row k holds B[2k][n] and B[2k + 1][n]
// for each n of 16, the first in the low half.
struct TileImage {
  alignas(64) uint32_t row[16][16];
};

#if defined(SEQREC_TILES_OF_DOTS)
// One product of pairs is worth two of fp32: a sum of several takes longer than fp32 does.
constexpr int kMostParts = 1;
#else
constexpr int kMostParts = 3;

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

// The tile registers of this thread, configured for as long as this lives. Tiles 0 … 5 have `rows` rows: a product
// takes one cycle a row.
class TileScope {
 public:
  explicit TileScope(int64_t rows = 16) { configure(TileShapes(rows < 16 ? (int)rows : 16)); }
  TileScope(const TileScope&) = delete;

#if defined(SEQREC_EMULATED_TILES)
  ~TileScope() { emulated::configure(nullptr); }
  template <int kTile>
  void zero() {
    emulated::zero(kTile);
  }
  template <int kTile>
  void load(const void* from, int64_t stride) {
    emulated::load(kTile, from, stride);
  }
  template <int kTile>
  void store(void* to, int64_t stride) const {
    emulated::store(kTile, to, stride);
  }
  template <int kSum, int kLeft, int kRight>
  void multiply() {
    emulated::multiply(kSum, kLeft, kRight);
  }

 private:
  static void configure(const TileShapes& shapes) { emulated::configure(&shapes); }
#else
  ~TileScope() { asm volatile("tilerelease"); }
  template <int kTile>
  __attribute__((always_inline)) void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
  }
  // Rows are `stride` bytes apart.
  template <int kTile>
  __attribute__((always_inline)) void load(const void* from, int64_t stride) {
    asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(kTile), "r"(from), "r"(stride) : "memory");
  }
  template <int kTile>
  __attribute__((always_inline)) void store(void* to, int64_t stride) const {
    asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(kTile), "r"(to), "r"(stride) : "memory");
  }
  // sum += left · right, in fp32.
  template <int kSum, int kLeft, int kRight>
  __attribute__((always_inline)) void multiply() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kLeft), "i"(kRight));
  }

 private:
  static void configure(const TileShapes& shapes) { asm volatile("ldtilecfg %0" ::"m"(shapes)); }
#endif
};
#endif

}  // namespace seqrec_fast::SEQREC_TIER
#endif
