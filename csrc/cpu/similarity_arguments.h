// What both forms of token-patch similarity check and prepare. Python has checked the arguments and named what is wrong
// with them; this guards the memory.
#pragma once

#include "cpu/real_rows.h"

namespace mpma::cpu {

inline void check_mask(const std::optional<Tensor>& mask, const Tensor& of, const char* name) {
  STD_TORCH_CHECK(
      !mask || (mask->scalar_type() == ScalarType::Bool && mask->dim() == 2 && mask->size(0) == of.size(0) &&
                mask->size(1) == of.size(1) && mask->is_cpu()),
      name, ": expected a bool CPU tensor (items, rows)");
}

inline void check_operands(
    const Tensor& tokens, const Tensor& patches, const std::optional<Tensor>& token_mask,
    const std::optional<Tensor>& patch_mask) {
  STD_TORCH_CHECK(
      tokens.dim() == 3 && patches.dim() == 3 && tokens.size(2) == patches.size(2) && tokens.is_cpu() &&
          patches.is_cpu() && tokens.scalar_type() == patches.scalar_type(),
      "tokens and patches: expected CPU tensors (reports, T, D) and (images, P, D) of one dtype");
  check_mask(token_mask, tokens, "token_mask");
  check_mask(patch_mask, patches, "patch_mask");
}

// The gradient of a result (reports, images), to be read in one piece.
inline Tensor readable_gradient(const Tensor& grad, const Tensor& tokens, const Tensor& patches) {
  STD_TORCH_CHECK(
      grad.dim() == 2 && grad.size(0) == tokens.size(0) && grad.size(1) == patches.size(0) && grad.is_cpu() &&
          grad.scalar_type() == compute_type(tokens),
      "gradient of a similarity: expected a CPU tensor (reports, images), float64 for float64 operands, else float32");
  return torch::stable::contiguous(grad);
}

inline Tensor not_needed(const Tensor& operand) {
  return torch::stable::new_empty(operand, {0}, operand.scalar_type());
}

}  // namespace mpma::cpu
