// Element types and registers as bits, the same on host and device, and the qualifiers of device code.
#pragma once

#include <cstdint>

#include "qualifiers.h"

// The same source serves nvcc and, with MPMA_EMULATE, the host compiler, which runs it in the tests.
#if defined(MPMA_EMULATE)
#define MPMA_DEVICE inline
#define MPMA_KERNEL(threads, blocks) static void
#define MPMA_UNROLL _Pragma("GCC unroll 32")
#define MPMA_NO_UNROLL
#define MPMA_UNROLL_PRODUCT
#else
#define MPMA_DEVICE __device__ __forceinline__
// A kernel for at most `threads` threads a block, `blocks` of which must fit a multiprocessor.
#define MPMA_KERNEL(threads, blocks) static __global__ void __launch_bounds__(threads, blocks)
#define MPMA_UNROLL _Pragma("unroll")
#define MPMA_NO_UNROLL _Pragma("unroll 1")
// Over the depth of a product of T: float32 needs twice the registers a step.
#define MPMA_UNROLL_PRODUCT _Pragma("unroll(kIsHalf<T> ? kUnroll : 1)")
#endif

namespace mpma::cuda {

struct Bfloat16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

// What one vector access moves.
struct alignas(8) Bytes8 {
  uint32_t word[2];
};
struct alignas(16) Bytes16 {
  uint32_t word[4];
};

// Registers of a warp's operands on the tensor cores, in the layouts of the PTX manual. C and D (16 x 8) share one: value
// 2i + j of a lane is row lane / 4 + 8 i, column 2 (lane % 4) + j.
struct Registers4 {
  uint32_t r[4];
};
struct Registers2 {
  uint32_t r[2];
};
struct Sum {
  float value[4];
};

template <class T>
constexpr int kVector = 16 / sizeof(T);  // elements of a vector access

template <class T>
constexpr bool kIsHalf = sizeof(T) == 2;  // one of the two types that the tensor cores multiply directly

}  // namespace mpma::cuda
