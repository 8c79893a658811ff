// Launches kernels on the CPU, as GpuLaunch does on a GPU.
#pragma once

#include "emulator/machine.h"

namespace seqrec_fast::emulator {

class EmulatorLaunch {
 public:
  explicit EmulatorLaunch(const Options& options) : options_(options) {}

  template <auto kKernel, class Arguments>
  void operator()(const LaunchShape& shape, const Arguments& arguments) const {
    Machine::instance().run(shape, options_, [&] { kKernel(arguments); });
  }

 private:
  Options options_;
};

}  // namespace seqrec_fast::emulator
