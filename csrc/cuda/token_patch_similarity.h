// The softmax form of token-patch similarity: forward and backward, block by block of reports and images. With b and c of
// the specification, S the scores <w, v>, and of every token
//   dcos      = g · pooling_temperature · its share in the sum over tokens
//   of_inner  = dcos / (|w| |c|)          the gradient of <w, c> = sum b S
//   of_square = -dcos · cos / |c|^2       twice that of |c|^2, 0 where |c| is clamped
// the gradients are
//   dB = of_inner · S + of_square · (b V) V^T
//   E  = attention_temperature · b (dB - sum over patches b dB)
//   dS = of_inner · b + a (E - sum over tokens a E)
//   dW = dS V - (dcos · cos / |w|^2) w
//   dV = dS^T W + b^T (of_square · b) V
// Every sum has one order. Nothing here waits for the device.
#pragma once

#include "cuda/matrix_product.h"
#include "cuda/token_patch_similarity_gradients.h"
#include "cuda/token_patch_similarity_plan.h"
#include "cuda/token_patch_similarity_tokens.h"
#include "cuda/token_patch_similarity_weights.h"

namespace mpma::cuda {

template <class T>
class SimilarityRun {
 public:
  SimilarityRun(const SimilarityProblem<T>& problem, bool backward, void* workspace, void* stream)
      : problem_(problem), plan_(problem, backward), workspace_(workspace), memory_(workspace_, problem, plan_),
        stream_(stream) {}

  // out (reports, images)
  void forward(float* out) {
    start();
    const int64_t all_images = problem_.patches.items;
    for_each_block([&] {
      weights();
      attend({out + report0_ * all_images + image0_, all_images}, nullptr, 0, 0);
    }, [&] {});
  }

  // grad (reports, images), any strides. Gradients (reports, T, D) and (images, P, D), null where not needed.
  void backward(const float* grad, int64_t grad_report, int64_t grad_image, T* of_tokens, T* of_patches) {
    start();
    const int64_t patch_size = problem_.patches.length * problem_.patches.width;
    for_each_block([&] {
      weights();
      attend(
          {nullptr, 0}, grad + report0_ * grad_report + image0_ * grad_image, grad_report, grad_image);
      gradients_of_scores(of_patches != nullptr);
      if (of_tokens != nullptr) add_to_tokens();
      if (of_patches != nullptr) add_to_patches();
    }, [&] {
      if (of_patches == nullptr) return;
      const float* sums = problem_.tokens.items > 0 ? memory_.of_patches : nullptr;
      launch_unpack_gradients(
          images_of_block(), memory_.patches, sums, nullptr, of_patches + image0_ * patch_size, stream_);
    });
    if (of_tokens == nullptr) return;
    const bool something = problem_.patches.items > 0;
    launch_unpack_gradients(
        problem_.tokens, memory_.tokens, something ? memory_.of_tokens : nullptr,
        something ? memory_.of_itself : nullptr, of_tokens, stream_);
  }

 private:
  struct Similarities {
    float* data;
    int64_t row;
  };

  void start() { launch_pack_rows(problem_.tokens, memory_.tokens, memory_.token_square, stream_); }

  // block() for every block, and end() after all those of the same images.
  template <class Block, class End>
  void for_each_block(const Block& block, const End& end) {
    const auto &tokens = problem_.tokens, &patches = problem_.patches;
    for (image0_ = 0; image0_ < patches.items; image0_ += plan_.images) {
      b_.images = std::min(plan_.images, patches.items - image0_);
      b_.tokens = tokens.length, b_.patches = patches.length, b_.padded = plan_.padded;
      b_.attention_temperature = problem_.attention_temperature;
      b_.pooling_temperature = problem_.pooling_temperature;
      b_.real_patch = images_of_block().real;
      launch_pack_rows<T>(images_of_block(), memory_.patches, nullptr, stream_);
      if (plan_.by_gram) gram();
      for (report0_ = 0; report0_ < tokens.items; report0_ += plan_.reports) {
        b_.reports = std::min(plan_.reports, tokens.items - report0_);
        b_.real_token = tokens.real;
        if (b_.real_token.data != nullptr) b_.real_token.data += report0_ * tokens.real.by_item;
        block();
      }
      end();
    }
  }

  FeatureRows<T> images_of_block() const {
    FeatureRows<T> rows = problem_.patches;
    rows.data += image0_ * rows.by_item;
    if (rows.real.data != nullptr) rows.real.data += image0_ * rows.real.by_item;
    rows.items = b_.images;
    return rows;
  }

  T* tokens_of_block() const { return memory_.tokens.data + report0_ * b_.tokens * plan_.width; }

  // --- Products ------------------------------------------------------------------------------------------------------
  // What is one matrix over the block has no batch; what is one for each image has `columns` next to each other.

  Matrices<T> over_patches(T* data) const { return {data, b_.columns(), b_.padded}; }
  Matrices<T> over_features(T* data) const { return {data, b_.images * plan_.width, plan_.width}; }
  Matrices<T> patches() const { return {memory_.patches.data, plan_.width, b_.padded * plan_.width}; }
  Matrices<T> of_images(T* data) const { return {data, b_.padded, b_.padded * b_.padded}; }
  Matrices<float> of_patches() const { return {memory_.of_patches, plan_.width, b_.padded * plan_.width}; }

