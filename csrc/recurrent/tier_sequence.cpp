// The whole-sequence kernels of one CPU tier; compiled once per tier as tier.cpp is.
#include "by_scalar.h"
#include "sequence_options.h"
#include "sequence_options_backward.h"
#include "sequence_tiles.h"

namespace seqrec_fast::SEQREC_TIER {
namespace {

template <class Number, class SumsOf, class ProductsOf>
struct Arithmetic {
  using T = Number;
  using Sums = SumsOf;
  using Products = ProductsOf;
};

#if defined(SEQREC_TILES)
template <class T, class Cell, int kParts>
using Tiles = Arithmetic<T, TileSums<T, Cell, kParts>, TileProducts<T, Cell, kParts>>;
#endif

// use(Arithmetic): how the products of a type are formed. On tiles that is a question of how many bf16 parts hold its
// numbers: one bf16, two fp16 and, by the switch for precision, one to three fp32. Where there are too many
// (kMostParts) fp32 multiply-adds are used.
template <class T, class Cell, class Use>
auto with_arithmetic(const SequenceShape& shape, const Use& use) {
#if defined(SEQREC_TILES)
  if constexpr (sizeof(T) < 8)
    if (!has_options(shape)) {
      if constexpr (__is_same(T, BF16)) {
        return use(Tiles<T, Cell, 1>{});
      } else if constexpr (__is_same(T, F16)) {
        if constexpr (kMostParts >= 2) return use(Tiles<T, Cell, 2>{});
      } else {
        if (shape.precision == 2) return use(Tiles<T, Cell, 1>{});
        if constexpr (kMostParts >= 3) {
          if (shape.precision == 1) return use(Tiles<T, Cell, 2>{});
          return use(Tiles<T, Cell, 3>{});
        }
      }
    }
#endif
  return use(Arithmetic<T, LaneSums<T, Cell>, LaneProducts<T, Cell>>{});
}

// use(Arithmetic) for the cell and the type of `shape`.
template <class Use>
struct ByCell {
  template <class T>
  struct Kernel {
    static auto run(const SequenceShape& shape, const Use& use) {
      return shape.kind == CellKind::kLstm ? with_arithmetic<T, LstmCell>(shape, use)
                                           : with_arithmetic<T, GruCell>(shape, use);
    }
  };
};
template <class Use>
auto dispatch(const SequenceShape& shape, const Use& use) {
  return by_scalar<ByCell<Use>::template Kernel>(shape.scalar, shape, use);
}

template <class T>
struct AddParts {
  static void run(const void* const* parts, int64_t count, void* out, int64_t begin, int64_t end) {
    add_parts<T>(parts, count, out, begin, end);
  }
};

}  // namespace

const SequenceKernels sequence_kernels = {
    [](const SequenceShape& shape) {
      return dispatch(shape, [&]<class A>(A) { return A::Sums::packed_bytes(shape); });
    },
    [](const SequenceShape& shape) { return dispatch(shape, [&]<class A>(A) { return A::Sums::pack_blocks(shape); }); },
    [](const SequenceInputs& in, void* packed, int64_t begin, int64_t end) {
      dispatch(in.shape, [&]<class A>(A) { A::Sums::pack(in, packed, begin, end); });
    },
    [](const SequenceShape& shape) {
      return dispatch(shape, [&]<class A>(A) { return A::Products::packed_bytes(shape); });
    },
    [](const SequenceShape& shape) {
      return dispatch(shape, [&]<class A>(A) { return A::Products::pack_blocks(shape); });
    },
    [](const SequenceInputs& in, void* packed, int64_t begin, int64_t end) {
      dispatch(in.shape, [&]<class A>(A) { A::Products::pack(in, packed, begin, end); });
    },
    [](const SequenceShape& shape, int64_t count) {
      return dispatch(shape, [&]<class A>(A) { return forward_bytes<typename A::T, typename A::Sums>(shape, count); });
    },
    [](const SequenceForward& call, const RowTile& tile, void* scratch) {
      dispatch(call.in.shape,
               [&]<class A>(A) { sequence_forward<typename A::T, typename A::Sums>(call, tile, scratch); });
    },
    [](const SequenceShape& shape, int64_t count) {
      return dispatch(shape, [&]<class A>(A) {
        return backward_bytes<typename A::T, typename A::Sums, typename A::Products>(shape, count);
      });
    },
    [](const SequenceBackward& call, const RowTile& tile, const SequencePartial& partial, void* scratch) {
      dispatch(call.in.shape, [&]<class A>(A) {
        sequence_backward<typename A::T, typename A::Sums, typename A::Products>(call, tile, partial, scratch);
      });
    },
    [](Scalar scalar, const void* const* parts, int64_t count, void* out, int64_t begin, int64_t end) {
      by_scalar<AddParts>(scalar, parts, count, out, begin, end);
    },
};

}  // namespace seqrec_fast::SEQREC_TIER
