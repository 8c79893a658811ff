// Registration of the whole-sequence operators for CPU tensors: arguments, tiles of rows, threads, choice of the tier.
// Types and shapes were explained in Python; they are checked again so that a direct call stays within its arrays.
#include <cmath>
#include <cstring>
#include <memory>
#include <numeric>
#include <tuple>
#include <utility>
#include <vector>

#include "recurrent/cpu_call.h"
#include "recurrent/sequence.h"

namespace seqrec_fast {
namespace {

using Optional = std::optional<Tensor>;

const SequenceKernels& kernels() { return SEQREC_CHOSEN_TABLE(sequence_kernels); }

// What a scalar is computed in.
size_t wide_bytes(Scalar scalar) { return scalar == Scalar::kDouble ? 8 : 4; }
int32_t wide_dtype(Scalar scalar) {
  return scalar == Scalar::kDouble ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
}

// Memory that begins on a cache line; null where none was asked for.
class Memory {
 public:
  Memory() = default;
  explicit Memory(int64_t bytes) : memory_(std::make_unique_for_overwrite<char[]>(bytes + 64)) {}
  void* get() const { return (void*)(((uintptr_t)memory_.get() + 63) / 64 * 64); }

 private:
  std::unique_ptr<char[]> memory_;
};

// An integer tensor of either width as int64.
std::vector<int64_t> integers(const Tensor& tensor) {
  const Array array(tensor);
  const int64_t count = tensor.numel();
  std::vector<int64_t> values(count);
  const void* data = array;
  if (tensor.scalar_type() == ScalarType::Long)
    std::copy_n((const int64_t*)data, count, values.begin());
  else if (tensor.scalar_type() == ScalarType::Int)
    std::copy_n((const int32_t*)data, count, values.begin());
  else
    throw std::invalid_argument("lengths and ids must be int64 or int32");
  return values;
}

const Optional kAbsent;

// The arguments of lstm and gru in one place, as arrays that live as long as this.
struct Arguments {
  const char* operator_name;
  CellKind kind;
  const Tensor &x, &h;
  const Tensor* c;  // null for GRU
  const Optional& w_ih;
  const Tensor& w_hh;
  const Optional &b_ih, &b_hh, &w_hr, &ln_ih, &ln_hh, &ln_c, &ln_c_bias, &ids, &lengths, &reset;
  bool batch_first, reverse;
  const Optional& seed;
  double zoneout, recurrent_dropout;
  int64_t stream, precision;
};

// A draw of 16 bits below this drops; a half rounds to even, as Python's round does.
int32_t drops_below(double p) { return (int32_t)std::nearbyint(p * 65536); }

SequenceNoise noise_of(const Arguments& a) {
  for (const double p : {a.zoneout, a.recurrent_dropout})
    check_value(p >= 0 && p <= 1, a.operator_name, ": zoneout and recurrent_dropout must lie in 0…1, got ", p);
  SequenceNoise noise{};
  noise.zoneout = a.zoneout;
  if (!a.seed) return noise;
  check_value(a.seed->numel() == 1 && a.seed->scalar_type() == ScalarType::Long && a.seed->is_cpu(), a.operator_name,
              ": seed must be one int64 number on the CPU");
  noise.drawn = true;
  noise.seed = *(const uint64_t*)check_allocated(a.seed->const_data_ptr(), 1);
  noise.stream = (uint32_t)a.stream;
  noise.zoneout_below = drops_below(a.zoneout);
  noise.dropout_below = drops_below(a.recurrent_dropout);
  noise.kept_factor = a.recurrent_dropout < 1 ? 1 / (1 - a.recurrent_dropout) : 0;
  return noise;
}

class Sequence {
 public:
  explicit Sequence(const Arguments& a)
      : x_(a.x),
        h_(a.h),
        w_ih_(a.w_ih),
        w_hh_(a.w_hh),
        b_ih_(a.b_ih),
        b_hh_(a.b_hh),
        w_hr_(a.w_hr),
        ln_ih_(a.ln_ih),
        ln_hh_(a.ln_hh),
        ln_c_(a.ln_c),
        ln_c_bias_(a.ln_c_bias),
        reset_(a.reset) {
    if (a.c) c_ = Array(*a.c);
    const Tensor& tokens = a.ids ? *a.ids : a.x;
    const char* const name = a.operator_name;
    check_value(tokens.dim() == (a.ids ? 2 : 3) && a.h.dim() == 2, name, ": x must be [T, B, I] and h [B, H]");
    check_value(!a.ids || a.x.dim() == 2, name, ": with ids x must be a table [N, I]");
    check_value(!a.c || a.c->dim() == 2, name, ": c must be [B, H]");
    SequenceShape& s = in.shape;
    s = {a.kind,
         scalar_of(a.x),
         tokens.size(a.batch_first ? 1 : 0),
         tokens.size(a.batch_first ? 0 : 1),
         a.x.size(a.x.dim() - 1),
         a.w_hr && a.c ? a.c->size(1) : a.h.size(1),
         a.h.size(1),
         a.batch_first,
         a.reverse,
         !a.w_ih,
         a.zoneout > 0,
         a.seed && a.recurrent_dropout > 0,
         a.w_hr.has_value(),
         a.ln_hh.has_value(),
         (int)a.precision};
    in.noise = noise_of(a);
    const int64_t gates = gate_rows(s);
    expect(name, "h", a.h, {s.rows, s.state});
    if (a.c) expect(name, "c", *a.c, {s.rows, s.hidden});
    expect(name, "w_hh", a.w_hh, {gates, s.state});
    if (a.w_hr) expect(name, "w_hr", *a.w_hr, {s.state, s.hidden});
    check_value(a.ln_ih.has_value() == s.has_norm && a.ln_c.has_value() == (s.has_norm && a.c), name,
                a.c ? ": ln_ih, ln_hh and ln_c go together" : ": ln_ih and ln_hh go together");
    check_value(!a.ln_c_bias || a.ln_c, name, ": ln_c_bias goes with ln_c");
    for (const Optional* gain : {&a.ln_ih, &a.ln_hh})
      if (*gain) expect(name, "a gain of the gates", **gain, {gates});
    for (const Optional* vector : {&a.ln_c, &a.ln_c_bias})
      if (*vector) expect(name, "ln_c or its bias", **vector, {s.hidden});
    if (a.w_ih) expect(name, "w_ih", *a.w_ih, {gates, s.input});
    check_value(a.w_ih || s.input == gates, name, ": without w_ih x must be ", gates, " wide, got ", s.input);
    for (const Optional* bias : {&a.b_ih, &a.b_hh})
      if (*bias) expect(name, "a bias", **bias, {gates});
    if (a.reset) {
      check_value(a.reset->scalar_type() == ScalarType::Bool && a.reset->dim() == 2 && a.reset->size(0) == s.rows &&
                      a.reset->size(1) == s.steps,
                  name, ": reset must be bool [", s.rows, ", ", s.steps, "]");
    }
    set_lengths(name, a.lengths);
    in.x = x_;
    in.h = h_;
    in.c = a.c ? (const void*)c_ : nullptr;
    in.w_ih = w_ih_;
    in.w_hh = w_hh_;
    in.b_ih = b_ih_;
    in.b_hh = b_hh_;
    in.w_hr = w_hr_;
    in.ln_ih = ln_ih_;
    in.ln_hh = ln_hh_;
    in.ln_c = ln_c_;
    in.ln_c_bias = ln_c_bias_;
    in.reset = (const bool*)(const void*)reset_;
    if (a.ids) set_ids(name, *a.ids, a.x.size(0));
  }

