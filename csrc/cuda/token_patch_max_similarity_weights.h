// What each pair's gradients weigh in the backward of the max form: divided by how many rows the means are over.
#pragma once

#include "cuda/launch.h"
#include "cuda/max_similarity_side.h"

namespace mpma::cuda::max_similarity {

// A side of the backward. `pair_step`: pairs from one of its items to the next.
struct PairSide {
  const float* grad;  // of the means over this side's rows, (reports, images)
  const bool* mask;   // of its rows, or nullptr
  int64_t mask_item, mask_row;
  int64_t items, pair_step;
  int length;
};

// Real rows of an item, at least 1; by one warp.
MPMA_DEVICE float count_real(const PairSide& side, int64_t item) {
  if (side.mask == nullptr) return static_cast<float>(side.length > 0 ? side.length : 1);
  int count = 0;
  for (int row = lane_index(); row < side.length; row += kWarp)
    count += side.mask[item * side.mask_item + row * side.mask_row];
  for (int lanes = 1; lanes < kWarp; lanes *= 2) count += shuffle_xor(count, lanes);
  return static_cast<float>(count > 0 ? count : 1);
}

constexpr int kWeightThreads = 128, kWeightWarps = kWeightThreads / kWarp;

// A warp counts the rows of an item.
MPMA_KERNEL(kWeightThreads, 1)
count_kernel(PairSide side, float* counts) {
  const int64_t item = block_x() * kWeightWarps + warp_index();
  if (item >= side.items) return;
  const float count = count_real(side, item);
  if (lane_index() == 0) counts[item] = count;
}

struct WeightArguments {
  PairSide own, other;
  const float *own_count, *other_count;  // of each item
  float *own_weight, *other_weight;      // (reports, images): of the maxima of the own rows, of the other's
  float* unscale;                        // of each own item: what makes its sums gradients
  bool scaled;                           // half precision: the largest weight of an item becomes about 1024
};

// A power of two that brings x between 1024 and 2048, or 1 where there is none.
MPMA_DEVICE float scale_for(float x) {
  const int exponent = static_cast<int>(float_bits(x) >> 23 & 255);  // of |x|
  if (exponent == 0 || exponent == 255) return 1.f;
  const int wanted = 127 + 10 - (exponent - 127);
  return bits_float(static_cast<uint32_t>(wanted < 253 ? wanted : 253) << 23);
}

// A warp weighs all pairs of one own item.
MPMA_KERNEL(kWeightThreads, 1)
weight_kernel(WeightArguments g) {
  const int64_t own = block_x() * kWeightWarps + warp_index();
  if (own >= g.own.items) return;
  const auto weights = [&](int64_t other, float& of_own, float& of_other) {
    const int64_t pair = own * g.own.pair_step + other * g.other.pair_step;
    of_own = divide_rn(g.own.grad[pair], g.own_count[own]);
    of_other = divide_rn(g.other.grad[pair], g.other_count[other]);
  };
  float scale = 1.f, x, y;
  if (g.scaled) {
    // Of finite weights only: the others spoil their sums whatever they are scaled by.
    uint32_t most = 0;
    const auto take = [&](float weight) {
      const uint32_t bits = float_bits(weight) & 0x7FFFFFFF;
      if (bits < 0x7F800000 && bits > most) most = bits;
    };
    for (int64_t other = lane_index(); other < g.other.items; other += kWarp) {
      weights(other, x, y);
      take(x);
      take(y);
    }
    for (int lanes = 1; lanes < kWarp; lanes *= 2) {
      const uint32_t theirs = shuffle_xor(most, lanes);
      most = theirs > most ? theirs : most;
    }
    scale = scale_for(bits_float(most));
  }
  for (int64_t other = lane_index(); other < g.other.items; other += kWarp) {
    weights(other, x, y);
    const int64_t pair = own * g.own.pair_step + other * g.other.pair_step;
    g.own_weight[pair] = multiply_rn(x, scale);
    g.other_weight[pair] = multiply_rn(y, scale);
  }
  if (lane_index() == 0) g.unscale[own] = divide_rn(1.f, scale);
}

inline Launch by_warps(int64_t items, void* stream) {
  return {{(items + kWeightWarps - 1) / kWeightWarps}, kWeightThreads, 0, stream};
}

inline void launch_count(const PairSide& side, float* counts, void* stream) {
  launch<count_kernel>(by_warps(side.items, stream), side, counts);
}

inline void launch_weights(const WeightArguments& g, void* stream) {
  launch<weight_kernel>(by_warps(g.own.items, stream), g);
}

}  // namespace mpma::cuda::max_similarity
