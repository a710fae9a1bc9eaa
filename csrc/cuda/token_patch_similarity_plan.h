// How the softmax form of token-patch similarity is cut in blocks, and the memory that a block takes.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "cuda/token_patch_similarity_block.h"
#include "cuda/workspace.h"

namespace mpma::cuda {

template <class T>
struct SimilarityProblem {
  FeatureRows<T> tokens, patches;
  float attention_temperature, pooling_temperature;
  // About how many bytes of workspace to take beside what grows with the operands alone.
  int64_t workspace_limit;
};

// Up to which attention temperature e^-temperature, the least weight there is when the shift is the temperature, is a
// normal number with all its digits.
template <class T>
constexpr float kSafeTemperature = 40.f;
template <>
inline constexpr float kSafeTemperature<Half> = 8.f;

constexpr int64_t kFewPatches = 16;

template <class T>
struct SimilarityPlan {
  bool backward, by_gram, safe;
  int64_t width, padded;     // of packed rows
  int64_t reports, images;   // of a block

  SimilarityPlan(const SimilarityProblem<T>& problem, bool backward) : backward(backward) {
    const auto &tokens = problem.tokens, &patches = problem.patches;
    // |c|^2 comes from the image's Gram matrix where that is less work; the backward wants b V V^T, which costs twice as
    // much without. Never in float16, whose range squares of features leave; and in bfloat16 only where patches enough
    // average out the rounding of the matrix.
    const bool precise = !kIsHalf<T> || (!std::is_same_v<T, Half> && patches.length > kFewPatches);
    by_gram = precise && patches.length <= (backward ? 2 : 1) * patches.width;
    safe = std::abs(problem.attention_temperature) <= kSafeTemperature<T>;
    width = round_up(patches.width), padded = round_up(patches.length);
    // As many rows as columns, roughly, which is best for the products.
    const int64_t size = sizeof(T), product = by_gram ? padded : width + (backward ? padded : 0);
    const int64_t bytes_a_pair = tokens.length * (padded * (4 + size + (backward ? size : 0)) + product * size);
    const int64_t pairs = std::max<int64_t>(1, problem.workspace_limit / std::max<int64_t>(1, bytes_a_pair));
    const double square = std::sqrt(static_cast<double>(pairs) * tokens.length / std::max<int64_t>(1, padded));
    images = clamp(static_cast<int64_t>(square), patches.items);
    reports = clamp(pairs / images, tokens.items);
    images = clamp(pairs / reports, patches.items);
  }

 private:
  static int64_t round_up(int64_t x) { return (x + kVector<T> - 1) / kVector<T> * kVector<T>; }
  static int64_t clamp(int64_t x, int64_t most) { return std::max<int64_t>(1, std::min(x, most)); }
};

// Pieces of the backward alone are empty in the forward.
template <class T>
struct SimilarityMemory {
  // Of all reports
  PackedRows<T> tokens;
  float *token_square, *of_tokens, *of_itself;
  // Of a block's images
  PackedRows<T> patches;
  T *gram, *of_gram;
  float *of_patches;
  // Of a block's pairs
  float *scores;
  T *weights, *product, *of_weights, *of_scores;
  PatchStatistics patch;
  TokenStatistics token;

  SimilarityMemory(Workspace& memory, const SimilarityProblem<T>& problem, const SimilarityPlan<T>& plan) {
    const int64_t token_rows = problem.tokens.items * problem.tokens.length;
    const int64_t patch_rows = plan.images * plan.padded, rows = plan.reports * problem.tokens.length;
    const int64_t cells = rows * patch_rows, of_gram_size = plan.by_gram ? patch_rows * plan.padded : 0;
    const int64_t backward = plan.backward ? 1 : 0;
    tokens = {memory.take<T>(token_rows * plan.width), problem.tokens.length, plan.width};
    token_square = memory.take<float>(token_rows);
    of_tokens = memory.take<float>(backward * token_rows * plan.width);
    of_itself = memory.take<float>(backward * token_rows);
    patches = {memory.take<T>(patch_rows * plan.width), plan.padded, plan.width};
    gram = memory.take<T>(of_gram_size);
    of_gram = memory.take<T>(backward * of_gram_size);
    of_patches = memory.take<float>(backward * patch_rows * plan.width);
    scores = memory.take<float>(cells);
    weights = memory.take<T>(cells);
    product = memory.take<T>(plan.by_gram ? cells : rows * plan.images * plan.width);
    of_weights = plan.by_gram ? product : memory.take<T>(backward * cells);
    of_scores = memory.take<T>(backward * cells);
    for (float** piece : {&patch.top, &patch.inverse}) *piece = memory.take<float>(plan.reports * patch_rows);
    for (float** piece : {&token.inverse, &token.inner, &token.square, &token.cosine})
      *piece = memory.take<float>(rows * plan.images);
    for (float** piece : {&token.of_inner, &token.of_square, &token.mean, &token.of_itself})
      *piece = memory.take<float>(backward * rows * plan.images);
  }
};

template <class T>
int64_t similarity_workspace(const SimilarityProblem<T>& problem, bool backward) {
  Workspace counting;
  const SimilarityMemory<T> memory(counting, problem, SimilarityPlan<T>(problem, backward));
  return counting.bytes();
}

}  // namespace mpma::cuda