  // `tensor` must have the dtype of x (or, `wide`, what that is computed in) and this shape.
  void expect(const char* name, const char* what, const Tensor& tensor, std::initializer_list<int64_t> shape,
              bool wide = false) const {
    const Scalar scalar = in.shape.scalar;
    bool fits = tensor.dim() == (int64_t)shape.size() &&
                scalar_of(tensor) == (wide && scalar != Scalar::kDouble ? Scalar::kFloat : scalar);
    for (size_t i = 0; fits && i < shape.size(); ++i) fits = tensor.size(i) == shape.begin()[i];
    check_value(fits, name, ": ", what, " has a shape or dtype that does not fit the other arguments");
  }

  int64_t first() const { return in.shape.batch_first ? in.shape.rows : in.shape.steps; }
  int64_t second() const { return in.shape.batch_first ? in.shape.steps : in.shape.rows; }
  // Every token is real.
  bool full() const { return full_; }
  int64_t tokens() const { return tokens_; }

  // Bytes beyond the tokens of an array [T·B, width] become 0.
  void clear_padding(void* array, int64_t bytes) const {
    if (full_) return;
    const SequenceShape& s = in.shape;
    for (int64_t row = 0; row < s.rows; ++row)
      for (int64_t step = length_[row]; step < s.steps; ++step)
        std::memset((char*)array + token_index(s, step, row) * bytes, 0, bytes);
  }

