// CUDA errors, and torch's current stream without a symbol that a CPU build of torch lacks.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "common/check.h"

// Exported by libtorch_cuda only. Weak, so that the same library also loads into a CPU build of torch, where it is
// null.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace seqrec_fast {

// Arrives in Python as RuntimeError. (STD_CUDA_CHECK needs a symbol of libtorch_cuda.)
inline void check_cuda(cudaError_t error, const char* doing) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // taken note of: the next call is not to blame
  throw std::runtime_error(message("CUDA error while ", doing, ": ", cudaGetErrorString(error)));
}

inline cudaStream_t current_stream(int32_t device_index) {
  void* stream = nullptr;
  if (aoti_torch_get_current_cuda_stream == nullptr ||
      aoti_torch_get_current_cuda_stream(device_index, &stream) != AOTI_TORCH_SUCCESS)
    throw std::runtime_error("this build of torch has no CUDA stream to launch a kernel on");
  return static_cast<cudaStream_t>(stream);
}

}  // namespace seqrec_fast
