// The max form of token-patch similarity on the CPU: arguments from PyTorch, results back.

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu/similarity_arguments.h"

namespace mpma {

// One side in the backward: its rows, what they chose on the other side and the gradient of their means, by pair.
template <class T>
struct MaxSide {
  const cpu::RealRows<T>& rows;
  const int32_t* index;  // [pair][position]
  const T* grad;
  int64_t step;  // pairs from one item to the next
  std::vector<int64_t> row_of_position;

  MaxSide(const cpu::RealRows<T>& rows, const cpu::Tensor& index, const cpu::Tensor& grad, int64_t step)
      : rows(rows), index(index.const_data_ptr<int32_t>()), grad(grad.const_data_ptr<T>()), step(step),
        row_of_position(rows.row_of_position()) {}

  // The row at a position of item i.
  int64_t row_at(int64_t i, int32_t position) const { return row_of_position[i * rows.length + position]; }
};

}  // namespace mpma

#define MPMA_ISA_BODY "cpu/token_patch_max_similarity_core.h"
#include "cpu/foreach_isa.h"

namespace mpma::cpu {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> token_patch_max_similarity(
    const Tensor& tokens, const Tensor& patches, const std::optional<Tensor>& token_mask,
    const std::optional<Tensor>& patch_mask) {
  check_operands(tokens, patches, token_mask, patch_mask);
  const int64_t reports = tokens.size(0), images = patches.size(0);
  const ScalarType type = compute_type(tokens);
  const Tensor tokens_to_patches = torch::stable::new_empty(tokens, {reports, images}, type);
  const Tensor patches_to_tokens = torch::stable::new_empty(tokens, {reports, images}, type);
  const Tensor patch_index = torch::stable::new_empty(tokens, {reports, images, tokens.size(1)}, ScalarType::Int);
  const Tensor token_index = torch::stable::new_empty(tokens, {reports, images, patches.size(1)}, ScalarType::Int);
  const auto run = [&](auto number, auto forward) {
    using T = decltype(number);
    const int64_t stride = portable::padded(tokens.size(2));
    forward(
        RealRows<T>(tokens, token_mask, stride), RealRows<T>(patches, patch_mask, stride),
        tokens_to_patches.mutable_data_ptr<T>(), patches_to_tokens.mutable_data_ptr<T>(),
        patch_index.mutable_data_ptr<int32_t>(), token_index.mutable_data_ptr<int32_t>());
  };
  if (type == ScalarType::Double)
    run(double{}, &portable::max_similarity::forward<double>);
  else
    run(float{}, MPMA_FASTEST(max_similarity::forward<float>, is_bfloat16(tokens)));
  return {tokens_to_patches, patches_to_tokens, patch_index, token_index};
}

void check_index(const Tensor& index, const Tensor& grad, const Tensor& own, const Tensor& other, const char* name) {
  STD_TORCH_CHECK(
      index.scalar_type() == ScalarType::Int && index.dim() == 3 && index.size(0) == grad.size(0) &&
          index.size(1) == grad.size(1) && index.size(2) == own.size(1),
      name, ": expected int32 (reports, images, rows)");
  const int32_t* numbers = index.const_data_ptr<int32_t>();
  const int64_t rows = std::max<int64_t>(1, other.size(1));  // without any, the index is 0 and unused
  STD_TORCH_CHECK(
      std::all_of(numbers, numbers + index.numel(), [&](int32_t i) { return i >= 0 && i < rows; }), name,
      ": expected numbers of rows of the other operand");
}

std::tuple<Tensor, Tensor> token_patch_max_similarity_backward(
    const Tensor& grad_tokens_to_patches, const Tensor& grad_patches_to_tokens, const Tensor& tokens,
    const Tensor& patches, const std::optional<Tensor>& token_mask, const std::optional<Tensor>& patch_mask,
    const Tensor& patch_index, const Tensor& token_index, bool need_tokens, bool need_patches) {
  check_operands(tokens, patches, token_mask, patch_mask);
  const Tensor grad_of_tokens = readable_gradient(grad_tokens_to_patches, tokens, patches);
  const Tensor grad_of_patches = readable_gradient(grad_patches_to_tokens, tokens, patches);
  const Tensor patch = torch::stable::contiguous(patch_index), token = torch::stable::contiguous(token_index);
  check_index(patch, grad_of_tokens, tokens, patches, "patch_index");
  check_index(token, grad_of_patches, patches, tokens, "token_index");
  const auto run = [&](auto number, auto backward) -> std::tuple<Tensor, Tensor> {
    using T = decltype(number);
    const int64_t stride = portable::padded(tokens.size(2));
    const RealRows<T> w(tokens, token_mask, stride), v(patches, patch_mask, stride);
    const MaxSide<T> of_tokens(w, patch, grad_of_tokens, v.items), of_patches(v, token, grad_of_patches, 1);
    const Tensor grad_w = need_tokens ? w.empty(tokens) : not_needed(tokens);
    const Tensor grad_v = need_patches ? v.empty(patches) : not_needed(patches);
    if (need_tokens) backward(of_tokens, of_patches, grad_w.mutable_data_ptr<T>());
    if (need_patches) backward(of_patches, of_tokens, grad_v.mutable_data_ptr<T>());
    return {
        need_tokens ? w.scatter(grad_w, tokens) : grad_w, need_patches ? v.scatter(grad_v, patches) : grad_v};
  };
  if (compute_type(tokens) == ScalarType::Double) return run(double{}, &portable::max_similarity::backward<double>);
  return run(float{}, MPMA_FASTEST(max_similarity::backward<float>, is_bfloat16(tokens)));
}

}  // namespace
}  // namespace mpma::cpu

STABLE_TORCH_LIBRARY_IMPL(mpma, CPU, m) {
  m.impl("token_patch_max_similarity", TORCH_BOX(&mpma::cpu::token_patch_max_similarity));
  m.impl("token_patch_max_similarity_backward", TORCH_BOX(&mpma::cpu::token_patch_max_similarity_backward));
}
