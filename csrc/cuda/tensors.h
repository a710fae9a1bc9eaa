// What every operator's glue asks of PyTorch's tensors.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "cuda/element.h"

namespace mpma::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;

inline void* current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return stream;
}

// f(an element) for the element type of a tensor.
template <class F>
void by_type(const Tensor& tensor, const F& f) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return f(float{});
    case ScalarType::BFloat16: return f(Bfloat16{});
    case ScalarType::Half: return f(Half{});
    default: STD_TORCH_CHECK(false, "the CUDA kernels serve float32, bfloat16 and float16");
  }
}

// Rows, along the last dimension, are read in place where their elements lie side by side, and 16 bytes at a time where
// they are aligned. Rows that a copy would align are copied.
inline Tensor readable(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1, size = tensor.element_size();
  if (tensor.numel() == 0) return tensor;
  bool in_place = tensor.stride(last) == 1 || tensor.size(last) < 2;
  if (tensor.size(last) * size % 16 == 0) {
    in_place = in_place && reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0;
    for (int64_t i = 0; i < last; ++i) in_place = in_place && (tensor.size(i) < 2 || tensor.stride(i) * size % 16 == 0);
  }
  return in_place ? tensor : torch::stable::contiguous(tensor);
}

}  // namespace mpma::cuda