  // The rows in parts · tiles_of_a_part tiles of like work: by falling length, dealt out in turn. Calls
  // use(part, its tiles), each part on one thread.
  template <class Use>
  void for_each_tile(int64_t parts, int64_t tiles_of_a_part, const Use& use) const {
    std::vector<int64_t> order(in.shape.rows);
    std::iota(order.begin(), order.end(), 0);
    if (!full_)
      std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return length_[a] > length_[b]; });
    const int64_t all = parts * tiles_of_a_part;
    torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      std::vector<std::vector<int64_t>> row(tiles_of_a_part), length(tiles_of_a_part);
      std::vector<RowTile> tiles(tiles_of_a_part);
      for (int64_t part = begin; part < end; ++part) {
        for (int64_t tile = 0; tile < tiles_of_a_part; ++tile) {
          row[tile].clear();
          length[tile].clear();
          for (size_t i = part + tile * parts; i < order.size(); i += all) {
            row[tile].push_back(order[i]);
            length[tile].push_back(length_[order[i]]);
          }
          tiles[tile] = {row[tile].data(), length[tile].data(), (int64_t)row[tile].size()};
        }
        use(part, tiles.data());
      }
    });
  }

  // Calls use(token) for the real tokens, in one order for all callers.
  template <class Use>
  void for_each_token(const Use& use) const {
    const SequenceShape& s = in.shape;
    for (int64_t step = 0; step < s.steps; ++step)
      for (int64_t row = 0; row < s.rows; ++row)
        if (step < length_[row]) use(token_index(s, step, row));
  }

  SequenceInputs in{};

 private:
  void set_lengths(const char* name, const Optional& lengths) {
    const SequenceShape& s = in.shape;
    if (lengths) {
      length_ = integers(*lengths);
      check_value((int64_t)length_.size() == s.rows, name, ": lengths must have shape [", s.rows, "]");
      for (int64_t row = 0; row < s.rows; ++row)
        check_value(length_[row] >= 0 && length_[row] <= s.steps, name, ": lengths must lie in 0…", s.steps,
                    " (the number of steps), got ", length_[row], " for row ", row);
    } else {
      length_.assign(s.rows, s.steps);
    }
    tokens_ = std::accumulate(length_.begin(), length_.end(), int64_t{0});
    full_ = tokens_ == s.rows * s.steps;
  }

  void set_ids(const char* name, const Tensor& ids, int64_t count) {
    ids_ = integers(ids);
    const SequenceShape& s = in.shape;
    for (int64_t row = 0; row < s.rows; ++row)
      for (int64_t step = 0; step < length_[row]; ++step) {
        const int64_t id = ids_[token_index(s, step, row)];
        check_index(id >= 0 && id < count, name, ": ids must lie in 0…", count - 1, " (the rows of the table), got ",
                    id);
      }
    in.ids = ids_.data();
  }

  Array x_, h_, w_ih_, w_hh_, b_ih_, b_hh_, w_hr_, ln_ih_, ln_hh_, ln_c_, ln_c_bias_, reset_;
  Array c_{Optional{}};
  std::vector<int64_t> length_, ids_;
  int64_t tokens_ = 0;
  bool full_ = true;
};

