// Launching kernels, and what a device allows.
#pragma once

#include <stdexcept>
#include <string>

#include "cuda/machine.h"

#if !defined(MPMA_EMULATE)
#include <cuda_runtime.h>
#endif

namespace mpma::cuda {

// Every device from sm_80 on lets a block have at least this much shared memory (sm_86, sm_89 and sm_120 no more).
constexpr int kSharedMemoryFloor = 99 * 1024;

// Of the current device, asked once by the caller and handed to the launchers.
struct Device {
  int shared_memory = kSharedMemoryFloor;  // most bytes a block can have
  int multiprocessors = 1;
};

struct Grid {
  int64_t x = 1;  // up to 2^31 - 1
  int64_t y = 1;  // up to 65535, like z: long dimensions belong in x
  int64_t z = 1;

  bool empty() const { return x == 0 || y == 0 || z == 0; }
};

struct Launch {
  Grid grid;
  int threads;  // a multiple of 32, up to 1024
  int shared_bytes;
  void* stream;  // a cudaStream_t
};

// Whether rows can be copied 16 bytes at a time: the address and every stride (in elements) are multiples of 16 bytes.
template <class T, class... Strides>
bool aligned_rows(const T* data, Strides... strides) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && ((static_cast<int64_t>(strides) % kVector<T> == 0) && ...);
}

#if !defined(MPMA_EMULATE)
inline void check_cuda(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

inline Device current_device() {
  int index = 0;
  Device device;
  check_cuda(cudaGetDevice(&index), "cudaGetDevice");
  check_cuda(
      cudaDeviceGetAttribute(&device.shared_memory, cudaDevAttrMaxSharedMemoryPerBlockOptin, index),
      "cudaDeviceGetAttribute");
  check_cuda(
      cudaDeviceGetAttribute(&device.multiprocessors, cudaDevAttrMultiProcessorCount, index), "cudaDeviceGetAttribute");
  return device;
}
#endif

// launch<kernel>(how, arguments...) runs kernel(arguments...); an empty grid runs nothing. Throws std::runtime_error where
// the launch is refused. The arguments are converted to the kernel's parameter types.
template <auto kKernel, class... Arguments>
void launch(const Launch& how, const Arguments&... arguments) {
  if (how.grid.empty()) return;
  if (how.grid.x > 0x7FFFFFFF || how.grid.y > 65535 || how.grid.z > 65535)
    throw std::runtime_error(
        "a grid of " + std::to_string(how.grid.x) + " x " + std::to_string(how.grid.y) + " x " +
        std::to_string(how.grid.z) + " blocks is larger than a launch may be");
#if defined(MPMA_EMULATE)
  emulator_launch(
      __PRETTY_FUNCTION__, how.grid.x, how.grid.y, how.grid.z, how.threads, how.shared_bytes,
      [&]() __attribute__((no_sanitize("thread"))) { kKernel(arguments...); });
#else
  if (how.shared_bytes > 48 * 1024)
    check_cuda(
        cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, how.shared_bytes),
        "cudaFuncSetAttribute");
  const dim3 grid(
      static_cast<unsigned>(how.grid.x), static_cast<unsigned>(how.grid.y), static_cast<unsigned>(how.grid.z));
  kKernel<<<grid, how.threads, how.shared_bytes, static_cast<cudaStream_t>(how.stream)>>>(arguments...);
  check_cuda(cudaGetLastError(), "kernel launch");
#endif
}

}  // namespace mpma::cuda
