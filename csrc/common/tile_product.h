// The Product of gemm.h on matrix tiles: 32 × 32 results at a time.
#pragma once

#include "scratch.h"
#include "tile_operands.h"

#if defined(SEQREC_TILES)
namespace seqrec_fast::SEQREC_TIER {

// The right operand of a product, [depth, columns], as images by column block, chunk of the depth, and part.
template <int kParts>
struct RightOperand {
  int64_t chunks, blocks;

  RightOperand(int64_t depth, int64_t columns)
      : chunks(tile_count(depth, kTileDepth)), blocks(tile_count(columns, kTileRows)) {}
  int64_t images() const { return chunks * blocks * kParts; }
  int64_t block_images() const { return chunks * kParts; }

  // Blocks begin … end - 1 of b [depth, columns].
  template <class P>
  static void pack(const P* b, int64_t depth, int64_t columns, TileImage* images, int64_t begin, int64_t end) {
    const RightOperand layout(depth, columns);
    for (int64_t block = begin; block < end; ++block)
      for (int64_t chunk = 0; chunk < layout.chunks; ++chunk) {
        const int64_t k = chunk * kTileDepth, n = block * kTileRows;
        put_right<kParts>(b + k * columns + n, columns, depth - k, columns - n,
                          images + (block * layout.chunks + chunk) * kParts);
      }
  }
};

// Up to 32 rows of a left operand a(m, k) as images by group of 16 rows, chunk, and part.
template <int kParts>
void pack_left(const float* a, int64_t row_stride, int64_t step, int64_t rows, int64_t depth, TileImage* images) {
  const int64_t group_images = tile_count(depth, kTileDepth) * kParts;
  if (step == 1) {
    for (int64_t m = 0; m < rows; ++m)
      put_left_row<kParts>(a + m * row_stride, depth, images + m / kTileRows * group_images, (int)(m % kTileRows));
    return;
  }
  for (int64_t m = 0; m < rows; m += kTileRows, images += group_images)
    for (int64_t k = 0; k < depth; k += kTileDepth) {
      TileImage* const chunk = images + k / kTileDepth * kParts;
      put_right<kParts>(a + m + k * step, step, depth - k, rows - m, chunk);
      for (int part = 0; part < kParts; ++part) transpose(chunk[part]);
    }
}

constexpr int64_t kPanelRows = 2 * kTileRows, kPanelColumns = 2 * kTileRows;

// Scratch of tile_product: a panel of left operands, and the results of one square.
template <int kParts>
struct ProductScratch {
  TileImage* left;
  float* square;

  static int64_t left_images(int64_t depth) { return 2 * tile_count(depth, kTileDepth) * kParts; }
  ProductScratch(int64_t depth, Layout& layout)
      : left(layout.take<TileImage>(left_images(depth))), square(layout.take<float>(kPanelRows * kPanelColumns)) {}
};

// out[m][n] = (or +=) the sums of a square, [column][row][16], within the edges of out.
template <class Out>
SEQREC_INLINE void put_square(const float* square, Out* out, int64_t stride, int64_t rows, int64_t columns,
                              bool accumulate) {
  for (int64_t n = 0; n < columns; n += kTileRows, square += kPanelRows * kTileRows) {
    const int lanes = columns - n < kTileRows ? (int)(columns - n) : (int)kTileRows;
    for (int64_t m = 0; m < rows; ++m) {
      Out* const to = out + m * stride + n;
      const F32 sum = load(square + m * kTileRows);
      store_first(to, lanes, accumulate ? load_first(to, lanes) + sum : sum);
    }
  }
}

// Rows [row, row + rows) of a product, kGroups groups of 16 that are packed in scratch.left.
template <int kParts, int kGroups, class T, class Out>
void multiply_panel(const Product<T, Out>& p, int64_t row, int64_t rows, const TileImage* right,
                    const ProductScratch<kParts>& scratch) {
  const RightOperand<kParts> layout(p.depth, p.columns);
  const int64_t group = layout.chunks * kParts;
  TileScope tiles(kGroups == 1 ? rows : kTileRows);
  for (int64_t block = 0; block < layout.blocks; block += 2) {
    // The last block of an odd number is multiplied twice; the second result is dropped.
    const int64_t second = block + 1 < layout.blocks ? block + 1 : block;
    const TileImage* const operands[2] = {right + block * group, right + second * group};
    tiles.template zero<0>();
    tiles.template zero<1>();
    if constexpr (kGroups > 1) tiles.template zero<2>(), tiles.template zero<3>();
    TileSquare<kGroups, 2>::template multiply<kParts>(tiles, scratch.left, group, operands, layout.chunks,
                                                      2 * group * (int64_t)sizeof(TileImage));
    // Column n, group g of the square.
    constexpr int64_t kImage = kTileRows * kTileRows;
    tiles.template store<0>(scratch.square, 64);
    tiles.template store<1>(scratch.square + (kGroups > 1 ? 1 : 2) * kImage, 64);
    if constexpr (kGroups > 1) {
      tiles.template store<2>(scratch.square + 2 * kImage, 64);
      tiles.template store<3>(scratch.square + 3 * kImage, 64);
    }
    const int64_t column = block * kTileRows,
                  columns = p.columns - column < kPanelColumns ? p.columns - column : kPanelColumns;
    put_square(scratch.square, p.out + row * p.columns + column, p.columns, rows, columns, p.accumulate);
  }
}

// The product of which p.b was packed as `right`. a(m, k) must be contiguous along m or along k.
template <int kParts, class T, class Out>
void tile_product(const Product<T, Out>& p, const TileImage* right, const ProductScratch<kParts>& scratch) {
  for (int64_t row = 0; row < p.rows; row += kPanelRows) {
    const int64_t rows = p.rows - row < kPanelRows ? p.rows - row : kPanelRows;
    pack_left<kParts>(p.a + row * p.a_row, p.a_row, p.a_step, rows, p.depth, scratch.left);
    if (rows > kTileRows)
      multiply_panel<kParts, 2>(p, row, rows, right, scratch);
    else
      multiply_panel<kParts, 1>(p, row, rows, right, scratch);
  }
}

}  // namespace seqrec_fast::SEQREC_TIER
#endif
