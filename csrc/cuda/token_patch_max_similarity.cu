// The max form of token-patch similarity on CUDA: arguments from PyTorch, results back.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "cuda/token_patch_max_similarity_backward.h"
#include "cuda/token_patch_max_similarity_forward.h"

namespace mpma::cuda::max_similarity {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Mask = std::optional<Tensor>;

// Python has checked the arguments and named what is wrong with them; this guards the memory.
void check_mask(const Mask& mask, const Tensor& of, const char* name) {
  STD_TORCH_CHECK(
      !mask || (mask->scalar_type() == ScalarType::Bool && mask->dim() == 2 && mask->size(0) == of.size(0) &&
                mask->size(1) == of.size(1) && mask->is_cuda() && mask->get_device_index() == of.get_device_index()),
      name, ": expected a bool tensor (items, rows) on the device of its rows");
}

void check_operands(const Tensor& tokens, const Tensor& patches, const Mask& token_mask, const Mask& patch_mask) {
  STD_TORCH_CHECK(
      tokens.dim() == 3 && patches.dim() == 3 && tokens.size(2) == patches.size(2) && tokens.is_cuda() &&
          patches.is_cuda() && tokens.get_device_index() == patches.get_device_index() &&
          tokens.scalar_type() == patches.scalar_type(),
      "tokens and patches: expected CUDA tensors (reports, T, D) and (images, P, D) of one device and dtype");
  constexpr int64_t kMost = 1 << 30;  // positions are 32-bit numbers
  STD_TORCH_CHECK(
      tokens.size(1) < kMost && patches.size(1) < kMost && tokens.size(2) < kMost,
      "tokens and patches: the CUDA kernels take less than 2^30 rows an item and features");
  check_mask(token_mask, tokens, "token_mask");
  check_mask(patch_mask, patches, "patch_mask");
}

void check_like(const Tensor& x, const Tensor& of, ScalarType type, const std::vector<int64_t>& shape, const char* name) {
  bool same = x.dim() == static_cast<int64_t>(shape.size()) && x.scalar_type() == type && x.is_cuda() &&
              x.get_device_index() == of.get_device_index();
  for (size_t i = 0; same && i < shape.size(); ++i) same = x.size(i) == shape[i];
  STD_TORCH_CHECK(same, name, ": shape, dtype or device does not fit the operands");
}

// Rows are read in place where their features lie side by side, 16 bytes at a time where they are aligned. Rows that
// a copy would align are copied.
template <class T>
Tensor readable(const Tensor& x) {
  const bool together = x.size(2) < 2 || x.stride(2) == 1;
  const T* data = static_cast<const T*>(x.const_data_ptr());
  const bool copied = !together || (x.size(2) % kVector<T> == 0 && !aligned_rows(data, x.stride(0), x.stride(1)));
  return copied ? torch::stable::contiguous(x) : x;
}

template <class T>
Side<T> side_of(const Tensor& rows, const Mask& mask) {
  return {
      static_cast<const T*>(rows.const_data_ptr()), rows.stride(0), rows.stride(1),
      mask ? static_cast<const bool*>(mask->const_data_ptr()) : nullptr, mask ? mask->stride(0) : 0,
      mask ? mask->stride(1) : 0, rows.size(0), static_cast<int>(rows.size(1))};
}

void* current_stream(const Tensor& x) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return stream;
}

// f(an element) for the element type of a tensor.
template <class F>
void by_type(const Tensor& x, const F& f) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return f(float{});
    case ScalarType::BFloat16: return f(Bfloat16{});
    case ScalarType::Half: return f(Half{});
    default:
      STD_TORCH_CHECK(false, "token_patch_max_similarity: the CUDA kernels serve float32, bfloat16 and float16");
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> token_patch_max_similarity(
    const Tensor& tokens, const Tensor& patches, const Mask& token_mask, const Mask& patch_mask) {
  check_operands(tokens, patches, token_mask, patch_mask);
  const torch::stable::accelerator::DeviceGuard guard(tokens.get_device_index());
  const std::vector<int64_t> pairs = {tokens.size(0), patches.size(0)};
  const std::vector<int64_t> by_token = {pairs[0], pairs[1], tokens.size(1)}, by_patch = {pairs[0], pairs[1], patches.size(1)};
  const Tensor to_patches = torch::stable::new_empty(tokens, pairs, ScalarType::Float);
  const Tensor to_tokens = torch::stable::new_empty(tokens, pairs, ScalarType::Float);
  const Tensor patch_index = torch::stable::new_empty(tokens, by_token, ScalarType::Int);
  const Tensor token_index = torch::stable::new_empty(tokens, by_patch, ScalarType::Int);
  std::optional<Tensor> of_patch;
  if (several_row_tiles(tokens.size(1))) of_patch = torch::stable::new_empty(tokens, by_patch, ScalarType::Float);
  by_type(tokens, [&](auto element) {
    using T = decltype(element);
    const Tensor w = readable<T>(tokens), v = readable<T>(patches);
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
  const int64_t reports = tokens.size(0), images = patches.size(0);
  check_like(grad_tokens_to_patches, tokens, ScalarType::Float, {reports, images}, "gradient of tokens to patches");
  check_like(grad_patches_to_tokens, tokens, ScalarType::Float, {reports, images}, "gradient of patches to tokens");
  check_like(patch_index, tokens, ScalarType::Int, {reports, images, tokens.size(1)}, "patch_index");
  check_like(token_index, tokens, ScalarType::Int, {reports, images, patches.size(1)}, "token_index");
  const torch::stable::accelerator::DeviceGuard guard(tokens.get_device_index());
  const auto gradient = [](const Tensor& of, bool needed) {
    std::vector<int64_t> shape = {0};
    if (needed) shape.assign(of.sizes().begin(), of.sizes().end());
    return torch::stable::new_empty(of, shape, of.scalar_type());
  };
  const Tensor grad_tokens = gradient(tokens, need_tokens), grad_patches = gradient(patches, need_patches);
  if (!need_tokens && !need_patches) return {grad_tokens, grad_patches};
  const Tensor grad_to_patches = torch::stable::contiguous(grad_tokens_to_patches);
  const Tensor grad_to_tokens = torch::stable::contiguous(grad_patches_to_tokens);
  const Tensor patch = torch::stable::contiguous(patch_index), token = torch::stable::contiguous(token_index);
  const Tensor workspace =
      torch::stable::new_empty(tokens, {backward_workspace(reports, images)}, ScalarType::Float);
  by_type(tokens, [&](auto element) {
    using T = decltype(element);
    const Tensor w = readable<T>(tokens), v = readable<T>(patches);
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
