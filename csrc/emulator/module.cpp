// The pybind11 module seqrec_fast_emulator: CUDA kernels run on the CPU, for tests. Never part of the package.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>

#include "emulator/run.h"

namespace py = pybind11;

namespace seqrec_fast::emulator {

namespace {

using Array = py::array;
using OptionalArray = std::optional<py::array>;

Options options_of(const std::string& schedule, uint32_t seed) {
  Options options;
  if (schedule == "lock_step")
    options.schedule = Schedule::kLockStep;
  else if (schedule == "greedy")
    options.schedule = Schedule::kGreedy;
  else if (schedule == "random")
    options.schedule = Schedule::kRandom;
  else
    throw std::invalid_argument("schedule must be lock_step, greedy or random, got " + schedule);
  options.seed = seed;
  return options;
}

// The data of a contiguous array of `count` elements. Any dtype of the right width will do: numpy has no bfloat16.
void* data_of(const Array& array, int64_t count, int64_t itemsize, const char* name) {
  if (array.itemsize() != itemsize || array.size() != count || !(array.flags() & Array::c_style))
    throw std::invalid_argument(std::string(name) + " must be a contiguous array of " + std::to_string(count) +
                                " elements of " + std::to_string(itemsize) + " bytes");
  return const_cast<void*>(array.data());
}
void* data_of(const OptionalArray& array, int64_t count, int64_t itemsize, const char* name) {
  return array ? data_of(*array, count, itemsize, name) : nullptr;
}

void selftest(const std::string& name, const Array& in, const Array& out, const std::array<uint32_t, 2>& blocks,
              uint32_t threads, size_t shared_bytes, const std::string& schedule, uint32_t seed) {
  run_selftest(name, static_cast<const float*>(data_of(in, in.size(), 4, "in")), in.size(),
               static_cast<float*>(data_of(out, out.size(), 4, "out")), {blocks[0], blocks[1], threads, shared_bytes},
               options_of(schedule, seed));
}

struct StepTensors {
  Array x, h, c, w_ih, w_hh;
  OptionalArray b_ih, b_hh;
  Array h_next, c_next;
  OptionalArray gates;
};

void lstm_step(const std::string& product, const std::array<int64_t, 4>& sizes, const StepTensors& t,
               const std::string& form, const std::string& schedule, uint32_t seed,
               const std::optional<std::array<uint64_t, 2>>& blocks) {
  Options options = options_of(schedule, seed);
  if (blocks) {
    options.first_block = (*blocks)[0];
    options.last_block = (*blocks)[1];
  }
  const auto [batch, input, projected, hidden] = sizes;
  const int64_t width = t.x.itemsize();
  if (width != (product == "float32" || product == "tf32" ? 4 : 2))
    throw std::invalid_argument("x is not of the product's type");
  const StepArrays arrays{batch,
                          input,
                          projected,
                          hidden,
                          data_of(t.x, batch * input, width, "x"),
                          data_of(t.h, batch * projected, width, "h"),
                          data_of(t.c, batch * hidden, width, "c"),
                          data_of(t.w_ih, 4 * hidden * input, width, "w_ih"),
                          data_of(t.w_hh, 4 * hidden * projected, width, "w_hh"),
                          data_of(t.b_ih, 4 * hidden, width, "b_ih"),
                          data_of(t.b_hh, 4 * hidden, width, "b_hh"),
                          data_of(t.h_next, batch * hidden, width, "h_next"),
                          data_of(t.c_next, batch * hidden, width, "c_next"),
                          data_of(t.gates, batch * 4 * hidden, width, "gates")};
  run_lstm_step(product, form, arrays, options);
}

struct GradientTensors {
  Array grad_h, grad_c, c, c_next, gates, dz, dc;
};

void lstm_step_gate_gradients(const std::string& dtype, int64_t batch, int64_t hidden, const GradientTensors& t,
                              const std::string& schedule, uint32_t seed) {
  const int64_t width = dtype == "float32" ? 4 : 2, cells = batch * hidden;
  const GradientArrays arrays{batch,
                              hidden,
                              data_of(t.grad_h, cells, width, "grad_h"),
                              data_of(t.grad_c, cells, width, "grad_c"),
                              data_of(t.c, cells, width, "c"),
                              data_of(t.c_next, cells, width, "c_next"),
                              data_of(t.gates, 4 * cells, width, "gates"),
                              data_of(t.dz, 4 * cells, width, "dz"),
                              data_of(t.dc, cells, width, "dc")};
  run_lstm_step_gate_gradients(dtype, arrays, options_of(schedule, seed));
}

}  // namespace

PYBIND11_MODULE(seqrec_fast_emulator, m) {
  py::register_local_exception<Error>(m, "EmulatorError");
  m.def("selftest", &selftest, "Run one of the kernels of selftest.cuh on float32 arrays.", py::arg("name"),
        py::arg("input"), py::arg("out"), py::kw_only(), py::arg("blocks"), py::arg("threads"), py::arg("shared_bytes"),
        py::arg("schedule"), py::arg("seed"));

  py::class_<StepTensors>(m, "StepTensors", py::module_local())
      .def(py::init<Array, Array, Array, Array, Array, OptionalArray, OptionalArray, Array, Array, OptionalArray>(),
           py::arg("x"), py::arg("h"), py::arg("c"), py::arg("w_ih"), py::arg("w_hh"), py::arg("b_ih"), py::arg("b_hh"),
           py::arg("h_next"), py::arg("c_next"), py::arg("gates"));
  m.def("lstm_step", &lstm_step, "The forward kernel for sizes (B, I, P, H). blocks: the first and last block to run.",
        py::arg("product"), py::arg("sizes"), py::arg("tensors"), py::kw_only(), py::arg("form"), py::arg("schedule"),
        py::arg("seed"), py::arg("blocks") = py::none());

  py::class_<GradientTensors>(m, "GradientTensors", py::module_local())
      .def(py::init<Array, Array, Array, Array, Array, Array, Array>(), py::arg("grad_h"), py::arg("grad_c"),
           py::arg("c"), py::arg("c_next"), py::arg("gates"), py::arg("dz"), py::arg("dc"));
  m.def("lstm_step_gate_gradients", &lstm_step_gate_gradients, "The backward kernel.", py::arg("dtype"),
        py::arg("batch"), py::arg("hidden"), py::arg("tensors"), py::kw_only(), py::arg("schedule"), py::arg("seed"));
}

}  // namespace seqrec_fast::emulator
