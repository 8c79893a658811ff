// The recurrent kernels of one CPU tier; compiled once per tier with -DSEQREC_TIER=tier_… and that tier's flags.
#include "by_scalar.h"
#include "kernels.h"
#include "step.h"

namespace seqrec_fast::SEQREC_TIER {
namespace {

template <class T>
struct Step {
  static void run(const LstmStep& step, int64_t begin, int64_t end, float* wide) {
    lstm_step<T>(step, begin, end, wide);
  }
};
template <class T>
struct GateGradients {
  static void run(const LstmStepBackward& step, int64_t begin, int64_t end) {
    lstm_step_gate_gradients<T>(step, begin, end);
  }
};
template <class T>
struct Products {
  static void run(const LstmStepBackward& step, int64_t begin, int64_t end) { lstm_step_products<T>(step, begin, end); }
};

}  // namespace

const RecurrentKernels recurrent_kernels = {
    [](const LstmStep& step, int64_t begin, int64_t end, float* wide) {
      by_scalar<Step>(step.sizes.scalar, step, begin, end, wide);
    },
    [](const LstmStepBackward& step, int64_t begin, int64_t end) {
      by_scalar<GateGradients>(step.sizes.scalar, step, begin, end);
    },
    [](const LstmStepBackward& step, int64_t begin, int64_t end) {
      by_scalar<Products>(step.sizes.scalar, step, begin, end);
    },
};

}  // namespace seqrec_fast::SEQREC_TIER
