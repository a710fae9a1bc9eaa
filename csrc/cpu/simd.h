// Vectors of one instruction set, written once with the compilers' vector extension. Everything here is inlined
// into a function that is compiled for the instruction set, so one source serves all of them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#define MPMA_INLINE inline __attribute__((always_inline))

namespace mpma::cpu {

// An instruction set: the width of its vectors, and a function compiled for it that runs an MPMA_INLINE lambda.
struct Portable {
  static constexpr int kBytes = 16;  // SSE2, NEON
  template <class Body>
  static void run(const Body& body) {
    body();
  }
};

#if defined(__x86_64__)
struct Avx2 {
  static constexpr int kBytes = 32;
  template <class Body>
  __attribute__((target("avx2,fma"))) static void run(const Body& body) {
    body();
  }
};
#endif

// Calls body with the best instruction set of this machine.
template <class Body>
void with_isa(const Body& body) {
#if defined(__x86_64__) && !defined(MPMA_PORTABLE)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return body(Avx2{});
#endif
  body(Portable{});
}

template <class T, class Isa>
struct Simd {
  using Int = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  static constexpr int kWidth = Isa::kBytes / static_cast<int>(sizeof(T));
  typedef T Vec __attribute__((vector_size(Isa::kBytes)));
  typedef Int IntVec __attribute__((vector_size(Isa::kBytes)));
  typedef T UnalignedVec __attribute__((vector_size(Isa::kBytes), aligned(sizeof(T)), may_alias));
  typedef Int UnalignedIntVec __attribute__((vector_size(Isa::kBytes), aligned(sizeof(T)), may_alias));

  static MPMA_INLINE Vec load(const T* p) { return *reinterpret_cast<const UnalignedVec*>(p); }
  static MPMA_INLINE IntVec load(const Int* p) { return *reinterpret_cast<const UnalignedIntVec*>(p); }
  static MPMA_INLINE void store(T* p, Vec v) { *reinterpret_cast<UnalignedVec*>(p) = v; }
  static MPMA_INLINE Vec broadcast(T x) { return x - Vec{}; }
  // x where x > y, else y: a NaN in x is passed over.
  static MPMA_INLINE Vec maximum(Vec x, Vec y) { return x > y ? x : y; }

  // Halves first: a fixed tree that compiles to shuffles.
  static MPMA_INLINE T sum(Vec v) {
    T lane[kWidth];
    store(lane, v);
    for (int half = kWidth / 2; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
    return lane[0];
  }

  // e^x = 2^n e^r with r in [-ln2/2, ln2/2], e^r by its Taylor series to r^7 (remainder 5e-9, below half a float32
  // ulp). Below -110 it is 0; a NaN stays NaN.
  static MPMA_INLINE Vec exp(Vec x) {
    if constexpr (sizeof(T) == 8) {
      for (int i = 0; i < kWidth; ++i) x[i] = std::exp(x[i]);
      return x;
    } else {
      x = x < T(-110) ? broadcast(T(-110)) : x;
      x = x > T(89) ? broadcast(T(89)) : x;
      const T round = 12582912;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
      const Vec shifted = x * T(1.44269504088896341) + round;
      const IntVec n = (IntVec)shifted - 0x4B400000;
      const Vec whole = shifted - round;
      const Vec r = (x - whole * T(0.693359375)) + whole * T(2.12194440054690583e-4);  // ln2 in two parts
      Vec p = broadcast(T(1.0 / 5040));
      p = p * r + T(1.0 / 720);
      p = p * r + T(1.0 / 120);
      p = p * r + T(1.0 / 24);
      p = p * r + T(1.0 / 6);
      p = p * r + T(0.5);
      p = p * r + T(1);
      p = p * r + T(1);
      // In two factors, since 2^n itself may be below or above the range of normal numbers.
      const IntVec half = n >> 1;
      return p * (Vec)((half + 127) << 23) * (Vec)((n - half + 127) << 23);
    }
  }
};

}  // namespace mpma::cpu
