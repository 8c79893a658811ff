// The kernels of a single step of one CPU tier; compiled once per tier with -DSEQREC_TIER=tier_… and that tier's flags.
#include "by_scalar.h"
#include "kernels.h"
#include "step_backward.h"
#include "step_forward.h"

namespace seqrec_fast::SEQREC_TIER {
namespace {

template <class Cell>
struct Step {
  template <class T>
  struct Forward {
    static void run(const StepForward& step, int64_t begin, int64_t end, float* wide) {
      step_forward<Cell, T>(step, begin, end, wide);
    }
  };
  template <class T>
  struct SumGradients {
    static void run(const StepBackward& step, int64_t begin, int64_t end) {
      step_sum_gradients<Cell, T>(step, begin, end);
    }
  };
  template <class T>
  struct Products {
    static void run(const StepBackward& step, int64_t begin, int64_t end) { step_products<Cell, T>(step, begin, end); }
  };
  template <class T>
  struct RoundDh {
    static void run(const StepBackward& step, int64_t begin, int64_t end) { step_round_dh<T>(step, begin, end); }
  };

  static constexpr StepKernels kKernels = {
      [](const StepForward& step, int64_t begin, int64_t end, float* wide) {
        by_scalar<Forward>(step.sizes.scalar, step, begin, end, wide);
      },
      [](const StepBackward& step, int64_t begin, int64_t end) {
        by_scalar<SumGradients>(step.sizes.scalar, step, begin, end);
      },
      [](const StepBackward& step, int64_t begin, int64_t end) {
        by_scalar<Products>(step.sizes.scalar, step, begin, end);
      },
      [](const StepBackward& step, int64_t begin, int64_t end) {
        by_scalar<RoundDh>(step.sizes.scalar, step, begin, end);
      },
  };
};

}  // namespace

const RecurrentKernels recurrent_kernels = {Step<LstmCell>::kKernels, Step<GruCell>::kKernels};

}  // namespace seqrec_fast::SEQREC_TIER
