// The only place that launches a kernel.
#pragma once

#include <cuda_runtime.h>

#include <array>
#include <atomic>

#include "common/launch_shape.h"
#include "common/stream.h"

namespace seqrec_fast {

// More than 48 KB of dynamic shared memory must be asked for, once per kernel and device. (A second thread that asks
// too does no harm: the answer is the same.)
template <auto kKernel>
void allow_shared_memory(int device, size_t bytes) {
  constexpr size_t kWithoutAsking = 48 << 10;
  static std::array<std::atomic<bool>, 64> allowed{};
  if (bytes <= kWithoutAsking) return;
  const bool remembered = device >= 0 && device < int(allowed.size());
  if (remembered && allowed[device].load(std::memory_order_relaxed)) return;
  check_cuda(cudaFuncSetAttribute(reinterpret_cast<const void*>(kKernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  int(bytes)),
             "asking for shared memory");
  if (remembered) allowed[device].store(true, std::memory_order_relaxed);
}

// Launches kernels on torch's current stream of one device, which must be the current device.
class GpuLaunch {
 public:
  explicit GpuLaunch(int device) : device_(device), stream_(current_stream(device)) {}

  // kKernel takes one struct by value. shared_bytes must be the same in every launch of a kernel.
  template <auto kKernel, class Arguments>
  void operator()(const LaunchShape& shape, const Arguments& arguments) const {
    allow_shared_memory<kKernel>(device_, shape.shared_bytes);
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(shape.blocks_x, shape.blocks_y);
    config.blockDim = dim3(shape.threads);
    config.dynamicSmemBytes = shape.shared_bytes;
    config.stream = stream_;
    check_cuda(cudaLaunchKernelEx(&config, kKernel, arguments), "launching a kernel");
  }

 private:
  int device_;
  cudaStream_t stream_;
};

}  // namespace seqrec_fast
