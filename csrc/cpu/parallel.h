// Loops over threads, and the memory that the threads work in.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <memory>
#include <new>

#include "cpu/simd.h"

namespace mpma::cpu {

// Uninitialised memory, aligned to a cache line.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t n) : data_(static_cast<T*>(::operator new(n * sizeof(T), kAlignment))) {}
  T* get() const { return data_.get(); }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(T* p) const { ::operator delete(p, kAlignment); }
  };
  std::unique_ptr<T, Free> data_;
};

// body(begin, end) on slices of [0, n), on PyTorch's threads, compiled for Isa; body must be an MPMA_INLINE lambda.
template <class Isa, class Body>
void parallel(int64_t n, const Body& body) {
  torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    Isa::run([&]() __attribute__((always_inline)) { body(begin, end); });
  });
}

}  // namespace mpma::cpu