Memory packed_weights(const SequenceInputs& in, int64_t (*bytes)(const SequenceShape&),
                      int64_t (*blocks)(const SequenceShape&),
                      void (*pack)(const SequenceInputs&, void*, int64_t, int64_t)) {
  Memory packed(bytes(in.shape));
  const int64_t weights = gate_rows(in.shape) * (in.shape.input + in.shape.state);
  in_parallel(blocks(in.shape), 8 * weights, [&](int64_t begin, int64_t end) { pack(in, packed.get(), begin, end); });
  return packed;
}
Memory packed_weights(const SequenceInputs& in) {
  return packed_weights(in, kernels().packed_bytes, kernels().pack_blocks, kernels().pack);
}

int64_t rounded_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

// ---- forward
// -----------------------------------------------------------------------------------------------------------

// Rows that a thread takes through the steps at once: their states and inputs stay in L2 beside the weights.
constexpr int64_t kForwardRows = 96;

struct ForwardResults {
  Optional output, c_n, cells, gates;
  Tensor h_n;
};

ForwardResults run_forward(const Sequence& sequence, const Tensor& like, bool last_only, int64_t save) {
  const SequenceShape& s = sequence.in.shape;
  const bool lstm = s.kind == CellKind::kLstm;
  enum { kNothing, kStates, kGates };
  ForwardResults found{{}, {}, {}, {}, empty({s.rows, s.state}, like)};
  const bool wants_output = !last_only || save != kNothing;
  found.output = wants_output ? empty({sequence.first(), sequence.second(), s.state}, like) : empty({0}, like);
  if (lstm) {
    found.c_n = empty({s.rows, s.hidden}, like);
    found.cells =
        save != kNothing ? empty({s.steps, s.rows, s.hidden}, wide_dtype(s.scalar)) : empty({0}, wide_dtype(s.scalar));
  }
  found.gates = save == kGates ? empty({s.steps, s.rows, kSumCount * s.hidden}, like) : empty({0}, like);
  if (s.rows == 0 || s.hidden == 0) return found;
  const auto data = [](bool wanted, const Optional& tensor) { return wanted ? tensor->mutable_data_ptr() : nullptr; };
  const Memory packed = packed_weights(sequence.in);
  const SequenceForward call{sequence.in,
                             packed.get(),
                             data(wants_output, found.output),
                             found.h_n.mutable_data_ptr(),
                             data(lstm, found.c_n),
                             data(lstm && save != kNothing, found.cells),
                             data(save == kGates, found.gates)};
  if (call.output) sequence.clear_padding(call.output, s.state * width(s.scalar));
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), s.rows);
  const int64_t tiles = std::min(s.rows, rounded_up((s.rows + kForwardRows - 1) / kForwardRows, threads));
  sequence.for_each_tile(tiles, 1, [&](int64_t, const RowTile* tile) {
    const Memory scratch(kernels().forward_scratch(s, tile->count));
    kernels().forward(call, *tile, scratch.get());
  });
  return found;
}

// ---- backward
// ----------------------------------------------------------------------------------------------------------

// The gradients of the weights are summed in as many parts as the batch alone decides, so that their bits do not depend
// on the threads; a part may take several tiles of rows, one after the other.
constexpr int64_t kMostParts = 16, kRowsOfAPart = 4, kBackwardRows = 64;

int64_t backward_parts(int64_t rows) {
  int64_t parts = 1;
  while (parts < kMostParts && parts * 2 * kRowsOfAPart <= rows) parts *= 2;
  return parts;
}

struct Wanted {
  bool x, h, c, w_ih, w_hh, b, w_hr, ln_ih, ln_hh, ln_c, ln_c_bias;
};

struct BackwardResults {
  Tensor dx, dh, dc, dw_ih, dw_hh, dw_hr, dln_ih, dln_hh, dln_c, dln_c_bias;
  std::vector<Tensor> db;  // of the input's sums and of the hidden state's
};

