// For tests/backends/test_tiles.py: products by matrix tiles, the instructions emulated. Arguments: parts, rows,
// columns, depth, "rows" or "columns" (along which the left operand is contiguous), scale, then optionally a special
// value to plant. Prints the largest error of a result relative to Σ|a·b|, and the number of results that differ from
// the same rows computed alone.
#define SEQREC_TIER tier_test
#include <math.h>
#include <stdio.h>
#include <string.h>

#include <random>
#include <vector>

#include "common/tile_product.h"

using namespace seqrec_fast::SEQREC_TIER;

static std::vector<char> memory_for(int64_t bytes) { return std::vector<char>(bytes + 64); }
static void* aligned(std::vector<char>& memory) { return (void*)(((uintptr_t)memory.data() + 63) / 64 * 64); }

template <int kParts>
static void multiply(const Product<float>& p) {
  using Operand = RightOperand<kParts>;
  const Operand layout(p.depth, p.columns);
  std::vector<char> right = memory_for(layout.images() * sizeof(TileImage));
  Operand::pack(p.b, p.depth, p.columns, (TileImage*)aligned(right), 0, layout.blocks);
  Layout count(nullptr);
  ProductScratch<kParts>(p.depth, count);
  std::vector<char> scratch = memory_for(count.bytes());
  memset(scratch.data(), 0xff, scratch.size());  // NaNs, which must not come through
  Layout place(aligned(scratch));
  tile_product<kParts>(p, (const TileImage*)aligned(right), ProductScratch<kParts>(p.depth, place));
}

static void multiply(int parts, const Product<float>& p) {
  if (parts == 1) multiply<1>(p);
  if (parts == 2) multiply<2>(p);
  if (parts == 3) multiply<3>(p);
}

int main(int count, char** arguments) {
  if (count < 7) return 2;
  const int parts = atoi(arguments[1]);
  const int64_t rows = atoll(arguments[2]), columns = atoll(arguments[3]), depth = atoll(arguments[4]);
  const bool by_rows = !strcmp(arguments[5], "rows");
  const float scale = (float)atof(arguments[6]);
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::vector<float> a(rows * depth), b(depth * columns), out(rows * columns, 1.0f);
  for (float& x : a) x = scale * normal(random);
  for (float& x : b) x = normal(random);
  if (count > 7) a[0] = (float)atof(arguments[7]);
  const int64_t row = by_rows ? depth : 1, step = by_rows ? 1 : rows;
  multiply(parts, {a.data(), row, step, b.data(), out.data(), rows, columns, depth, true});

  double worst = 0;
  int64_t differing = 0;
  std::vector<float> alone(columns);
  for (int64_t m = 0; m < rows; ++m) {
    std::fill(alone.begin(), alone.end(), 1.0f);
    std::vector<float> one(depth);
    for (int64_t k = 0; k < depth; ++k) one[k] = a[m * row + k * step];
    multiply(parts, {one.data(), depth, 1, b.data(), alone.data(), 1, columns, depth, true});
    differing += memcmp(alone.data(), out.data() + m * columns, columns * sizeof(float)) != 0;
    for (int64_t n = 0; n < columns; ++n) {
      double exact = 1, size = 1;
      for (int64_t k = 0; k < depth; ++k) {
        const double term = (double)one[k] * b[k * columns + n];
        exact += term;
        size += fabs(term);
      }
      const double found = out[m * columns + n];
      const bool in_range = isfinite(exact) && fabsf(one[0]) < 0x1.ffp127f;  // others round to an infinite bf16
      if (isfinite(found) != in_range) worst = INFINITY;
      if (in_range) worst = fmax(worst, fabs(found - exact) / size);
    }
  }
  printf("%.3g %lld\n", worst, (long long)differing);
}
