// From weights to the similarity: every token's cosine, their log-sum-exp, and the gradients of both.
#pragma once

#include "cuda/token_patch_similarity_block.h"

namespace mpma::cuda {

constexpr int kTokenThreads = 128;

// <w, c> / (|w| |c|), each norm at least 1e-8. Where patches cancel, rounding could leave |c|^2 below what Cauchy and
// Schwarz allow, even negative: `square` becomes what was used. A NaN stays.
MPMA_DEVICE float cosine_of(float inner, float token_square, float& square) {
  const bool clamped = token_square < kNormEpsilon * kNormEpsilon;
  const float norm = clamped ? kNormEpsilon : sqrt_rn(token_square);
  if (!clamped) {
    const float least = divide_rn(inner, norm);
    if (least * least > square) square = least * least;
  }
  const float of_c = square < kNormEpsilon * kNormEpsilon ? kNormEpsilon : sqrt_rn(square);
  return divide_rn(divide_rn(inner, norm), of_c);
}

// The gradients of a token's <w, c>, |c|^2 and w from that of its cosine.
struct TokenGradients {
  float of_inner, of_square, of_itself;

  MPMA_DEVICE TokenGradients(float of_cosine, float cosine, float square, float token_square) {
    const bool token_clamped = token_square < kNormEpsilon * kNormEpsilon;
    const bool clamped = square < kNormEpsilon * kNormEpsilon;
    const float norm = token_clamped ? kNormEpsilon : sqrt_rn(token_square);
    const float norm_of_c = clamped ? kNormEpsilon : sqrt_rn(square);
    of_inner = divide_rn(divide_rn(of_cosine, norm), norm_of_c);
    of_square = clamped ? 0.f : divide_rn(-of_cosine * cosine, square);
    of_itself = token_clamped ? 0.f : divide_rn(-of_cosine * cosine, token_square);
  }
};

// Largest exponent and sum of exp(exponent - largest) over the real tokens; the same in every lane.
struct PooledExponents {
  float base, sum;

  // exponent(t) of token t, valid where real(t).
  template <class Real, class Exponent>
  MPMA_DEVICE PooledExponents(int64_t tokens, const Real& real, const Exponent& exponent) : sum(0.f) {
    float top = -bits_float(0x7F800000);
    for (int64_t t = lane_index(); t < tokens; t += kWarp)
      if (real(t)) top = larger(exponent(t), top);
    base = finite_top(largest_of_lanes(top));
    for (int64_t t = lane_index(); t < tokens; t += kWarp)
      if (real(t)) sum += exp_from(exponent(t), base);
    sum = sum_of_lanes(sum);
  }

  MPMA_DEVICE float log_sum() const { return sum == 0.f ? 0.f : fma_rn(log2_accurate(sum), kLn2, base); }
};

// `product` (rows, images, width) holds b V V^T with the Gram form, where width is that of the weights, else c = b V.
template <class T>
struct TokenKernelArguments {
  SimilarityBlock b;
  T *product;
  const T *weights;  // e, with the Gram form, else null
  int64_t width;
  const float *token_square;  // (reports, tokens)
  TokenStatistics token;
  float *out;  // (reports, images), rows out_row apart, or null
  int64_t out_row;
  const float *grad;  // the gradient of the similarities, or null
  int64_t grad_report, grad_image;
};

// A block for each pair. With `grad` the product is multiplied by of_square.
template <class T>
MPMA_KERNEL(kTokenThreads, 8)
similarity_tokens_kernel(TokenKernelArguments<T> g) {
  const SimilarityBlock& b = g.b;
  const int64_t report = block_x() / b.images, image = block_x() % b.images;
  const auto at = [&](int64_t t) { return (report * b.tokens + t) * b.images + image; };
  const auto row_of = [&](int64_t t) { return g.product + at(t) * g.width; };
  for (int64_t t = warp_index(); t < b.tokens; t += warp_count()) {
    const T* product = row_of(t);
    const float inverse = g.token.inverse[at(t)];
    float square = 0.f, cosine = 0.f;
    if (inverse != 0.f) {  // a NaN too
      if (g.weights != nullptr) {
        const T* weight = g.weights + (report * b.tokens + t) * b.columns() + image * b.padded;
        for (int64_t i = lane_index(); i < g.width; i += kWarp)
          square = fma_rn(to_float(product[i]), to_float(weight[i]) * inverse, square);
      } else {
        for (int64_t i = lane_index(); i < g.width; i += kWarp)
          square = fma_rn(to_float(product[i]), to_float(product[i]), square);
      }
      square = sum_of_lanes(square);
      cosine = cosine_of(g.token.inner[at(t)], g.token_square[report * b.tokens + t], square);
    }
    if (lane_index() == 0) {
      g.token.square[at(t)] = square;
      g.token.cosine[at(t)] = cosine;
    }
  }
  barrier();
  const PooledExponents pooled(
      b.tokens, [&](int64_t t) { return g.token.inverse[at(t)] != 0.f; },
      [&](int64_t t) { return b.pooling_temperature * g.token.cosine[at(t)]; });
  if (g.out != nullptr && thread_index() == 0) g.out[report * g.out_row + image] = pooled.log_sum();
  if (g.grad == nullptr) return;
  const float grad = g.grad[report * g.grad_report + image * g.grad_image] * b.pooling_temperature;
  for (int64_t t = warp_index(); t < b.tokens; t += warp_count()) {
    const bool something = g.token.inverse[at(t)] != 0.f;
    const float cosine = g.token.cosine[at(t)], square = g.token.square[at(t)];
    const float share = divide_rn(exp_from(b.pooling_temperature * cosine, pooled.base), pooled.sum);
    const TokenGradients d(grad * share, cosine, square, g.token_square[report * b.tokens + t]);
    if (lane_index() == 0) {
      g.token.of_inner[at(t)] = something ? d.of_inner : 0.f;
      g.token.of_square[at(t)] = something ? d.of_square : 0.f;
      g.token.of_itself[at(t)] = something ? d.of_itself : 0.f;
      g.token.mean[at(t)] = something ? d.of_inner * g.token.inner[at(t)] + d.of_square * square : 0.f;
    }
    T* product = row_of(t);
    for (int64_t i = lane_index(); i < g.width; i += kWarp)
      product[i] = something ? from_float<T>(to_float(product[i]) * d.of_square) : T{};
  }
}

template <class T>
void launch_similarity_tokens(const TokenKernelArguments<T>& g, void* stream) {
  launch<similarity_tokens_kernel<T>>({{g.b.reports * g.b.images}, kTokenThreads, 0, stream}, g);
}

}  // namespace mpma::cuda