// table[id] += rows[token] for every token in order; each thread has its own range of ids.
template <class S>
void add_to_table(const Sequence& sequence, const S* rows, S* table, int64_t count) {
  const SequenceShape& s = sequence.in.shape;
  const int64_t ranges = std::min<int64_t>(count, 64);
  in_parallel(ranges, sequence.tokens() * s.input * 8, [&](int64_t begin, int64_t end) {
    const int64_t first = count * begin / ranges, last = count * end / ranges;
    sequence.for_each_token([&](int64_t token) {
      const int64_t id = sequence.in.ids[token];
      if (id < first || id >= last) return;
      for (int64_t i = 0; i < s.input; ++i) table[id * s.input + i] += rows[token * s.input + i];
    });
  });
}

// The partial sums of the gradients of the weights: for each part what SequencePartial has.
class Parts {
 public:
  Parts(const SequenceShape& s, const Wanted& wanted)
      : scalar_(s.scalar),
        bytes_(wide_bytes(s.scalar)),
        count_(backward_parts(s.rows)),
        sizes_{wanted.w_ih ? gate_rows(s) * s.input : 0,
               wanted.w_hh ? gate_rows(s) * s.state : 0,
               wanted.b ? kSumCount * s.hidden : 0,
               wanted.w_hr ? s.state * s.hidden : 0,
               wanted.ln_ih ? kSumCount * s.hidden : 0,
               wanted.ln_hh ? kSumCount * s.hidden : 0,
               wanted.ln_c ? s.hidden : 0,
               wanted.ln_c_bias ? s.hidden : 0},
        memory_(count_ * total() * bytes_) {}

  enum Which { kInput, kHidden, kSums, kProjection, kInputGain, kHiddenGain, kCellGain, kCellBias, kWhich };

  int64_t count() const { return count_; }
  SequencePartial clear(int64_t part) {
    std::memset(at(part, 0), 0, total() * bytes_);
    const auto array = [&](Which which) { return sizes_[which] ? at(part, before(which)) : nullptr; };
    return {array(kInput),     array(kHidden),     array(kSums),     array(kProjection),
            array(kInputGain), array(kHiddenGain), array(kCellGain), array(kCellBias)};
  }
  // to[0 …] = the total of one array, numbers first … first + size - 1.
  void total(Which which, int64_t first, int64_t size, void* to) const {
    std::vector<const void*> from(count_);
    const int64_t offset = before(which) + first;
    for (int64_t part = 0; part < count_; ++part) from[part] = at(part, offset);
    constexpr int64_t kBlock = 4096;  // numbers
    in_parallel((size + kBlock - 1) / kBlock, size * count_ * 20, [&](int64_t begin, int64_t end) {
      kernels().add_parts(scalar_, from.data(), count_, to, begin * kBlock, std::min(end * kBlock, size));
    });
  }

 private:
  int64_t before(int which) const { return std::accumulate(sizes_.begin(), sizes_.begin() + which, int64_t{0}); }
  int64_t total() const { return before(kWhich); }
  char* at(int64_t part, int64_t offset) const { return (char*)memory_.get() + (part * total() + offset) * bytes_; }

  Scalar scalar_;
  int64_t bytes_, count_;
  std::array<int64_t, kWhich> sizes_;
  Memory memory_;
};

