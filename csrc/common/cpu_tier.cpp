#include "common/cpu_tier.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <atomic>
#include <cstdint>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "common/check.h"

namespace seqrec_fast {
namespace {

std::atomic<int> chosen{0};

#if defined(__x86_64__)
// Tile registers and their bf16 product; the compiler's own test does not know them.
bool has_tiles() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx >> 24 & 1) && (edx >> 22 & 1);
}
#endif

// The best tier the processor (and the operating system, as far as it must save the wider registers) supports.
int64_t highest_cpu_tier() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  // AMX also needs a permission, for which torch asks the operating system.
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
  if (bf16 && has_tiles()) return static_cast<int>(CpuTier::kAmx);
  if (bf16) return static_cast<int>(CpuTier::kAvx512Bf16);
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
