// The instruction set to use on this machine.
#pragma once

#include <cstdlib>
#include <cstring>

// Clang has no `#pragma GCC target`, and GCC before 11 no AMX; they build the portable version, which -march=native
// makes a fast one.
#if defined(__x86_64__) && defined(__GNUC__) && __GNUC__ >= 11 && !defined(__clang__)
#define MPMA_MULTIPLE_ISAS 1
#else
#define MPMA_MULTIPLE_ISAS 0
#endif

#if MPMA_MULTIPLE_ISAS && defined(__linux__)
#include <strings.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace mpma {

enum class Isa { kPortable, kAvx2, kAvx512, kAvx512Bfloat16, kAmx };

// Whether the processor has AMX, oneDNN's own setting ONEDNN_MAX_CPU_ISA does not exclude it, and the kernel lets this
// process use it: Linux wants to be asked once, because of the 8 KB that each thread's registers grow by.
inline bool may_use_amx() {
#if MPMA_MULTIPLE_ISAS && defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  const char* setting = std::getenv("ONEDNN_MAX_CPU_ISA");
  if (setting && !strcasestr(setting, "amx") && strcasecmp(setting, "all") && strcasecmp(setting, "default"))
    return false;
  return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

// The best one, not above PyTorch's own setting ATEN_CPU_CAPABILITY (default, avx2 or avx512).
inline Isa fastest_isa() {
#if MPMA_MULTIPLE_ISAS
  static const Isa fastest = [] {
    const char* setting = std::getenv("ATEN_CPU_CAPABILITY");
    const auto limited_to = [&](const char* name) { return setting && std::strcmp(setting, name) == 0; };
    if (limited_to("default") || !__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") ||
        !__builtin_cpu_supports("f16c"))
      return Isa::kPortable;
    if (limited_to("avx2") || !__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
      return Isa::kAvx2;
    if (limited_to("avx512") || !__builtin_cpu_supports("avx512bf16")) return Isa::kAvx512;
    return may_use_amx() ? Isa::kAmx : Isa::kAvx512Bfloat16;
  }();
  return fastest;
#else
  return Isa::kPortable;
#endif
}

inline const char* name_of(Isa isa) {
  switch (isa) {
    case Isa::kAmx: return "AVX-512 with bfloat16 and AMX";
    case Isa::kAvx512Bfloat16: return "AVX-512 with bfloat16";
    case Isa::kAvx512: return "AVX-512";
    case Isa::kAvx2: return "AVX2";
    default: return "portable vectors";
  }
}

}  // namespace mpma
