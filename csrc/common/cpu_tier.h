// Which of the compiled instruction-set variants runs on this machine.
#pragma once

namespace seqrec_fast {

// kAvx512Bf16: with the products of bf16 pairs and of int8 quads (AVX512_BF16 and AVX512_VNNI: Zen 4, Cooper Lake).
enum class CpuTier : int { kDefault = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3, kAmx = 4 };

// The tier chosen at load time. Python asks torch (so that ATEN_CPU_CAPABILITY, and the operating system's permission
// for AMX, decide for both libraries alike) and stores the answer through the operator
// seqrec_fast_native::set_cpu_tier.
CpuTier cpu_tier();

// A table of functions has one definition in each tier's namespace: SEQREC_TIER_TABLES declares them (in namespace
// seqrec_fast), SEQREC_CHOSEN_TABLE is the one of the tier in force.
#if defined(__x86_64__)
#define SEQREC_TIER_TABLES(Type, table) \
  namespace tier_default {              \
  extern const Type table;              \
  }                                     \
  namespace tier_avx2 {                 \
  extern const Type table;              \
  }                                     \
  namespace tier_avx512 {               \
  extern const Type table;              \
  }                                     \
  namespace tier_avx512_bf16 {          \
  extern const Type table;              \
  }                                     \
  namespace tier_amx {                  \
  extern const Type table;              \
  }
#define SEQREC_CHOSEN_TABLE(table)                                                                      \
  (*::seqrec_fast::of_tier(&::seqrec_fast::tier_default::table, &::seqrec_fast::tier_avx2::table,       \
                           &::seqrec_fast::tier_avx512::table, &::seqrec_fast::tier_avx512_bf16::table, \
                           &::seqrec_fast::tier_amx::table))
#else
#define SEQREC_TIER_TABLES(Type, table) \
  namespace tier_default {              \
  extern const Type table;              \
  }
#define SEQREC_CHOSEN_TABLE(table) ::seqrec_fast::tier_default::table
#endif

template <class Table>
static inline const Table* of_tier(const Table* of_default, const Table* avx2, const Table* avx512,
                                   const Table* avx512_bf16, const Table* amx) {
  switch (cpu_tier()) {
    case CpuTier::kAmx:
      return amx;
    case CpuTier::kAvx512Bf16:
      return avx512_bf16;
    case CpuTier::kAvx512:
      return avx512;
    case CpuTier::kAvx2:
      return avx2;
    case CpuTier::kDefault:
      break;
  }
  return of_default;
}

}  // namespace seqrec_fast
