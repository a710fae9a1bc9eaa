// From scores to weights: a, the softmax over the tokens, for every patch, and e = exp(attention_temperature · a − shift)
// for every token.
#pragma once

#include "cuda/token_patch_similarity_block.h"

namespace mpma::cuda {

constexpr int kWeightThreads = 128;

// A warp takes 32 patches of the pair.
MPMA_DEVICE void softmax_over_tokens(
    const SimilarityBlock& b, const float* scores, const PatchStatistics& patch, int64_t report, int64_t image) {
  for (int64_t p = warp_index() * kWarp + lane_index(); p < b.padded; p += thread_count()) {
    const float* column = scores + report * b.tokens * b.columns() + image * b.padded + p;
    float top = -bits_float(0x7F800000), sum = 0.f;
    for (int64_t t = 0; t < b.tokens; ++t)
      if (b.real_token(report, t)) top = larger(column[t * b.columns()], top);
    const float base = finite_top(top);
    for (int64_t t = 0; t < b.tokens; ++t)
      if (b.real_token(report, t)) sum += exp_from(column[t * b.columns()], base);
    const int64_t at = report * b.columns() + image * b.padded + p;
    patch.top[at] = base;
    patch.inverse[at] = sum == 0.f ? 0.f : divide_rn(1.f, sum);
  }
}

// A block for each pair. `safe` says that the attention temperature will do as the largest exponent: a lies in [0, 1].
template <class T>
MPMA_KERNEL(kWeightThreads, 4)
similarity_weights_kernel(
    SimilarityBlock b, const float* scores, T* weights, PatchStatistics patch, TokenStatistics token, bool safe) {
  const int64_t report = block_x() / b.images, image = block_x() % b.images;
  softmax_over_tokens(b, scores, patch, report, image);
  barrier();
  const float *top = patch.top + report * b.columns() + image * b.padded;
  const float *inverse = patch.inverse + report * b.columns() + image * b.padded;
  for (int64_t t = warp_index(); t < b.tokens; t += warp_count()) {
    const int64_t row = report * b.tokens + t;
    const float* score = scores + row * b.columns() + image * b.padded;
    T* weight = weights + row * b.columns() + image * b.padded;
    float total = 0.f, inner = 0.f;
    if (b.real_token(report, t)) {
      const auto exponent = [&](int64_t p) {
        return b.attention_temperature * (exp_from(score[p], top[p]) * inverse[p]);
      };
      float shift = b.attention_temperature > 0.f ? b.attention_temperature : 0.f;
      if (!safe) {
        shift = -bits_float(0x7F800000);
        for (int64_t p = lane_index(); p < b.patches; p += kWarp)
          if (b.real_patch(image, p)) shift = larger(exponent(p), shift);
        shift = finite_top(largest_of_lanes(shift));
      }
      for (int64_t p = lane_index(); p < b.padded; p += kWarp) {
        T rounded = {};
        if (p < b.patches && b.real_patch(image, p)) {
          // Sums of what is stored, so that its rounding cancels in the cosine.
          rounded = from_float<T>(exp_from(exponent(p), shift));
          const float e = to_float(rounded);
          total += e;
          inner = fma_rn(e, score[p], inner);
        }
        weight[p] = rounded;
      }
      total = sum_of_lanes(total);
      inner = sum_of_lanes(inner);
    } else {
      for (int64_t p = lane_index(); p < b.padded; p += kWarp) weight[p] = T{};
    }
    if (lane_index() == 0) {
      const float of_total = total == 0.f ? 0.f : divide_rn(1.f, total);
      token.inverse[row * b.images + image] = of_total;
      token.inner[row * b.images + image] = total == 0.f ? 0.f : inner * of_total;
    }
  }
}

template <class T>
void launch_similarity_weights(
    const SimilarityBlock& b, const float* scores, T* weights, const PatchStatistics& patch,
    const TokenStatistics& token, bool safe, void* stream) {
  const Launch how = {{b.reports * b.images}, kWeightThreads, 0, stream};
  launch<similarity_weights_kernel<T>>(how, b, scores, weights, patch, token, safe);
}

}  // namespace mpma::cuda
