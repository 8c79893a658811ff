// The names of CUDA C++ that kernels use, for a C++ compiler.
#pragma once

#include <cstdint>

#include "emulator/machine.h"

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)

#define threadIdx (::seqrec_fast::emulator::Machine::instance().thread().index)
#define blockIdx (::seqrec_fast::emulator::Machine::instance().block_index())
#define blockDim (::seqrec_fast::emulator::Machine::instance().block_size())
#define gridDim (::seqrec_fast::emulator::Machine::instance().grid_size())

struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

inline void __syncthreads(std::source_location where = std::source_location::current()) {
  seqrec_fast::emulator::Machine::instance().barrier(where);
}