BackwardResults run_backward(const Sequence& sequence, const Arguments& a, const std::array<Optional, 3>& grads,
                             const Tensor& output, const Tensor* cells, const Tensor& gates, const Wanted& wanted) {
  const SequenceShape& s = sequence.in.shape;
  const char* const name = a.operator_name;
  const bool lstm = s.kind == CellKind::kLstm;
  if (grads[0]) sequence.expect(name, "grad_output", *grads[0], {sequence.first(), sequence.second(), s.state});
  for (int i = 1; i < 3; ++i)
    if (grads[i]) sequence.expect(name, "the gradient of a state", *grads[i], {s.rows, i == 1 ? s.state : s.hidden});
  sequence.expect(name, "output", output, {sequence.first(), sequence.second(), s.state});
  if (lstm) sequence.expect(name, "cells", *cells, {s.steps, s.rows, s.hidden}, true);
  const bool saved_gates = gates.dim() == 3;
  if (saved_gates) sequence.expect(name, "gates", gates, {s.steps, s.rows, kSumCount * s.hidden});

  const int64_t gate_count = gate_rows(s);
  const auto result = [&](bool asked, std::initializer_list<int64_t> shape) {
    return asked ? empty(shape, a.x) : empty({0}, a.x);
  };
  BackwardResults found{
      a.ids ? result(wanted.x, {a.x.size(0), s.input})
            : result(wanted.x, {sequence.first(), sequence.second(), s.input}),
      result(wanted.h, {s.rows, s.state}),
      result(wanted.c, {s.rows, s.hidden}),
      result(wanted.w_ih, {gate_count, s.input}),
      result(wanted.w_hh, {gate_count, s.state}),
      result(wanted.w_hr, {s.state, s.hidden}),
      result(wanted.ln_ih, {gate_count}),
      result(wanted.ln_hh, {gate_count}),
      result(wanted.ln_c, {s.hidden}),
      result(wanted.ln_c_bias, {s.hidden}),
      {result(wanted.b, {gate_count}), result(wanted.b && !lstm, {gate_count})},
  };
  const auto data = [](bool asked, const Tensor& tensor) { return asked ? tensor.mutable_data_ptr() : nullptr; };

  const Array grad_output(grads[0]), grad_h_n(grads[1]), grad_c_n(grads[2]), output_array(output), gates_array(gates);
  const Array cells_array = cells ? Array(*cells) : Array(Optional{});
  const Memory packed = saved_gates && !s.has_norm ? Memory() : packed_weights(sequence.in);
  const Memory packed_back =
      packed_weights(sequence.in, kernels().packed_back_bytes, kernels().pack_back_blocks, kernels().pack_back);
  // A table's gradient is summed before it is rounded.
  const int64_t wide = wide_bytes(s.scalar), token_count = s.steps * s.rows;
  const Memory token_rows = a.ids && wanted.x ? Memory(token_count * s.input * wide) : Memory();
  const bool into_table = token_rows.get() != nullptr;
  const SequenceBackward call{sequence.in,
                              packed.get(),
                              packed_back.get(),
                              output_array,
                              cells_array,
                              saved_gates ? (const void*)gates_array : nullptr,
                              grad_output,
                              grad_h_n,
                              grad_c_n,
                              into_table ? token_rows.get() : data(wanted.x, found.dx),
                              into_table,
                              data(wanted.h, found.dh),
                              data(wanted.c, found.dc)};
  if (call.dx && !into_table) sequence.clear_padding(call.dx, s.input * width(s.scalar));

  Parts parts(s, wanted);
  const int64_t rows_of_a_part = (s.rows + parts.count() - 1) / parts.count();
  const int64_t tiles_of_a_part = std::max<int64_t>(1, (rows_of_a_part + kBackwardRows - 1) / kBackwardRows);
  sequence.for_each_tile(parts.count(), tiles_of_a_part, [&](int64_t part, const RowTile* tiles) {
    const SequencePartial partial = parts.clear(part);
    const Memory scratch(kernels().backward_scratch(s, tiles[0].count));
    for (int64_t i = 0; i < tiles_of_a_part; ++i) kernels().backward(call, tiles[i], partial, scratch.get());
  });

  if (wanted.w_ih) parts.total(Parts::kInput, 0, gate_count * s.input, found.dw_ih.mutable_data_ptr());
  if (wanted.w_hh) parts.total(Parts::kHidden, 0, gate_count * s.state, found.dw_hh.mutable_data_ptr());
  if (wanted.w_hr) parts.total(Parts::kProjection, 0, s.state * s.hidden, found.dw_hr.mutable_data_ptr());
  const auto of_input = [&](Parts::Which which, const Tensor& to) {
    parts.total(which, 0, gate_count, to.mutable_data_ptr());
  };
  // A GRU's fourth sum is what W_hh makes of n.
  const auto of_hidden = [&](Parts::Which which, const Tensor& to) {
    if (lstm) return of_input(which, to);
    char* const data = (char*)to.mutable_data_ptr();
    parts.total(which, 0, 2 * s.hidden, data);
    parts.total(which, 3 * s.hidden, s.hidden, data + 2 * s.hidden * width(s.scalar));
  };
  if (wanted.b) of_input(Parts::kSums, found.db[0]);
  if (wanted.b && !lstm) of_hidden(Parts::kSums, found.db[1]);
  if (wanted.ln_ih) of_input(Parts::kInputGain, found.dln_ih);
  if (wanted.ln_hh) of_hidden(Parts::kHiddenGain, found.dln_hh);
  if (wanted.ln_c) parts.total(Parts::kCellGain, 0, s.hidden, found.dln_c.mutable_data_ptr());
  if (wanted.ln_c_bias) parts.total(Parts::kCellBias, 0, s.hidden, found.dln_c_bias.mutable_data_ptr());
  if (into_table) {
    const int64_t numbers = a.x.size(0) * s.input;
    const Memory table(numbers * wide);
    std::memset(table.get(), 0, numbers * wide);
    if (s.scalar == Scalar::kDouble)
      add_to_table(sequence, (const double*)token_rows.get(), (double*)table.get(), a.x.size(0));
    else
      add_to_table(sequence, (const float*)token_rows.get(), (float*)table.get(), a.x.size(0));
    const void* const part = table.get();
    kernels().add_parts(s.scalar, &part, 1, found.dx.mutable_data_ptr(), 0, numbers);
  }
  return found;
}

