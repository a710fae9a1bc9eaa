// The gradient of the scores, through both softmaxes.
#pragma once

#include "cuda/token_patch_similarity_block.h"

namespace mpma::cuda {

constexpr int kGradientThreads = 128;

template <class T>
struct ScoreGradientArguments {
  SimilarityBlock b;
  const float* scores;
  PatchStatistics patch;
  TokenStatistics token;
  T *weights;       // e; becomes b
  T *of_weights;    // of_square · b V V^T; becomes of_square · b, with keep_scaled
  T *of_scores;     // the result
  bool keep_scaled;
};

// A warp takes 32 patches of a pair: with E = attention_temperature · b (dB - mean),
// dS = of_inner · b + a (E - sum over the tokens of a E).
template <class T>
MPMA_KERNEL(kGradientThreads, 8)
score_gradients_kernel(ScoreGradientArguments<T> g) {
  const SimilarityBlock& b = g.b;
  const int64_t groups = (b.padded + kWarp - 1) / kWarp;
  const int64_t task = block_x() * warp_count() + warp_index();
  if (task >= b.reports * b.images * groups) return;  // the whole warp, and no barrier follows
  const int64_t report = task / (b.images * groups), image = task / groups % b.images;
  const int64_t p = task % groups * kWarp + lane_index();
  if (p >= b.padded) return;
  const bool real = p < b.patches && b.real_patch(image, p);
  const int64_t column = image * b.padded + p;
  const float top = g.patch.top[report * b.columns() + column];
  const float inverse = g.patch.inverse[report * b.columns() + column];

  struct Weight {
    float a, b, e;
  };
  const auto weight_of = [&](int64_t row, float of_inner) {
    const int64_t at = row * b.columns() + column, token = row * b.images + image;
    const float score = g.scores[at];
    Weight w;
    w.a = exp_from(score, top) * inverse;
    w.b = to_float(g.weights[at]) * g.token.inverse[token];
    const float of_b = fma_rn(of_inner, score, to_float(g.of_weights[at]));
    w.e = b.attention_temperature * w.b * (of_b - g.token.mean[token]);
    return w;
  };
  float sum = 0.f;
  for (int64_t t = 0; t < b.tokens; ++t) {
    const int64_t row = report * b.tokens + t, token = row * b.images + image;
    if (!real || g.token.inverse[token] == 0.f) continue;
    const Weight w = weight_of(row, g.token.of_inner[token]);
    sum = fma_rn(w.a, w.e, sum);
  }
  for (int64_t t = 0; t < b.tokens; ++t) {
    const int64_t row = report * b.tokens + t, token = row * b.images + image, at = row * b.columns() + column;
    float of_score = 0.f, weight = 0.f, scaled = 0.f;
    if (real && g.token.inverse[token] != 0.f) {
      const float of_inner = g.token.of_inner[token];
      const Weight w = weight_of(row, of_inner);
      weight = w.b;
      scaled = g.token.of_square[token] * w.b;
      of_score = fma_rn(of_inner, w.b, w.a * (w.e - sum));
    }
    g.of_scores[at] = from_float<T>(of_score);
    g.weights[at] = from_float<T>(weight);
    if (g.keep_scaled) g.of_weights[at] = from_float<T>(scaled);
  }
}

template <class T>
void launch_score_gradients(const ScoreGradientArguments<T>& g, void* stream) {
  constexpr int kTasksABlock = kGradientThreads / kWarp;
  const int64_t tasks = g.b.reports * g.b.images * ((g.b.padded + kWarp - 1) / kWarp);
  launch<score_gradients_kernel<T>>(
      {{(tasks + kTasksABlock - 1) / kTasksABlock}, kGradientThreads, 0, stream}, g);
}

// sums (rows) = or += of_itself over the images, in their order by lane. A warp for each row.
MPMA_KERNEL(kGradientThreads, 1)
sum_over_images_kernel(const float* of_itself, int64_t rows, int64_t images, float* sums, bool add) {
  const int64_t row = block_x() * warp_count() + warp_index();
  if (row >= rows) return;
  float sum = 0.f;
  for (int64_t i = lane_index(); i < images; i += kWarp) sum += of_itself[row * images + i];
  sum = sum_of_lanes(sum);
  if (lane_index() == 0) sums[row] = add ? sums[row] + sum : sum;
}

inline void launch_sum_over_images(
    const float* of_itself, int64_t rows, int64_t images, float* sums, bool add, void* stream) {
  constexpr int kRowsABlock = kGradientThreads / kWarp;
  launch<sum_over_images_kernel>(
      {{(rows + kRowsABlock - 1) / kRowsABlock}, kGradientThreads, 0, stream}, of_itself, rows, images, sums, add);
}

}  // namespace mpma::cuda
