// The recurrent kernels, launched as csrc/recurrent/cuda.cu launches them.
#include "emulator/launch.h"
#include "emulator/run.h"
#include "recurrent/choose.cuh"

namespace seqrec_fast::emulator {

namespace {

template <class T>
const T* in(const void* p) {
  return static_cast<const T*>(p);
}
template <class T>
T* out(void* p) {
  return static_cast<T*>(p);
}

template <class Product>
void run_forward(const std::string& form, const StepArrays& a, const EmulatorLaunch& launch) {
  using T = typename Product::Element;
  const LstmStepArguments<T> arguments{a.batch,       a.input,          a.projected,      a.hidden,       in<T>(a.x),
                                       in<T>(a.h),    in<T>(a.c),       in<T>(a.w_ih),    in<T>(a.w_hh),  in<T>(a.b_ih),
                                       in<T>(a.b_hh), out<T>(a.h_next), out<T>(a.c_next), out<T>(a.gates)};
  if (form == "auto") return launch_lstm_step<Product>(arguments, launch);
  if (form == "small") return launch_tiled<Product, SmallTile>(arguments, launch);
  if (form == "medium") return launch_tiled<Product, MediumTile>(arguments, launch);
  if (form == "large") return launch_tiled<Product, LargeTile>(arguments, launch);
  if (form == "streamed_1") return launch_streamed<1>(arguments, launch);
  if (form == "streamed_4") return launch_streamed<4>(arguments, launch);
  if (form == "streamed_16") return launch_streamed<16>(arguments, launch);
  throw std::invalid_argument("unknown form " + form);
}

template <class T>
void run_gradients(const GradientArrays& a, const EmulatorLaunch& launch) {
  const LstmStepBackwardArguments<T> arguments{a.batch,         a.hidden,     in<T>(a.grad_h),
                                               in<T>(a.grad_c), in<T>(a.c),   in<T>(a.c_next),
                                               in<T>(a.gates),  out<T>(a.dz), out<T>(a.dc)};
  launch_lstm_step_gate_gradients(arguments, launch);
}

}  // namespace

void run_lstm_step(const std::string& product, const std::string& form, const StepArrays& arrays,
                   const Options& options) {
  const EmulatorLaunch launch(options);
  if (product == "float32") return run_forward<F32Product>(form, arrays, launch);
  if (product == "tf32") return run_forward<Tf32Product>(form, arrays, launch);
  if (product == "bfloat16") return run_forward<Bf16Product>(form, arrays, launch);
  if (product == "float16") return run_forward<F16Product>(form, arrays, launch);
  throw std::invalid_argument("unknown product " + product);
}

void run_lstm_step_gate_gradients(const std::string& dtype, const GradientArrays& arrays, const Options& options) {
  const EmulatorLaunch launch(options);
  if (dtype == "float32") return run_gradients<float>(arrays, launch);
  if (dtype == "bfloat16") return run_gradients<bf16>(arrays, launch);
  if (dtype == "float16") return run_gradients<f16>(arrays, launch);
  throw std::invalid_argument("unknown dtype " + dtype);
}

}  // namespace seqrec_fast::emulator
