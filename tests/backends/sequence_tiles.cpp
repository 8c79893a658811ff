// For tests/backends/test_sequence_tiles.py: whole sequences by matrix tiles (emulated) against the same by lanes.
// Prints for each case the largest difference of every result, relative to its largest number, or "rows" where a result
// depends on the rows beside it.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <immintrin.h>

#include <random>
#include <vector>

#include "recurrent/sequence.h"

using namespace seqrec_fast;

struct Memory {
  explicit Memory(int64_t bytes) : data((char*)aligned_alloc(64, (bytes + 127) / 64 * 64)) {
    memset(data, 0xff, bytes);
  }
  Memory(const Memory&) = delete;
  ~Memory() { free(data); }
  char* data;
};

using Numbers = std::vector<float>;

struct Problem {
  SequenceShape shape;
  Numbers x, h, c, w_ih, w_hh, b_ih, b_hh, grad_output, grad_h, grad_c;
  std::vector<int64_t> length;
  std::vector<char> reset;

  explicit Problem(const SequenceShape& s) : shape(s), length(s.rows), reset(s.rows * s.steps) {
    std::mt19937 random(7);
    std::normal_distribution<float> normal;
    const auto draw = [&](Numbers& to, int64_t count, float scale) {
      to.resize(count);
      for (float& v : to) v = scale * normal(random);
    };
    const int64_t tokens = s.steps * s.rows, gates = gate_rows(s);
    draw(x, tokens * s.input, 1);
    draw(h, s.rows * s.hidden, 1);
    draw(c, s.rows * s.hidden, 1);
    draw(w_ih, gates * s.input, 1 / sqrtf((float)s.input));
    draw(w_hh, gates * s.hidden, 1 / sqrtf((float)s.hidden));
    draw(b_ih, gates, 1);
    draw(b_hh, gates, 1);
    draw(grad_output, tokens * s.hidden, 1);
    draw(grad_h, s.rows * s.hidden, 1);
    draw(grad_c, s.rows * s.hidden, 1);
    for (int64_t i = 0; i < s.rows; ++i) length[i] = s.steps - s.steps * i / (2 * s.rows);
    for (size_t i = 0; i < reset.size(); ++i) reset[i] = i % 5 == 3;
  }
};

