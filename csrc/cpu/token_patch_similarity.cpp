// The softmax form of token-patch similarity on the CPU: arguments from PyTorch, results back.

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu/similarity_arguments.h"

namespace mpma {

template <class T>
struct SimilarityProblem {
  cpu::RealRows<T> tokens, patches;
  std::vector<T> token_square;  // |w|^2 of every real token
  T attention_temperature, pooling_temperature;
};

}  // namespace mpma

#define MPMA_ISA_BODY "cpu/token_patch_similarity_core.h"
#include "cpu/foreach_isa.h"

namespace mpma::cpu {
namespace {

template <class T>
SimilarityProblem<T> problem_of(
    const Tensor& tokens, const Tensor& patches, const std::optional<Tensor>& token_mask,
    const std::optional<Tensor>& patch_mask, double attention_temperature, double pooling_temperature) {
  check_operands(tokens, patches, token_mask, patch_mask);
  // Rows that are far apart are read where they lie: products copy a panel of them at a time.
  const int64_t spread = portable::row_distance(tokens.size(2));
  const int64_t stride = portable::far_apart<T>(spread) ? portable::padded(tokens.size(2)) : spread;
  SimilarityProblem<T> problem{
      RealRows<T>(tokens, token_mask, stride),
      RealRows<T>(patches, patch_mask, stride),
      std::vector<T>(tokens.size(0) * tokens.size(1)),
      static_cast<T>(attention_temperature),
      static_cast<T>(pooling_temperature)};
  const auto& words = problem.tokens;
  torch::stable::parallel_for(0, words.rows(), grain(words.width), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* w = words.data + row * stride;
      problem.token_square[row] = portable::similarity::dot(w, w, words.width);
    }
  });
  return problem;
}

Tensor token_patch_similarity(
    const Tensor& tokens, const Tensor& patches, const std::optional<Tensor>& token_mask,
    const std::optional<Tensor>& patch_mask, double attention_temperature, double pooling_temperature) {
  const auto run = [&](auto number, auto forward) {
    using T = decltype(number);
    const auto problem =
        problem_of<T>(tokens, patches, token_mask, patch_mask, attention_temperature, pooling_temperature);
    const Tensor out = torch::stable::new_empty(tokens, {tokens.size(0), patches.size(0)}, compute_type(tokens));
    forward(problem, out.mutable_data_ptr<T>());
    return out;
  };
  if (compute_type(tokens) == ScalarType::Double) return run(double{}, &portable::similarity::forward<double>);
  return run(float{}, MPMA_FASTEST(similarity::forward<float>, is_bfloat16(tokens)));
}

std::tuple<Tensor, Tensor> token_patch_similarity_backward(
    const Tensor& grad_output, const Tensor& tokens, const Tensor& patches, const std::optional<Tensor>& token_mask,
    const std::optional<Tensor>& patch_mask, double attention_temperature, double pooling_temperature,
    bool need_tokens, bool need_patches) {
  const auto run = [&](auto number, auto backward) -> std::tuple<Tensor, Tensor> {
    using T = decltype(number);
    const auto problem =
        problem_of<T>(tokens, patches, token_mask, patch_mask, attention_temperature, pooling_temperature);
    const Tensor grad = readable_gradient(grad_output, tokens, patches);
    const Tensor of_tokens = need_tokens ? problem.tokens.zeros(tokens) : not_needed(tokens);
    const Tensor of_patches = need_patches ? problem.patches.zeros(patches) : not_needed(patches);
    if (need_tokens || need_patches)
      backward(
          problem, grad.const_data_ptr<T>(), need_tokens ? of_tokens.mutable_data_ptr<T>() : nullptr,
          need_patches ? of_patches.mutable_data_ptr<T>() : nullptr);
    return {
        need_tokens ? problem.tokens.scatter(of_tokens, tokens) : of_tokens,
        need_patches ? problem.patches.scatter(of_patches, patches) : of_patches};
  };
  if (compute_type(tokens) == ScalarType::Double) return run(double{}, &portable::similarity::backward<double>);
  return run(float{}, MPMA_FASTEST(similarity::backward<float>, is_bfloat16(tokens)));
}

}  // namespace
}  // namespace mpma::cpu

STABLE_TORCH_LIBRARY_IMPL(mpma, CPU, m) {
  m.impl("token_patch_similarity", TORCH_BOX(&mpma::cpu::token_patch_similarity));
  m.impl("token_patch_similarity_backward", TORCH_BOX(&mpma::cpu::token_patch_similarity_backward));
}
