// Kernels with one fault each, and beside each the same without it. Every fault has a result that is used, or the
// optimiser would remove it.
#include "cuda/launch.h"
#include "cuda/shared_memory.h"
#include "cuda/tiles.h"
#include "emulation.h"

namespace mpma::cuda {

struct Words {
  int32_t* data;
  explicit MPMA_HOST_DEVICE Words(SharedMemory& memory) : data(memory.take<int32_t>(256)) {}
};

MPMA_DEVICE int32_t* words() {
  SharedMemory memory = SharedMemory::this_block();
  return Words(memory).data;
}

// input and output: 128 words, and `fault` says whether to go wrong.
#define MPMA_CASE(NAME, THREADS, BLOCKS, BODY)                                                                  \
  MPMA_KERNEL(128, 1) NAME##_kernel(const int32_t* input, int32_t* output, int fault) {                         \
    const int t = thread_index();                                                                               \
    BODY                                                                                                        \
  }                                                                                                             \
  extern "C" const char* NAME(const void* input, void* output, int64_t fault) {                                 \
    return emulated([&] {                                                                                       \
      launch<NAME##_kernel>(                                                                                    \
          Launch{{BLOCKS}, THREADS, shared_bytes<Words>(), nullptr}, static_cast<const int32_t*>(input),        \
          static_cast<int32_t*>(output), static_cast<int>(fault));                                              \
    });                                                                                                         \
  }

