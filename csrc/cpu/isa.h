// The instruction set to use on this machine.
#pragma once

#include <cstdlib>
#include <cstring>

// Clang has no `#pragma GCC target`; it builds the portable version, which -march=native makes a fast one.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define MPMA_MULTIPLE_ISAS 1
#else
#define MPMA_MULTIPLE_ISAS 0
#endif

namespace mpma {

enum class Isa { kPortable, kAvx2, kAvx512 };

// The best one, not above PyTorch's own setting ATEN_CPU_CAPABILITY (default, avx2 or avx512).
inline Isa fastest_isa() {
#if MPMA_MULTIPLE_ISAS
  static const Isa fastest = [] {
    const char* setting = std::getenv("ATEN_CPU_CAPABILITY");
    const bool below_avx2 = setting && std::strcmp(setting, "default") == 0;
    const bool below_avx512 = below_avx2 || (setting && std::strcmp(setting, "avx2") == 0);
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return avx512 && !below_avx512 ? Isa::kAvx512 : avx2 && !below_avx2 ? Isa::kAvx2 : Isa::kPortable;
  }();
  return fastest;
#else
  return Isa::kPortable;
#endif
}

}  // namespace mpma