// ---- the operators
// ------------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lstm(
    const Tensor& x, const Tensor& h, const Tensor& c, const Optional& w_ih, const Tensor& w_hh, const Optional& b_ih,
    const Optional& b_hh, const Optional& w_hr, const Optional& ln_ih, const Optional& ln_hh, const Optional& ln_c,
    const Optional& ln_c_bias, const Optional& ids, const Optional& lengths, const Optional& reset,
    const Optional& seed, bool batch_first, bool reverse, bool last_only, int64_t save, double zoneout,
    double recurrent_dropout, int64_t stream, int64_t precision) {
  const Sequence sequence({"lstm",  CellKind::kLstm,
                           x,       h,
                           &c,      w_ih,
                           w_hh,    b_ih,
                           b_hh,    w_hr,
                           ln_ih,   ln_hh,
                           ln_c,    ln_c_bias,
                           ids,     lengths,
                           reset,   batch_first,
                           reverse, seed,
                           zoneout, recurrent_dropout,
                           stream,  precision});
  ForwardResults found = run_forward(sequence, x, last_only, save);
  return {std::move(*found.output), std::move(found.h_n), std::move(*found.c_n), std::move(*found.cells),
          std::move(*found.gates)};
}

std::tuple<Tensor, Tensor, Tensor> gru(const Tensor& x, const Tensor& h, const Optional& w_ih, const Tensor& w_hh,
                                       const Optional& b_ih, const Optional& b_hh, const Optional& ln_ih,
                                       const Optional& ln_hh, const Optional& ids, const Optional& lengths,
                                       const Optional& reset, const Optional& seed, bool batch_first, bool reverse,
                                       bool last_only, int64_t save, double zoneout, double recurrent_dropout,
                                       int64_t stream, int64_t precision) {
  const Sequence sequence(
      {"gru",  CellKind::kGru, x,       h,   nullptr, w_ih,  w_hh,        b_ih,    b_hh, kAbsent, ln_ih,
       ln_hh,  kAbsent,        kAbsent, ids, lengths, reset, batch_first, reverse, seed, zoneout, recurrent_dropout,
       stream, precision});
  ForwardResults found = run_forward(sequence, x, last_only, save);
  return {std::move(*found.output), std::move(found.h_n), std::move(*found.gates)};
}

using ElevenTensors =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