MPMA_CASE(global_read_outside, 128, 1, output[t] = input[t + fault];)
MPMA_CASE(global_write_outside, 128, 1, output[t + fault] = input[t];)
MPMA_CASE(read_of_host_memory, 128, 1, {
  const int32_t* from = fault ? reinterpret_cast<const int32_t*>(0x10000) : input;
  output[t] = from[t];
})
MPMA_CASE(write_to_input, 128, 1, {
  output[t] = input[t];
  if (fault) const_cast<int32_t*>(input)[t] = t;
})
MPMA_CASE(output_read_before_written, 128, 1, {
  if (!fault) output[t] = t;
  output[t] += input[t];
})
MPMA_CASE(shared_outside, 128, 1, {
  int32_t* shared = words();
  shared[t + 129 * fault] = input[t];
  output[t] = shared[t + 129 * fault];
})
MPMA_CASE(shared_never_written, 128, 1, {
  int32_t* shared = words();
  if (t != 5 || !fault) shared[t] = input[t];
  barrier();
  output[t] = shared[127 - t];
})
MPMA_CASE(more_shared_than_launched, 128, 1, {
  SharedMemory memory = SharedMemory::this_block();
  int32_t* shared = memory.take<int32_t>(256 + 4 * fault);
  shared[t] = input[t];
  output[t] = shared[t];
})
MPMA_CASE(misaligned_vector, 32, 1, {
  const Bytes16 x = load_16(input + (fault ? 2 : 4) * t);
  output[t] = static_cast<int32_t>(x.word[0] + x.word[3]);
})
MPMA_CASE(race_in_block, 128, 1, {
  int32_t* shared = words();
  shared[t] = 0;
  barrier();
  shared[t] = input[t];
  if (!fault) barrier();
  output[t] = shared[127 - t];
})
MPMA_CASE(race_in_warp, 32, 1, {
  int32_t* shared = words();
  shared[t] = 0;
  warp_barrier();
  shared[t] = input[t];
  if (!fault) warp_barrier();
  output[t] = shared[31 - t];
})
MPMA_CASE(overwritten_while_read, 128, 1, {
  int32_t* shared = words();
  shared[t] = input[t];
  barrier();
  const int32_t x = shared[127 - t];
  if (!fault) barrier();
  shared[t] = x + 1;
  output[t] = shared[t];
})
// A barrier of each warp does not order different warps.
MPMA_CASE(warp_barrier_for_a_block, 128, 1, {
  int32_t* shared = words();
  shared[t] = 0;
  barrier();
  shared[t] = input[t];
  fault ? warp_barrier() : barrier();
  output[t] = shared[t ^ 32];
})
MPMA_CASE(shuffle_as_a_barrier, 32, 1, {
  int32_t* shared = words();
  shared[t] = 0;
  warp_barrier();
  shared[t] = input[t];
  const int32_t x = shuffle_xor(t, 1);
  if (!fault) warp_barrier();
  output[t] = shared[31 - t] + x;
})
MPMA_CASE(copy_not_waited_for, 32, 1, {
  int32_t* shared = words();
  cp_async_16(shared + 4 * t, input + 4 * t, true);
  cp_async_commit();
  if (fault)
    cp_async_wait<1>();
  else
    cp_async_wait<0>();
  output[t] = shared[4 * t];
  cp_async_wait<0>();
})
MPMA_CASE(copy_without_barrier, 32, 1, {
  int32_t* shared = words();
  shared[4 * t] = 0;
  warp_barrier();
  cp_async_16(shared + 4 * t, input + 4 * t, true);
  cp_async_commit();
  cp_async_wait<0>();
  if (!fault) warp_barrier();
  output[t] = shared[4 * (31 - t)];
})
MPMA_CASE(copy_onto_what_is_read, 32, 1, {
  int32_t* shared = words();
  for (int i = 0; i < 4; ++i) shared[4 * t + i] = input[4 * t + i];
  warp_barrier();
  output[t] = shared[4 * (31 - t)];
  if (!fault) warp_barrier();
  cp_async_16(shared + 4 * t, input + 4 * t, true);
  cp_async_commit();
  cp_async_wait<0>();
})
MPMA_CASE(copy_never_waited_for, 32, 1, {
  cp_async_16(words() + 4 * t, input + 4 * t, true);
  cp_async_commit();
  if (!fault) cp_async_wait<0>();
  output[t] = t;
})
MPMA_CASE(copy_from_outside, 32, 1, {
  int32_t* shared = words();
  cp_async_16(shared + 4 * t, input + 4 * t + 4 * fault, true);
  cp_async_commit();
  cp_async_wait<0>();
  output[t] = shared[4 * t];
})
MPMA_CASE(barrier_not_by_all, 128, 1, {
  output[t] = input[t];
  if (!fault || t != 77) barrier();
})
MPMA_CASE(shuffle_not_by_all, 32, 1, {
  int32_t x = input[t];
  if (!fault || t != 7) x = shuffle_xor(x, 1);
  output[t] = x;
})
MPMA_CASE(different_operations_of_a_warp, 32, 1, {
  output[t] = fault && t == 7 ? static_cast<int32_t>(ballot(true)) : shuffle_xor(input[t], 1);
})
MPMA_CASE(ldmatrix_misaligned, 32, 1, {
  int32_t* shared = words();
  for (int i = 0; i < 8; ++i) shared[8 * t + i] = input[t];
  warp_barrier();
  output[t] = static_cast<int32_t>(ldmatrix(shared + 4 * t + 2 * fault).r[0]);
})
MPMA_CASE(two_blocks_write, 32, 2, { output[fault ? t : 32 * block_x() + t] = input[t]; })
MPMA_CASE(reads_another_block, 32, 2, {
  output[32 * block_x() + t] = input[t];
  output[64 + 32 * block_x() + t] = output[32 * (fault ? 1 - block_x() : block_x()) + t];
})
MPMA_CASE(atomics_and_reads, 128, 1, {
  int32_t* shared = words();
  if (t < 4) shared[t] = 0;
  barrier();
  atomic_add(shared + t % 4, input[t]);
  if (!fault) barrier();
  output[t] = shared[t % 4];
})
// Pieces that are never alive together may share memory; each still ends where it ends.
MPMA_CASE(pieces_that_share_memory, 128, 1, {
  SharedMemory memory = SharedMemory::this_block();
  SharedMemory again = memory;
  int32_t* first = memory.take<int32_t>(128);
  int16_t* second = again.take<int16_t>(128);
  first[t] = input[t];
  barrier();
  const int32_t x = first[127 - t];
  if (!fault) barrier();
  second[t] = static_cast<int16_t>(x);
  barrier();
  output[t] = second[127 - t];
})

}  // namespace mpma::cuda
