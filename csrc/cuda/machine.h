// The machine: every instruction and intrinsic of CUDA that the kernels use, each behind a function. No other header
// holds any. Under MPMA_EMULATE the same functions come from the tests' emulator.
//
// Conventions. Blocks have one dimension and whole warps. Functions of a warp are called by all 32 lanes together. An
// operation on a warp's data orders nothing in memory: put warp_barrier() or barrier() between a write to shared memory
// and another thread's read, and between a read and another thread's next write. There are no floating-point atomics.
#pragma once

#include "cuda/element.h"

#if defined(MPMA_EMULATE)

#include "emulator.h"  // in tests/cuda/emulator

#else

namespace mpma::cuda {

constexpr int kWarp = 32;

// --- Where a thread is -----------------------------------------------------------------------------------------------

MPMA_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
MPMA_DEVICE int thread_count() { return static_cast<int>(blockDim.x); }
MPMA_DEVICE int lane_index() { return static_cast<int>(threadIdx.x) % kWarp; }
// The same in every lane, and known to be by the compiler.
MPMA_DEVICE int warp_index() { return __shfl_sync(~0u, static_cast<int>(threadIdx.x) / kWarp, 0); }
MPMA_DEVICE int warp_count() { return static_cast<int>(blockDim.x) / kWarp; }
MPMA_DEVICE int64_t block_x() { return blockIdx.x; }
MPMA_DEVICE int64_t block_y() { return blockIdx.y; }
MPMA_DEVICE int64_t block_z() { return blockIdx.z; }
MPMA_DEVICE int64_t grid_x() { return gridDim.x; }
MPMA_DEVICE int64_t grid_y() { return gridDim.y; }
MPMA_DEVICE int64_t grid_z() { return gridDim.z; }

// --- Barriers and exchanges ------------------------------------------------------------------------------------------

MPMA_DEVICE void barrier() { __syncthreads(); }  // all threads of the block; orders memory
MPMA_DEVICE bool barrier_any(bool x) { return __syncthreads_or(x) != 0; }
MPMA_DEVICE void warp_barrier() { __syncwarp(); }  // all lanes of the warp; orders memory

// T: a 4- or 8-byte number.
template <class T>
MPMA_DEVICE T shuffle_xor(T x, int lanes) {
  return __shfl_xor_sync(~0u, x, lanes);
}
template <class T>
MPMA_DEVICE T shuffle(T x, int from_lane) {
  return __shfl_sync(~0u, x, from_lane);
}
template <class T>
MPMA_DEVICE T shuffle_up(T x, int lanes) {  // the first `lanes` lanes keep their own
  return __shfl_up_sync(~0u, x, lanes);
}
MPMA_DEVICE uint32_t ballot(bool x) { return __ballot_sync(~0u, x); }
MPMA_DEVICE bool warp_any(bool x) { return __any_sync(~0u, x) != 0; }
MPMA_DEVICE bool warp_all(bool x) { return __all_sync(~0u, x) != 0; }

// Of one integer of each lane, in every lane.
MPMA_DEVICE int32_t warp_sum(int32_t x) { return __reduce_add_sync(~0u, x); }
MPMA_DEVICE int32_t warp_minimum(int32_t x) { return __reduce_min_sync(~0u, x); }
MPMA_DEVICE int32_t warp_maximum(int32_t x) { return __reduce_max_sync(~0u, x); }

// Atomically adds to an integer in shared or global memory and returns what was there.
MPMA_DEVICE int32_t atomic_add(int32_t* at, int32_t x) { return atomicAdd(at, x); }

// --- Arithmetic ------------------------------------------------------------------------------------------------------

MPMA_DEVICE int popcount(uint32_t x) { return __popc(x); }
MPMA_DEVICE int lowest_bit(uint32_t x) { return __ffs(static_cast<int>(x)) - 1; }  // -1 for 0
MPMA_DEVICE int leading_zeros(uint32_t x) { return __clz(static_cast<int>(x)); }
MPMA_DEVICE uint32_t reverse_bits(uint32_t x) { return __brev(x); }
MPMA_DEVICE uint32_t float_bits(float x) { return __float_as_uint(x); }
MPMA_DEVICE float bits_float(uint32_t x) { return __uint_as_float(x); }

// Within 2 units in the last place; subnormal numbers count as 0.
MPMA_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
MPMA_DEVICE float log2_accurate(float x) { return log2f(x); }
MPMA_DEVICE float sqrt_rn(float x) { return __fsqrt_rn(x); }
MPMA_DEVICE float rsqrt_fast(float x) { return rsqrtf(x); }  // within 2 units in the last place
MPMA_DEVICE float divide_rn(float x, float y) { return __fdiv_rn(x, y); }

// Rounded once, to nearest even, and never contracted with a neighbour.
MPMA_DEVICE float fma_rn(float a, float b, float c) { return __fmaf_rn(a, b, c); }
MPMA_DEVICE float multiply_rn(float a, float b) { return __fmul_rn(a, b); }
MPMA_DEVICE float add_rn(float a, float b) { return __fadd_rn(a, b); }

// --- Conversions, rounded to nearest even ----------------------------------------------------------------------------

MPMA_DEVICE float to_float(float x) { return x; }
MPMA_DEVICE float to_float(Bfloat16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
MPMA_DEVICE float to_float(Half x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}

template <class T>
struct ConvertFrom;  // From a float, one at a time or two into one register, the first in the low half.
template <>
struct ConvertFrom<float> {
  MPMA_DEVICE static float one(float x) { return x; }
};
template <>
struct ConvertFrom<Bfloat16> {
  MPMA_DEVICE static uint32_t two(float low, float high) {
    uint32_t y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
  }
  MPMA_DEVICE static Bfloat16 one(float x) { return {static_cast<uint16_t>(two(x, 0.f))}; }
};
template <>
struct ConvertFrom<Half> {
  MPMA_DEVICE static uint32_t two(float low, float high) {
    uint32_t y;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
  }
  MPMA_DEVICE static Half one(float x) { return {static_cast<uint16_t>(two(x, 0.f))}; }
};

// To TF32: 10 bits of fraction, ties away from zero.
MPMA_DEVICE uint32_t to_tf32(float x) {
  uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
}

// --- Vector accesses: 8 or 16 aligned bytes at once ------------------------------------------------------------------

MPMA_DEVICE Bytes8 load_8(const void* from) { return *static_cast<const Bytes8*>(from); }
MPMA_DEVICE void store_8(void* to, const Bytes8& x) { *static_cast<Bytes8*>(to) = x; }
MPMA_DEVICE Bytes16 load_16(const void* from) { return *static_cast<const Bytes16*>(from); }
MPMA_DEVICE void store_16(void* to, const Bytes16& x) { *static_cast<Bytes16*>(to) = x; }

// --- Asynchronous copies to shared memory ----------------------------------------------------------------------------

// 16 bytes, both addresses 16-byte aligned; zeros where not `real`, and then the source is not read.
MPMA_DEVICE void cp_async_16(void* shared, const void* global, bool real) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
               "l"(global), "r"(real ? 16 : 0)
               : "memory");
}
// Closes this thread's group of copies, which may be empty.
MPMA_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most the kGroups last groups of this thread are under way. A barrier shows the rest to other threads.
template <int kGroups>
MPMA_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