  // In the operands' dtype.
  template <Factors kFactors>
  void product(
      const Matrices<T>& a, const Matrices<T>& b, const Matrices<T>& c, int64_t m, int64_t n, int64_t k,
      int64_t batches, const float* scale = nullptr) const {
    launch_product<kFactors>(Product<T>{a, b, c, {}, m, n, k, batches, false, scale, b_.images, 1}, stream_);
  }

  // In float32.
  template <Factors kFactors>
  void sums(
      const Matrices<T>& a, const Matrices<T>& b, const Matrices<float>& c, int64_t m, int64_t n, int64_t k,
      int64_t batches, bool add) const {
    launch_product<kFactors>(Product<T>{a, b, {}, c, m, n, k, batches, add, nullptr, 0, 0}, stream_);
  }

  void gram() const {
    product<Factors::kRowsByRows>(
        patches(), patches(), of_images(memory_.gram), b_.padded, b_.padded, plan_.width, b_.images);
  }

  void weights() const {
    const Matrices<float> scores = {memory_.scores, b_.columns(), 0};
    sums<Factors::kRowsByRows>(
        {tokens_of_block(), plan_.width, 0}, patches(), scores, b_.rows(), b_.columns(), plan_.width, 1, false);
    launch_similarity_weights(
        b_, memory_.scores, memory_.weights, memory_.patch, memory_.token, plan_.safe, stream_);
  }

  // b V V^T or b V, and what follows from it for every token.
  void attend(const Similarities& out, const float* grad, int64_t grad_report, int64_t grad_image) const {
    const int64_t width = plan_.by_gram ? b_.padded : plan_.width;
    product<Factors::kRowsByColumns>(
        over_patches(memory_.weights), plan_.by_gram ? of_images(memory_.gram) : patches(),
        plan_.by_gram ? over_patches(memory_.product) : over_features(memory_.product), b_.rows(), width, b_.padded,
        b_.images, memory_.token.inverse);
    launch_similarity_tokens<T>(
        {b_, memory_.product, plan_.by_gram ? memory_.weights : nullptr, width,
         memory_.token_square + report0_ * b_.tokens, memory_.token, out.data, out.row, grad, grad_report, grad_image},
        stream_);
  }

  void gradients_of_scores(bool keep_scaled) const {
    if (!plan_.by_gram)
      product<Factors::kRowsByRows>(
          over_features(memory_.product), patches(), over_patches(memory_.of_weights), b_.rows(), b_.padded,
          plan_.width, b_.images);
    launch_score_gradients<T>(
        {b_, memory_.scores, memory_.patch, memory_.token, memory_.weights, memory_.of_weights, memory_.of_scores,
         plan_.by_gram && keep_scaled},
        stream_);
  }

  void add_to_tokens() const {
    const bool add = image0_ > 0;
    const int64_t row0 = report0_ * b_.tokens;
    const Matrices<float> of_tokens = {memory_.of_tokens + row0 * plan_.width, plan_.width, 0};
    sums<Factors::kRowsByColumns>(
        over_patches(memory_.of_scores), patches(), of_tokens, b_.rows(), plan_.width, b_.columns(), 1, add);
    launch_sum_over_images(
        memory_.token.of_itself, b_.rows(), b_.images, memory_.of_itself + row0, add, stream_);
  }

  void add_to_patches() const {
    const Matrices<T> tokens = {tokens_of_block(), plan_.width, 0};
    sums<Factors::kColumnsByColumns>(
        over_patches(memory_.of_scores), tokens, of_patches(), b_.columns(), plan_.width, b_.rows(), 1, report0_ > 0);
    if (plan_.by_gram) {
      product<Factors::kColumnsByColumns>(
          over_patches(memory_.weights), over_patches(memory_.of_weights), of_images(memory_.of_gram), b_.padded,
          b_.padded, b_.rows(), b_.images);
      sums<Factors::kRowsByColumns>(
          of_images(memory_.of_gram), patches(), of_patches(), b_.padded, plan_.width, b_.padded, b_.images, true);
    } else {
      sums<Factors::kColumnsByColumns>(
          over_patches(memory_.weights), over_features(memory_.product), of_patches(), b_.padded, plan_.width,
          b_.rows(), b_.images, true);
    }
  }

  const SimilarityProblem<T> problem_;
  const SimilarityPlan<T> plan_;
  Workspace workspace_;
  const SimilarityMemory<T> memory_;
  void* stream_;
  SimilarityBlock b_ = {};
  int64_t report0_ = 0, image0_ = 0;
};

// workspace: similarity_workspace(problem, false) bytes. Everything has at least one element, or there is nothing to do.
template <class T>
void launch_similarity_forward(const SimilarityProblem<T>& problem, void* workspace, float* out, void* stream) {
  if (problem.tokens.length == 0 || problem.patches.length == 0)
    launch_fill_zeros(out, problem.tokens.items * problem.patches.items, stream);
  else
    SimilarityRun<T>(problem, false, workspace, stream).forward(out);
}

// workspace: similarity_workspace(problem, true) bytes. Gradients that are null are not computed.
template <class T>
void launch_similarity_backward(
    const SimilarityProblem<T>& problem, void* workspace, const float* grad, int64_t grad_report, int64_t grad_image,
    T* of_tokens, T* of_patches, void* stream) {
  if (of_tokens == nullptr && of_patches == nullptr) return;
  SimilarityRun<T>(problem, true, workspace, stream).backward(grad, grad_report, grad_image, of_tokens, of_patches);
}

}  // namespace mpma::cuda
