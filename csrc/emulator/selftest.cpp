#include "emulator/selftest.cuh"

#include <map>

#include "common/slab.cuh"
#include "emulator/run.h"

namespace seqrec_fast::emulator {

namespace {

using Kernel = void (*)(SelftestArguments);

const std::map<std::string, Kernel>& kernels() {
  static const std::map<std::string, Kernel> table{
      {"reverse", reverse<Defect::kNone>},
      {"reverse_no_barrier", reverse<Defect::kNoBarrier>},
      {"reverse_out_of_bounds", reverse<Defect::kOutOfBounds>},
      {"pipeline", pipeline<Defect::kNone>},
      {"pipeline_no_barrier", pipeline<Defect::kNoBarrier>},
      {"pipeline_no_trailing_barrier", pipeline<Defect::kNoTrailingBarrier>},
      {"pipeline_no_wait", pipeline<Defect::kNoWait>},
      {"pipeline_weak_wait", pipeline<Defect::kWeakWait>},
      {"pipeline_in_flight", pipeline<Defect::kInFlight>},
      {"barrier_in_one_warp", diverge<Divergence::kBarrierInOneWarp>},
      {"barriers_of_two_branches", diverge<Divergence::kBarriersOfTwoBranches>},
      {"shuffle_in_half_a_warp", diverge<Divergence::kShuffleInHalfAWarp>},
      {"two_warp_operations", diverge<Divergence::kTwoWarpOperations>},
      {"barrier_after_exit", diverge<Divergence::kBarrierAfterExit>},
      {"read_unwritten", read_unwritten},
      {"misaligned_copy", misaligned_copy},
      {"number_blocks", number_blocks},
      {"shuffle", shuffle},
      {"multiply_bf16", multiply<Bf16Product>},
      {"multiply_f16", multiply<F16Product>},
      {"multiply_tf32", multiply<Tf32Product>},
  };
  return table;
}

}  // namespace

void run_selftest(const std::string& name, const float* in, int64_t in_size, float* out, const LaunchShape& shape,
                  const Options& options) {
  const auto found = kernels().find(name);
  if (found == kernels().end()) throw std::invalid_argument("unknown kernel " + name);
  Machine::instance().run(shape, options, [&] { found->second({in, out, in_size}); });
}

}  // namespace seqrec_fast::emulator
