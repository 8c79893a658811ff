// What a kernel launch looks like, for whoever performs it: the GPU (launch.h) or the emulator.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace seqrec_fast {

struct LaunchShape {
  uint32_t blocks_x, blocks_y;  // x: at most 2³¹ - 1, y: at most 65535
  uint32_t threads;
  size_t shared_bytes;
};

constexpr int64_t kMostBlocksX = 2147483647;
constexpr int64_t kMostBlocksY = 65535;

// Of a by b, rounded up; b > 0.
template <class A, class B>
#if defined(__CUDACC__)
__host__ __device__
#endif
    constexpr A ceil_div(A a, B b) {
  return (a + b - 1) / b;
}

}  // namespace seqrec_fast
