// Dynamic shared memory, handed out in typed pieces.
#pragma once

#include "cuda/machine.h"

namespace mpma::cuda {

// Hands out 16-byte aligned pieces one after the other. A kernel's pieces are listed once, in the constructor of a struct
// that takes a SharedMemory&: the kernel builds it with this_block(), the host with shared_bytes<Layout>(), so that
// what is launched with and what is used agree. A copy of a SharedMemory hands out the same memory a second time, for
// pieces that are never alive together.
class SharedMemory {
 public:
  // On the host only the size is wanted.
  static MPMA_HOST_DEVICE SharedMemory counting() { return SharedMemory(nullptr); }

  static MPMA_DEVICE SharedMemory this_block() {
#if defined(MPMA_EMULATE)
    return SharedMemory(shared_start());
#else
    extern __shared__ Bytes16 dynamic_shared_memory[];
    return SharedMemory(reinterpret_cast<char*>(dynamic_shared_memory));
#endif
  }

  template <class T>
  MPMA_HOST_DEVICE T* take(int count) {
    const int bytes = (count * static_cast<int>(sizeof(T)) + 15) / 16 * 16;
    const int at = bytes_;
    bytes_ += bytes;
#if defined(MPMA_EMULATE)
    // The emulator keeps the pieces apart, so that a step over the end of one is seen.
    return start_ ? static_cast<T*>(shared_piece(at, count * sizeof(T))) : nullptr;
#else
    return reinterpret_cast<T*>(start_ + at);
#endif
  }

  MPMA_HOST_DEVICE int bytes() const { return bytes_; }

 private:
  explicit MPMA_HOST_DEVICE SharedMemory(char* start) : start_(start) {}

  char* start_;
  int bytes_ = 0;
};

// The size of a layout of which the constructor takes (SharedMemory&, arguments...).
template <class Layout, class... Arguments>
int shared_bytes(const Arguments&... arguments) {
  SharedMemory memory = SharedMemory::counting();
  Layout layout(memory, arguments...);
  return memory.bytes();
}

}  // namespace mpma::cuda