// --- Tensor cores ----------------------------------------------------------------------------------------------------

// Four 8 x 8 matrices of 2-byte elements: lane i gives the 16-byte aligned address of row i % 8 of matrix i / 8, and gets,
// of matrix m, row lane / 4, columns 2 (lane % 4) and the next in r[m].
MPMA_DEVICE Registers4 ldmatrix(const void* row) {
  Registers4 m;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m.r[0]), "=r"(m.r[1]), "=r"(m.r[2]), "=r"(m.r[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
  return m;
}
// The same of the transposed matrices.
MPMA_DEVICE Registers4 ldmatrix_transposed(const void* row) {
  Registers4 m;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m.r[0]), "=r"(m.r[1]), "=r"(m.r[2]), "=r"(m.r[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
  return m;
}

// c += A B: A (16, depth), B (depth, 8), products exact and summed in float32. Depth 16 for the 2-byte types.
template <class T>
MPMA_DEVICE void mma(Sum& c, const Registers4& a, const Registers2& b);
#define MPMA_MMA_16(T, PTX)                                                                                      \
  template <>                                                                                                    \
  MPMA_DEVICE void mma<T>(Sum & c, const Registers4& a, const Registers2& b) {                                   \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." PTX "." PTX                                            \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                          \
                 : "+f"(c.value[0]), "+f"(c.value[1]), "+f"(c.value[2]), "+f"(c.value[3])                        \
                 : "r"(a.r[0]), "r"(a.r[1]), "r"(a.r[2]), "r"(a.r[3]), "r"(b.r[0]), "r"(b.r[1]));                \
  }
MPMA_MMA_16(Bfloat16, "bf16")
MPMA_MMA_16(Half, "f16")
#undef MPMA_MMA_16

// Depth 8, operands TF32. Lane's elements of A: rows lane / 4 (+ 8 in r[1], r[3]), depth lane % 4 (+ 4 in r[2], r[3]);
// of B: depth lane % 4 (+ 4 in r[1]), column lane / 4.
MPMA_DEVICE void mma_tf32(Sum& c, const Registers4& a, const Registers2& b) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};"
               : "+f"(c.value[0]), "+f"(c.value[1]), "+f"(c.value[2]), "+f"(c.value[3])
               : "r"(a.r[0]), "r"(a.r[1]), "r"(a.r[2]), "r"(a.r[3]), "r"(b.r[0]), "r"(b.r[1]));
}

}  // namespace mpma::cuda

#endif  // MPMA_EMULATE

namespace mpma::cuda {

template <class T>
MPMA_DEVICE T from_float(float x) {
  return ConvertFrom<T>::one(x);
}
// Two values in one register, the first in the low half: neighbours in memory.
template <class T>
MPMA_DEVICE uint32_t pack(float low, float high) {
  return ConvertFrom<T>::two(low, high);
}

}  // namespace mpma::cuda
