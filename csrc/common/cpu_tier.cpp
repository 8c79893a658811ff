#include "common/cpu_tier.h"

#include <atomic>
#include <cstdint>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "common/check.h"

namespace seqrec_fast {
namespace {

std::atomic<int> chosen{0};

// The best tier the processor (and the operating system, as far as it must save the wider registers) supports.
int64_t highest_cpu_tier() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  // AMX needs a permission that torch asks the kernel for; here only its own vector instructions are looked at.
  if (avx512 && __builtin_cpu_supports("avx512bf16")) return static_cast<int>(CpuTier::kAmx);
  if (avx512) return static_cast<int>(CpuTier::kAvx512);
  if (avx2) return static_cast<int>(CpuTier::kAvx2);
#endif
  return static_cast<int>(CpuTier::kDefault);
}

void set_cpu_tier(int64_t tier) {
  check_value(tier >= 0 && tier <= highest_cpu_tier(), "tier must be in 0…", highest_cpu_tier(),
              " on this processor, got ", tier);
  chosen.store(static_cast<int>(tier), std::memory_order_relaxed);
}

}  // namespace

CpuTier cpu_tier() { return static_cast<CpuTier>(chosen.load(std::memory_order_relaxed)); }

}  // namespace seqrec_fast

STABLE_TORCH_LIBRARY_IMPL(seqrec_fast_native, CompositeExplicitAutograd, m) {
  m.impl("highest_cpu_tier", TORCH_BOX(&seqrec_fast::highest_cpu_tier));
  m.impl("set_cpu_tier", TORCH_BOX(&seqrec_fast::set_cpu_tier));
}
