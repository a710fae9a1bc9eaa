// What the glue of token-patch similarity checks before it launches anything. Python has checked the arguments and named
// what is wrong with them; this guards the memory.
#pragma once

#include <optional>
#include <vector>

#include "cuda/tensors.h"

namespace mpma::cuda {

using Mask = std::optional<Tensor>;

inline void check_mask(const Mask& mask, const Tensor& of, const char* name) {
  STD_TORCH_CHECK(
      !mask || (mask->scalar_type() == ScalarType::Bool && mask->dim() == 2 && mask->size(0) == of.size(0) &&
                mask->size(1) == of.size(1) && mask->is_cuda() && mask->get_device_index() == of.get_device_index()),
      name, ": expected a bool tensor (items, rows) on the device of its rows");
}

inline void check_operands(
    const Tensor& tokens, const Tensor& patches, const Mask& token_mask, const Mask& patch_mask) {
  STD_TORCH_CHECK(
      tokens.dim() == 3 && patches.dim() == 3 && tokens.size(2) == patches.size(2) && tokens.is_cuda() &&
          patches.is_cuda() && tokens.get_device_index() == patches.get_device_index() &&
          tokens.scalar_type() == patches.scalar_type(),
      "tokens and patches: expected CUDA tensors (reports, T, D) and (images, P, D) of one device and dtype");
  check_mask(token_mask, tokens, "token_mask");
  check_mask(patch_mask, patches, "patch_mask");
}

// The gradient of a result (reports, images), any strides.
inline void check_gradient(const Tensor& grad, const Tensor& tokens, const Tensor& patches) {
  STD_TORCH_CHECK(
      grad.dim() == 2 && grad.size(0) == tokens.size(0) && grad.size(1) == patches.size(0) && grad.is_cuda() &&
          grad.get_device_index() == tokens.get_device_index() && grad.scalar_type() == ScalarType::Float,
      "gradient of a similarity: expected a float32 tensor (reports, images) on the device of the operands");
}

// Memory for the gradient of an operand, empty where it is not needed.
inline Tensor empty_gradient(const Tensor& of, bool needed) {
  std::vector<int64_t> shape = {0};
  if (needed) shape.assign(of.sizes().begin(), of.sizes().end());
  return torch::stable::new_empty(of, shape, of.scalar_type());
}

}  // namespace mpma::cuda
