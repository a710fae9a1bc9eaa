// A CUDA machine on the host: the twins of csrc/cuda/machine.h. Kernels compiled with MPMA_EMULATE and
// -fsanitize=thread, and linked with emulator.cpp instead of libtsan, run here one thread at a time, and every load and
// store of theirs is checked. A violation ends the launch with std::runtime_error that says kernel, block, thread and what
// was wrong:
//   - an access outside the pieces of shared memory, outside the registered global memory, or a write to an input;
//   - a read of shared memory, or of an output, that nothing has written;
//   - a misaligned access, of the vector types too;
//   - two threads of a block that touch the same memory, one of them writing, with no barrier between them (of the block,
//     or of the warp if they share one); the target of an asynchronous copy before it was waited for;
//   - two blocks of a launch of which one writes what the other touches;
//   - a barrier or an operation of a warp that not all its threads reach, or that they reach as different ones.
// The order in which threads run between such points, and blocks after each other, is drawn from a seed.
//
// Tensor cores add as the A100's do (emulator.cpp says how), those of later chips somewhat more exactly.
//
// Not covered: what happens between blocks that run at the same time; memory order finer than barriers; whether all lanes
// come to an operation of the warp by the same instruction, as the tensor cores want it; bank conflicts, registers,
// occupancy and speed; wgmma, TMA and clusters; the rounding of the fast functions (here those of libm); contraction to
// fused multiply-adds (here none); accesses by memcpy, which the kernels do not use. Nor the host's side: streams and
// their order, the choice of the device, its limits, graph capture. The glue in the .cu files runs on CPU tensors
// (tests/cuda/glue_emulated.cpp), then without the checks of global memory.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "cuda/element.h"