ElevenTensors lstm_backward(const Optional& grad_output, const Optional& grad_h_n, const Optional& grad_c_n,
                            const Tensor& x, const Tensor& h, const Tensor& c, const Optional& w_ih, const Tensor& w_hh,
                            const Optional& b_ih, const Optional& b_hh, const Optional& w_hr, const Optional& ln_ih,
                            const Optional& ln_hh, const Optional& ln_c, const Optional& ln_c_bias, const Optional& ids,
                            const Optional& lengths, const Optional& reset, const Optional& seed, bool batch_first,
                            bool reverse, bool /*last_only*/, int64_t /*save*/, double zoneout,
                            double recurrent_dropout, int64_t stream, int64_t precision, const Tensor& output,
                            const Tensor& cells, const Tensor& gates, const std::vector<bool>& output_mask) {
  check_value(output_mask.size() == 11, "lstm_backward: output_mask must have 11 entries, got ", output_mask.size());
  const Arguments arguments{"lstm",  CellKind::kLstm,
                            x,       h,
                            &c,      w_ih,
                            w_hh,    b_ih,
                            b_hh,    w_hr,
                            ln_ih,   ln_hh,
                            ln_c,    ln_c_bias,
                            ids,     lengths,
                            reset,   batch_first,
                            reverse, seed,
                            zoneout, recurrent_dropout,
                            stream,  precision};
  const Sequence sequence(arguments);
  const auto& m = output_mask;
  BackwardResults found = run_backward(sequence, arguments, {grad_output, grad_h_n, grad_c_n}, output, &cells, gates,
                                       {m[0], m[1], m[2], m[3] && w_ih, m[4], m[5], m[6] && w_hr, m[7] && ln_ih,
                                        m[8] && ln_hh, m[9] && ln_c, m[10] && ln_c_bias});
  return {std::move(found.dx),     std::move(found.dh),    std::move(found.dc),        std::move(found.dw_ih),
          std::move(found.dw_hh),  std::move(found.db[0]), std::move(found.dw_hr),     std::move(found.dln_ih),
          std::move(found.dln_hh), std::move(found.dln_c), std::move(found.dln_c_bias)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gru_backward(
    const Optional& grad_output, const Optional& grad_h_n, const Tensor& x, const Tensor& h, const Optional& w_ih,
    const Tensor& w_hh, const Optional& b_ih, const Optional& b_hh, const Optional& ln_ih, const Optional& ln_hh,
    const Optional& ids, const Optional& lengths, const Optional& reset, const Optional& seed, bool batch_first,
    bool reverse, bool /*last_only*/, int64_t /*save*/, double zoneout, double recurrent_dropout, int64_t stream,
    int64_t precision, const Tensor& output, const Tensor& gates, const std::vector<bool>& output_mask) {
  check_value(output_mask.size() == 8, "gru_backward: output_mask must have 8 entries, got ", output_mask.size());
  const Arguments arguments{
      "gru",  CellKind::kGru, x,       h,   nullptr, w_ih,  w_hh,        b_ih,    b_hh, kAbsent, ln_ih,
      ln_hh,  kAbsent,        kAbsent, ids, lengths, reset, batch_first, reverse, seed, zoneout, recurrent_dropout,
      stream, precision};
  const Sequence sequence(arguments);
  const auto& m = output_mask;
  BackwardResults found = run_backward(
      sequence, arguments, {grad_output, grad_h_n, {}}, output, nullptr, gates,
      {m[0], m[1], false, m[2] && w_ih, m[3], m[4] || m[5], false, m[6] && ln_ih, m[7] && ln_hh, false, false});
  return {std::move(found.dx),
          std::move(found.dh),
          std::move(found.dw_ih),
          std::move(found.dw_hh),
          m[4] ? std::move(found.db[0]) : empty({0}, x),
          m[5] ? std::move(found.db[1]) : empty({0}, x),
          std::move(found.dln_ih),
          std::move(found.dln_hh)};
}

}  // namespace
}  // namespace seqrec_fast

STABLE_TORCH_LIBRARY_IMPL(seqrec_fast_native, CPU, m) {
  m.impl("lstm", TORCH_BOX(&seqrec_fast::lstm));
  m.impl("lstm_backward", TORCH_BOX(&seqrec_fast::lstm_backward));
  m.impl("gru", TORCH_BOX(&seqrec_fast::gru));
  m.impl("gru_backward", TORCH_BOX(&seqrec_fast::gru_backward));
}
