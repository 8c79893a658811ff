// The whole-sequence kernels of one CPU tier; compiled once per tier as tier.cpp is.
#include "by_scalar.h"
#include "sequence_options.h"
#include "sequence_options_backward.h"

namespace seqrec_fast::SEQREC_TIER {
namespace {

template <class T>
struct PackedBytes {
  static int64_t run(const SequenceShape& shape) {
    const PackedWeights<T> layout(shape);
    return layout.blocks_bytes() + (shape.has_w_hr ? shape.hidden * shape.state * (int64_t)sizeof(T) : 0);
  }
};
template <class T>
struct PackBlocks {
  static int64_t run(const SequenceShape& shape) { return PackedWeights<T>(shape).blocks(); }
};
template <class T>
struct Pack {
  static void run(const SequenceInputs& in, void* packed, int64_t begin, int64_t end) {
    if (in.shape.kind == CellKind::kLstm)
      pack_sequence<T, LstmCell>(in, packed, begin, end);
    else
      pack_sequence<T, GruCell>(in, packed, begin, end);
  }
};
template <class T>
struct ForwardBytes {
  static int64_t run(const SequenceShape& shape, int64_t count) {
    return ForwardScratch<T>(shape, count, nullptr).bytes();
  }
};
template <class T>
struct Forward {
  static void run(const SequenceForward& call, const RowTile& tile, void* scratch) {
    if (call.in.shape.kind == CellKind::kLstm)
      sequence_forward<T, LstmCell>(call, tile, scratch);
    else
      sequence_forward<T, GruCell>(call, tile, scratch);
  }
};
template <class T>
struct BackwardBytes {
  static int64_t run(const SequenceShape& shape, int64_t count) {
    return BackwardScratch<T>(shape, count, nullptr).bytes();
  }
};
template <class T>
struct Backward {
  static void run(const SequenceBackward& call, const RowTile& tile, const SequencePartial& partial, void* scratch) {
    if (call.in.shape.kind == CellKind::kLstm)
      sequence_backward<T, LstmCell>(call, tile, partial, scratch);
    else
      sequence_backward<T, GruCell>(call, tile, partial, scratch);
  }
};

template <class T>
struct AddParts {
  static void run(const void* const* parts, int64_t count, void* out, int64_t begin, int64_t end) {
    add_parts<T>(parts, count, out, begin, end);
  }
};

}  // namespace

const SequenceKernels sequence_kernels = {
    [](const SequenceShape& shape) { return by_scalar<PackedBytes>(shape.scalar, shape); },
    [](const SequenceShape& shape) { return by_scalar<PackBlocks>(shape.scalar, shape); },
    [](const SequenceInputs& in, void* packed, int64_t begin, int64_t end) {
      by_scalar<Pack>(in.shape.scalar, in, packed, begin, end);
    },
    [](const SequenceShape& shape, int64_t count) { return by_scalar<ForwardBytes>(shape.scalar, shape, count); },
    [](const SequenceForward& call, const RowTile& tile, void* scratch) {
      by_scalar<Forward>(call.in.shape.scalar, call, tile, scratch);
    },
    [](const SequenceShape& shape, int64_t count) { return by_scalar<BackwardBytes>(shape.scalar, shape, count); },
    [](const SequenceBackward& call, const RowTile& tile, const SequencePartial& partial, void* scratch) {
      by_scalar<Backward>(call.in.shape.scalar, call, tile, partial, scratch);
    },
    [](Scalar scalar, const void* const* parts, int64_t count, void* out, int64_t begin, int64_t end) {
      by_scalar<AddParts>(scalar, parts, count, out, begin, end);
    },
};

}  // namespace seqrec_fast::SEQREC_TIER