namespace mpma::cuda {

constexpr int kWarp = 32;

struct Position {
  int thread, threads;
  int64_t block[3], grid[3];
};
extern Position emulator_position;  // of the thread that runs

inline __attribute__((no_sanitize("thread"))) int thread_index() { return emulator_position.thread; }
inline __attribute__((no_sanitize("thread"))) int thread_count() { return emulator_position.threads; }
inline int lane_index() { return thread_index() % kWarp; }
inline int warp_index() { return thread_index() / kWarp; }
inline int warp_count() { return thread_count() / kWarp; }
inline __attribute__((no_sanitize("thread"))) int64_t block_x() { return emulator_position.block[0]; }
inline __attribute__((no_sanitize("thread"))) int64_t block_y() { return emulator_position.block[1]; }
inline __attribute__((no_sanitize("thread"))) int64_t block_z() { return emulator_position.block[2]; }
inline __attribute__((no_sanitize("thread"))) int64_t grid_x() { return emulator_position.grid[0]; }
inline __attribute__((no_sanitize("thread"))) int64_t grid_y() { return emulator_position.grid[1]; }
inline __attribute__((no_sanitize("thread"))) int64_t grid_z() { return emulator_position.grid[2]; }

// Barriers and exchanges. The exchanges move 8 bytes.
void barrier();
bool barrier_any(bool x);
void warp_barrier();
uint64_t exchange_xor(uint64_t x, int lanes);
uint64_t exchange_from(uint64_t x, int lane);
uint64_t exchange_up(uint64_t x, int lanes);
uint32_t ballot(bool x);
inline bool warp_any(bool x) { return ballot(x) != 0; }
inline bool warp_all(bool x) { return ballot(x) == ~0u; }
int32_t atomic_add(int32_t* at, int32_t x);

template <class T>
uint64_t exchange_bits(T x) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "4- or 8-byte numbers");
  uint64_t bits = 0;
  std::memcpy(&bits, &x, sizeof x);
  return bits;
}
template <class T>
T exchange_value(uint64_t bits) {
  T x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
template <class T>
T shuffle_xor(T x, int lanes) {
  return exchange_value<T>(exchange_xor(exchange_bits(x), lanes));
}
template <class T>
T shuffle(T x, int from_lane) {
  return exchange_value<T>(exchange_from(exchange_bits(x), from_lane));
}
template <class T>
T shuffle_up(T x, int lanes) {
  return exchange_value<T>(exchange_up(exchange_bits(x), lanes));
}
template <class Combine>
int32_t exchange_all(int32_t x, const Combine& combine) {
  for (int lanes = 1; lanes < kWarp; lanes *= 2) x = combine(x, shuffle_xor(x, lanes));
  return x;
}
inline int32_t warp_sum(int32_t x) {
  return exchange_all(x, [](int32_t a, int32_t b) { return a + b; });
}
inline int32_t warp_minimum(int32_t x) {
  return exchange_all(x, [](int32_t a, int32_t b) { return a < b ? a : b; });
}
inline int32_t warp_maximum(int32_t x) {
  return exchange_all(x, [](int32_t a, int32_t b) { return a > b ? a : b; });
}

// Arithmetic.
inline int popcount(uint32_t x) { return __builtin_popcount(x); }
inline int lowest_bit(uint32_t x) { return __builtin_ffs(static_cast<int>(x)) - 1; }
inline int leading_zeros(uint32_t x) { return x ? __builtin_clz(x) : 32; }
inline uint32_t reverse_bits(uint32_t x) {
  uint32_t y = 0;
  for (int i = 0; i < 32; ++i) y |= (x >> i & 1) << (31 - i);
  return y;
}
inline uint32_t float_bits(float x) { return static_cast<uint32_t>(exchange_bits(x)); }
inline float bits_float(uint32_t x) { return exchange_value<float>(x); }

inline float exp2_fast(float x) { return std::exp2(x); }
inline float log2_accurate(float x) { return std::log2(x); }
inline float sqrt_rn(float x) { return std::sqrt(x); }
inline float rsqrt_fast(float x) { return 1.f / std::sqrt(x); }
inline float divide_rn(float x, float y) { return x / y; }
inline float fma_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float multiply_rn(float a, float b) { return a * b; }
inline float add_rn(float a, float b) { return a + b; }

// Conversions.
uint16_t float_to_half(float x);
float half_to_float(uint16_t x);

inline uint16_t float_to_bfloat16(float x) {
  const uint32_t bits = float_bits(x);
  if ((bits & 0x7FFFFFFF) > 0x7F800000) return 0x7FFF;
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

inline float to_float(float x) { return x; }
inline float to_float(Bfloat16 x) { return bits_float(static_cast<uint32_t>(x.bits) << 16); }
inline float to_float(Half x) { return half_to_float(x.bits); }

template <class T>
struct ConvertFrom;
template <>
struct ConvertFrom<float> {
  static float one(float x) { return x; }
};
template <>
struct ConvertFrom<Bfloat16> {
  static Bfloat16 one(float x) { return {float_to_bfloat16(x)}; }
  static uint32_t two(float low, float high) {
    return float_to_bfloat16(low) | static_cast<uint32_t>(float_to_bfloat16(high)) << 16;
  }
};
template <>
struct ConvertFrom<Half> {
  static Half one(float x) { return {float_to_half(x)}; }
  static uint32_t two(float low, float high) {
    return float_to_half(low) | static_cast<uint32_t>(float_to_half(high)) << 16;
  }
};

inline uint32_t to_tf32(float x) {
  const uint32_t bits = float_bits(x);
  return (bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FFFFFFF : (bits + 0x1000) & ~0x1FFFu;
}

// Vector accesses. Not inline, because the compiler would take them apart and the alignment would go unchecked.
Bytes8 load_8(const void* from);
void store_8(void* to, const Bytes8& x);
Bytes16 load_16(const void* from);
void store_16(void* to, const Bytes16& x);

// Asynchronous copies.
void cp_async_16(void* shared, const void* global, bool real);
void cp_async_commit();
void cp_async_wait_groups(int groups);
template <int kGroups>
void cp_async_wait() {
  cp_async_wait_groups(kGroups);
}

// Tensor cores.
Registers4 ldmatrix(const void* row);
Registers4 ldmatrix_transposed(const void* row);
template <class T>
void mma(Sum& c, const Registers4& a, const Registers2& b);  // Bfloat16, Half
void mma_tf32(Sum& c, const Registers4& a, const Registers2& b);

// What SharedMemory and launch() stand on. Pieces lie apart by their own size.
char* shared_start();
void* shared_piece(int offset, size_t bytes);
void emulator_run(
    const char* name, int64_t x, int64_t y, int64_t z, int threads, int shared_bytes, void (*body)(const void*),
    const void* closure);
template <class Body>
void emulator_launch(
    const char* name, int64_t x, int64_t y, int64_t z, int threads, int shared_bytes, const Body& body) {
  emulator_run(
      name, x, y, z, threads, shared_bytes,
      [](const void* closure) __attribute__((no_sanitize("thread"))) { (*static_cast<const Body*>(closure))(); }, &body);
}

}  // namespace mpma::cuda

// The emulated global memory, for the tests: see tests/cuda/emulation.py.
extern "C" {
void* mpma_emulator_allocate(int64_t bytes, int kind);  // 0: an input, read only; 1: to be written first; 2: written
void mpma_emulator_free(void* memory);
void mpma_emulator_take_host_memory();  // from now on kernels may touch what is not allocated above: aligned or not is all
                                        // that is checked of it
void mpma_emulator_seed(uint64_t seed);
}