// Numbers as they lie in an array of `scalar`, and back.
static std::vector<char> stored(const Numbers& numbers, Scalar scalar) {
  if (scalar == Scalar::kFloat)
    return std::vector<char>((const char*)numbers.data(), (const char*)(numbers.data() + numbers.size()));
  std::vector<char> bytes(2 * numbers.size());
  for (size_t i = 0; i < numbers.size(); ++i) {
    uint32_t bits;
    memcpy(&bits, &numbers[i], sizeof bits);
    const uint16_t half =
        scalar == Scalar::kHalf ? _cvtss_sh(numbers[i], 0) : (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    memcpy(&bytes[2 * i], &half, sizeof half);
  }
  return bytes;
}
static Numbers read(const std::vector<char>& bytes, Scalar scalar) {
  Numbers numbers(bytes.size() / (scalar == Scalar::kFloat ? 4 : 2));
  if (scalar == Scalar::kFloat) memcpy(numbers.data(), bytes.data(), bytes.size());
  for (size_t i = 0; scalar != Scalar::kFloat && i < numbers.size(); ++i) {
    uint16_t half;
    memcpy(&half, &bytes[2 * i], sizeof half);
    const uint32_t bits = (uint32_t)half << 16;
    if (scalar == Scalar::kHalf)
      numbers[i] = _cvtsh_ss(half);
    else
      memcpy(&numbers[i], &bits, sizeof bits);
  }
  return numbers;
}

// output, h_n, c_n, dx, dh, dc, dw_ih, dw_hh, db
using Results = std::vector<Numbers>;

static Results run(const SequenceKernels& kernels, const Problem& p, int64_t first, int64_t count, bool save_gates) {
  const SequenceShape& s = p.shape;
  const int64_t tokens = s.steps * s.rows, gates = gate_rows(s);
  const bool lstm = s.kind == CellKind::kLstm;
  const auto array = [&](const Numbers& numbers) { return stored(numbers, s.scalar); };
  const auto x = array(p.x), h = array(p.h), c = array(p.c), w_ih = array(p.w_ih), w_hh = array(p.w_hh),
             b_ih = array(p.b_ih), b_hh = array(p.b_hh), grad_output = array(p.grad_output), grad_h = array(p.grad_h),
             grad_c = array(p.grad_c);
  SequenceInputs in{};
  in.shape = s;
  in.x = x.data();
  in.h = h.data();
  in.c = lstm ? c.data() : nullptr;
  in.w_ih = s.projected ? nullptr : w_ih.data();
  in.w_hh = w_hh.data();
  in.b_ih = b_ih.data();
  in.b_hh = b_hh.data();
  in.reset = (const bool*)p.reset.data();
  const auto zeros = [&](int64_t size) { return array(Numbers(size)); };
  auto output = zeros(tokens * s.hidden), h_n = zeros(s.rows * s.hidden), c_n = zeros(s.rows * s.hidden),
       dx = zeros(tokens * s.input), dh = zeros(s.rows * s.hidden), dc = zeros(s.rows * s.hidden),
       saved = zeros(tokens * kSumCount * s.hidden);
  Numbers cells(tokens * s.hidden), dw_ih(gates * s.input), dw_hh(gates * s.hidden), db(kSumCount * s.hidden);
  std::vector<int64_t> row(count);
  for (int64_t i = 0; i < count; ++i) row[i] = first + i;
  const RowTile tile{row.data(), p.length.data() + first, count};
  const Memory packed(kernels.packed_bytes(s)), back(kernels.packed_back_bytes(s)),
      forward(kernels.forward_scratch(s, count)), backward(kernels.backward_scratch(s, count));
  kernels.pack(in, packed.data, 0, kernels.pack_blocks(s));
  kernels.pack_back(in, back.data, 0, kernels.pack_back_blocks(s));
  kernels.forward({in, packed.data, output.data(), h_n.data(), lstm ? c_n.data() : nullptr,
                   lstm ? cells.data() : nullptr, save_gates ? saved.data() : nullptr},
                  tile, forward.data);
  SequencePartial partial{};
  partial.dw_ih = s.projected ? nullptr : dw_ih.data();
  partial.dw_hh = dw_hh.data();
  partial.db = db.data();
  SequenceBackward call{};
  call.in = in;
  call.packed = save_gates ? nullptr : packed.data;
  call.packed_back = back.data;
  call.output = output.data();
  call.cells = lstm ? cells.data() : nullptr;
  call.gates = save_gates ? saved.data() : nullptr;
  call.grad_output = grad_output.data();
  call.grad_h_n = grad_h.data();
  call.grad_c_n = lstm ? grad_c.data() : nullptr;
  call.dx = dx.data();
  call.dh = dh.data();
  call.dc = lstm ? dc.data() : nullptr;
  kernels.backward(call, tile, partial, backward.data);
  Results results;
  for (const auto* bytes : {&output, &h_n, &c_n, &dx, &dh, &dc}) results.push_back(read(*bytes, s.scalar));
  results.insert(results.end(), {dw_ih, dw_hh, db});
  return results;
}

int main() {
  const int64_t sizes[][4] = {{1, 1, 1, 1},    {3, 5, 7, 17},   {4, 16, 33, 16},
                              {3, 33, 20, 33}, {5, 70, 64, 40}, {40, 2, 130, 100}};
  for (const auto& [steps, rows, input, hidden] : sizes)
    for (const CellKind kind : {CellKind::kLstm, CellKind::kGru})
      for (const char* const arithmetic : {"highest", "high", "medium", "bf16", "fp16"})
        for (const bool flag : {false, true}) {
          SequenceShape s{};
          s.kind = kind;
          s.scalar = !strcmp(arithmetic, "bf16")   ? Scalar::kBFloat16
                     : !strcmp(arithmetic, "fp16") ? Scalar::kHalf
                                                   : Scalar::kFloat;
          s.steps = steps;
          s.rows = rows;
          s.projected = flag && hidden == 17;
          s.hidden = s.state = hidden;
          s.input = s.projected ? gate_rows(s) : input;
          s.batch_first = flag;
          s.reverse = flag;
          s.precision = !strcmp(arithmetic, "medium") ? 2 : !strcmp(arithmetic, "high") ? 1 : 0;
          const Problem problem(s);
          const Results tiles = run(tier_amx::sequence_kernels, problem, 0, rows, flag),
                        lanes = run(tier_avx512::sequence_kernels, problem, 0, rows, flag),
                        last = run(tier_amx::sequence_kernels, problem, rows - 1, 1, flag);
          printf("%s", arithmetic);
          for (size_t i = 0; i < tiles.size(); ++i) {
            double largest = 1e-30, difference = 0;
            for (size_t j = 0; j < tiles[i].size(); ++j) {
              largest = fmax(largest, fabs(lanes[i][j]));
              const double d = fabs((double)tiles[i][j] - lanes[i][j]);
              difference = isnan(d) ? INFINITY : fmax(difference, d);
            }
            printf(" %.2g", difference / largest);
          }
          // h_n, c_n, dh and dc of the last row alone.
          bool same = true;
          for (const int i : {1, 2, 4, 5}) {
            const int64_t at = (rows - 1) * hidden;
            same = same && memcmp(tiles[i].data() + at, last[i].data() + at, hidden * sizeof(float)) == 0;
          }
          printf(" %s\n", same ? "alike" : "rows");
        }
}
