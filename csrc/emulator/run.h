// What the Python module calls: kernels by name, on plain pointers. (Only module.cpp includes pybind11: it takes longer
// to compile than everything else here.)
#pragma once

#include <string>

#include "emulator/machine.h"

namespace seqrec_fast::emulator {

// The kernels of selftest.cuh.
void run_selftest(const std::string& name, const float* in, int64_t in_size, float* out, const LaunchShape& shape,
                  const Options& options);

// Arrays as in LstmStepArguments. product: float32, tf32, bfloat16 or float16. form: auto (the choice a GPU makes),
// small, medium, large, streamed_1, streamed_4 or streamed_16.
struct StepArrays {
  int64_t batch, input, projected, hidden;
  const void *x, *h, *c, *w_ih, *w_hh, *b_ih, *b_hh;
  void *h_next, *c_next, *gates;
};
void run_lstm_step(const std::string& product, const std::string& form, const StepArrays& arrays,
                   const Options& options);

// Arrays as in LstmStepBackwardArguments. dtype: float32, bfloat16 or float16.
struct GradientArrays {
  int64_t batch, hidden;
  const void *grad_h, *grad_c, *c, *c_next, *gates;
  void *dz, *dc;
};
void run_lstm_step_gate_gradients(const std::string& dtype, const GradientArrays& arrays, const Options& options);

}  // namespace seqrec_fast::emulator
