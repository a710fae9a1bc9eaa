// The softmax form of token-patch similarity on CUDA: arguments from PyTorch, results back.

#include <tuple>

#include "cuda/similarity_arguments.h"
#include "cuda/token_patch_similarity.h"

namespace mpma::cuda {
namespace {

// Workspace beside what grows with the operands alone. The forward's scores stay in the second-level cache.
constexpr int64_t kForwardWorkspace = int64_t{48} << 20, kBackwardWorkspace = int64_t{256} << 20;

template <class T>
FeatureRows<T> rows_of(const Tensor& rows, const Mask& mask) {
  const RealMask real = {
      mask ? static_cast<const uint8_t*>(mask->const_data_ptr()) : nullptr, mask ? mask->stride(0) : 0,
      mask ? mask->stride(1) : 0};
  return {
      static_cast<const T*>(rows.const_data_ptr()), rows.size(0), rows.size(1), rows.size(2), rows.stride(0),
      rows.stride(1), rows.stride(2), real};
}

template <class T>
SimilarityProblem<T> problem_of(
    const Tensor& tokens, const Tensor& patches, const Mask& token_mask, const Mask& patch_mask,
    double attention_temperature, double pooling_temperature, int64_t workspace_limit) {
  return {
      rows_of<T>(tokens, token_mask), rows_of<T>(patches, patch_mask), static_cast<float>(attention_temperature),
      static_cast<float>(pooling_temperature), workspace_limit};
}

// Given back to the allocator when it goes out of scope, which keeps it for later launches on the same stream.
template <class T>
Tensor workspace_for(const Tensor& like, const SimilarityProblem<T>& problem, bool backward) {
  return torch::stable::new_empty(like, {similarity_workspace(problem, backward)}, ScalarType::Byte);
}

Tensor token_patch_similarity(
    const Tensor& tokens, const Tensor& patches, const Mask& token_mask, const Mask& patch_mask,
    double attention_temperature, double pooling_temperature) {
  check_operands(tokens, patches, token_mask, patch_mask);
  const DeviceGuard guard(tokens.get_device_index());
  const Tensor out = torch::stable::new_empty(tokens, {tokens.size(0), patches.size(0)}, ScalarType::Float);
  by_type(tokens, [&](auto element) {
    const auto problem = problem_of<decltype(element)>(
        tokens, patches, token_mask, patch_mask, attention_temperature, pooling_temperature, kForwardWorkspace);
    const Tensor workspace = workspace_for(tokens, problem, false);
    launch_similarity_forward(
        problem, workspace.mutable_data_ptr(), static_cast<float*>(out.mutable_data_ptr()), current_stream(tokens));
  });
  return out;
}

std::tuple<Tensor, Tensor> token_patch_similarity_backward(
    const Tensor& grad_output, const Tensor& tokens, const Tensor& patches, const Mask& token_mask,
    const Mask& patch_mask, double attention_temperature, double pooling_temperature, bool need_tokens,
    bool need_patches) {
  check_operands(tokens, patches, token_mask, patch_mask);
  check_gradient(grad_output, tokens, patches);
  const DeviceGuard guard(tokens.get_device_index());
  const Tensor grad_tokens = empty_gradient(tokens, need_tokens), grad_patches = empty_gradient(patches, need_patches);
  if (!need_tokens && !need_patches) return {grad_tokens, grad_patches};
  by_type(tokens, [&](auto element) {
    using T = decltype(element);
    const auto problem = problem_of<T>(
        tokens, patches, token_mask, patch_mask, attention_temperature, pooling_temperature, kBackwardWorkspace);
    const Tensor workspace = workspace_for(tokens, problem, true);
    launch_similarity_backward(
        problem, workspace.mutable_data_ptr(), static_cast<const float*>(grad_output.const_data_ptr()),
        grad_output.stride(0), grad_output.stride(1),
        need_tokens ? static_cast<T*>(grad_tokens.mutable_data_ptr()) : nullptr,
        need_patches ? static_cast<T*>(grad_patches.mutable_data_ptr()) : nullptr, current_stream(tokens));
  });
  return {grad_tokens, grad_patches};
}

}  // namespace
}  // namespace mpma::cuda

STABLE_TORCH_LIBRARY_IMPL(mpma, CUDA, m) {
  m.impl("token_patch_similarity", TORCH_BOX(&mpma::cuda::token_patch_similarity));
  m.impl("token_patch_similarity_backward", TORCH_BOX(&mpma::cuda::token_patch_similarity_backward));
}
