// Memory that kernels work in.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace mpma::cpu {

// Uninitialised, aligned to a cache line.
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

}  // namespace mpma::cpu
