// Global memory for what lies between an operator's kernels, handed out in typed pieces.
#pragma once

#include <cstdint>

namespace mpma::cuda {

// Like SharedMemory on the host: a constructor that takes its pieces from a Workspace& serves to count them, with no
// memory, and to place them.
class Workspace {
 public:
  Workspace() = default;
  explicit Workspace(void* start) : start_(static_cast<char*>(start)) {}

  template <class T>
  T* take(int64_t count) {
    const int64_t at = bytes_;
    bytes_ += (count * static_cast<int64_t>(sizeof(T)) + 255) / 256 * 256;
    return start_ ? reinterpret_cast<T*>(start_ + at) : nullptr;
  }

  int64_t bytes() const { return bytes_; }

 private:
  char* start_ = nullptr;
  int64_t bytes_ = 0;
};

}  // namespace mpma::cuda
