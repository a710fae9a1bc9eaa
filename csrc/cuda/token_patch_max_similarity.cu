// The max form of token-patch similarity on CUDA: arguments from PyTorch, results back.

#include <tuple>

#include "cuda/similarity_arguments.h"
#include "cuda/token_patch_max_similarity_backward.h"
#include "cuda/token_patch_max_similarity_forward.h"

namespace mpma::cuda::max_similarity {
namespace {

void check_sizes(const Tensor& tokens, const Tensor& patches) {
  constexpr int64_t kMost = 1 << 30;  // positions are 32-bit numbers
  STD_TORCH_CHECK(
      tokens.size(1) < kMost && patches.size(1) < kMost && tokens.size(2) < kMost,
      "tokens and patches: the CUDA kernels take less than 2^30 rows an item and features");
}

void check_index(
    const Tensor& index, const Tensor& tokens, const Tensor& patches, const Tensor& own, const char* name) {
  STD_TORCH_CHECK(
      index.scalar_type() == ScalarType::Int && index.dim() == 3 && index.size(0) == tokens.size(0) &&
          index.size(1) == patches.size(0) && index.size(2) == own.size(1) && index.is_cuda() &&
          index.get_device_index() == tokens.get_device_index(),
      name, ": expected int32 (reports, images, rows) on the device of the operands");
}

template <class T>
Side<T> side_of(const Tensor& rows, const Mask& mask) {
  return {
      static_cast<const T*>(rows.const_data_ptr()), rows.stride(0), rows.stride(1),
      mask ? static_cast<const bool*>(mask->const_data_ptr()) : nullptr, mask ? mask->stride(0) : 0,
      mask ? mask->stride(1) : 0, rows.size(0), static_cast<int>(rows.size(1))};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> token_patch_max_similarity(
    const Tensor& tokens, const Tensor& patches, const Mask& token_mask, const Mask& patch_mask) {
  check_operands(tokens, patches, token_mask, patch_mask);
  check_sizes(tokens, patches);
  const DeviceGuard guard(tokens.get_device_index());
  const std::vector<int64_t> pairs = {tokens.size(0), patches.size(0)};
  const std::vector<int64_t> by_token = {pairs[0], pairs[1], tokens.size(1)};
  const std::vector<int64_t> by_patch = {pairs[0], pairs[1], patches.size(1)};
  const Tensor to_patches = torch::stable::new_empty(tokens, pairs, ScalarType::Float);
  const Tensor to_tokens = torch::stable::new_empty(tokens, pairs, ScalarType::Float);
  const Tensor patch_index = torch::stable::new_empty(tokens, by_token, ScalarType::Int);
  const Tensor token_index = torch::stable::new_empty(tokens, by_patch, ScalarType::Int);
  std::optional<Tensor> of_patch;
  if (several_row_tiles(tokens.size(1))) of_patch = torch::stable::new_empty(tokens, by_patch, ScalarType::Float);
  by_type(tokens, [&](auto element) {
    using T = decltype(element);
    const Tensor w = readable(tokens), v = readable(patches);
    ForwardArguments<T> g = {};
    g.tokens = side_of<T>(w, token_mask);
    g.patches = side_of<T>(v, patch_mask);
    g.width = static_cast<int>(tokens.size(2));
    g.to_patches = static_cast<float*>(to_patches.mutable_data_ptr());
    g.to_tokens = static_cast<float*>(to_tokens.mutable_data_ptr());
    g.patch_index = static_cast<int32_t*>(patch_index.mutable_data_ptr());
    g.token_index = static_cast<int32_t*>(token_index.mutable_data_ptr());
    g.of_patch = of_patch ? static_cast<float*>(of_patch->mutable_data_ptr()) : nullptr;
    launch_forward<T>(g, current_stream(tokens));
  });
  return {to_patches, to_tokens, patch_index, token_index};
}

std::tuple<Tensor, Tensor> token_patch_max_similarity_backward(
    const Tensor& grad_tokens_to_patches, const Tensor& grad_patches_to_tokens, const Tensor& tokens,
    const Tensor& patches, const Mask& token_mask, const Mask& patch_mask, const Tensor& patch_index,
    const Tensor& token_index, bool need_tokens, bool need_patches) {
  check_operands(tokens, patches, token_mask, patch_mask);
  check_sizes(tokens, patches);
  const int64_t reports = tokens.size(0), images = patches.size(0);
  check_gradient(grad_tokens_to_patches, tokens, patches);
  check_gradient(grad_patches_to_tokens, tokens, patches);
  check_index(patch_index, tokens, patches, tokens, "patch_index");
  check_index(token_index, tokens, patches, patches, "token_index");
  const DeviceGuard guard(tokens.get_device_index());
  const Tensor grad_tokens = empty_gradient(tokens, need_tokens), grad_patches = empty_gradient(patches, need_patches);
  if (!need_tokens && !need_patches) return {grad_tokens, grad_patches};
  const Tensor grad_to_patches = torch::stable::contiguous(grad_tokens_to_patches);
  const Tensor grad_to_tokens = torch::stable::contiguous(grad_patches_to_tokens);
  const Tensor patch = torch::stable::contiguous(patch_index), token = torch::stable::contiguous(token_index);
  const Tensor workspace =
      torch::stable::new_empty(tokens, {backward_workspace(reports, images)}, ScalarType::Float);
  by_type(tokens, [&](auto element) {
    using T = decltype(element);
    const Tensor w = readable(tokens), v = readable(patches);
    BackwardArguments<T> g = {};
    g.tokens = side_of<T>(w, token_mask);
    g.patches = side_of<T>(v, patch_mask);
    g.width = static_cast<int>(tokens.size(2));
    g.grad_to_patches = static_cast<const float*>(grad_to_patches.const_data_ptr());
    g.grad_to_tokens = static_cast<const float*>(grad_to_tokens.const_data_ptr());
    g.patch_index = static_cast<const int32_t*>(patch.const_data_ptr());
    g.token_index = static_cast<const int32_t*>(token.const_data_ptr());
    g.workspace = static_cast<float*>(workspace.mutable_data_ptr());
    g.grad_tokens = need_tokens ? static_cast<T*>(grad_tokens.mutable_data_ptr()) : nullptr;
    g.grad_patches = need_patches ? static_cast<T*>(grad_patches.mutable_data_ptr()) : nullptr;
    launch_backward<T>(g, current_device(), current_stream(tokens));
  });
  return {grad_tokens, grad_patches};
}

}  // namespace
}  // namespace mpma::cuda::max_similarity

STABLE_TORCH_LIBRARY_IMPL(mpma, CUDA, m) {
  m.impl("token_patch_max_similarity", TORCH_BOX(&mpma::cuda::max_similarity::token_patch_max_similarity));
  m.impl(
      "token_patch_max_similarity_backward",
      TORCH_BOX(&mpma::cuda::max_similarity::token_patch_max_similarity_backward));
}
