// Which of the compiled instruction-set variants runs on this machine.
#pragma once

namespace seqrec_fast {

enum class CpuTier : int { kDefault = 0, kAvx2 = 1, kAvx512 = 2, kAmx = 3 };

// The tier chosen at load time. Python asks torch (so that ATEN_CPU_CAPABILITY, and the operating system's permission
// for AMX, decide for both libraries alike) and stores the answer through the operator
// seqrec_fast_native::set_cpu_tier.
CpuTier cpu_tier();

}  // namespace seqrec_fast
