// What the kernels of the softmax form of token-patch similarity know of a block of reports and images.
#pragma once

#include "cuda/similarity_rows.h"

namespace mpma::cuda {

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr float kNormEpsilon = 1e-8f;

// Matrices over a block have a row for each token of each report, and for each image `padded` columns, of which the
// first `patches` are patches.
struct SimilarityBlock {
  int64_t reports, images, tokens, patches, padded;
  RealMask real_token, real_patch;  // of the block's first report and image on
  float attention_temperature, pooling_temperature;

  MPMA_HOST_DEVICE int64_t rows() const { return reports * tokens; }
  MPMA_HOST_DEVICE int64_t columns() const { return images * padded; }
};

// Of every token and image, (rows, images). With e the weights before they are divided by their sum, b after, and S the
// scores:
struct TokenStatistics {
  float *inverse;  // 1 / sum e, or 0 where the token or all patches are not real
  float *inner;    // <w, c> = sum b S
  float *square;   // |c|^2
  float *cosine;
  // For the backward, the gradients
  float *of_inner;   // of <w, c>
  float *of_square;  // twice that of |c|^2
  float *mean;       // sum over the patches of b times its gradient
  float *of_itself;  // what the token's gradient holds of the token
};

// Of every report and patch, (reports, columns), over the real tokens: the largest score, and 1 / the sum of
// exp(score - largest), 0 if there are none.
struct PatchStatistics {
  float *top, *inverse;
};

MPMA_DEVICE float larger(float x, float y) { return x > y ? x : y; }

MPMA_DEVICE float largest_of_lanes(float x) {
  for (int lanes = 1; lanes < kWarp; lanes *= 2) x = larger(x, shuffle_xor(x, lanes));
  return x;
}

// exp(x - base) of exponents up to about `base`.
MPMA_DEVICE float exp_from(float x, float base) { return exp2_fast((x - base) * kLog2E); }

// What to subtract from exponents of which `top` is the largest, also where there is none.
MPMA_DEVICE float finite_top(float top) { return top == -bits_float(0x7F800000) ? 0.f : top; }

}  // namespace mpma::cuda
