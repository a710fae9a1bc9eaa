// What the kernels of masked attention's backward share.
//
//   P = exp(scale Q K^T - logsumexp), dV = P^T dO, dS = P (dO V^T - sum O dO), dQ = scale dS K, dK = scale dS^T Q
// With dropout, P in dV and dO V^T in dS are dropped as in the forward. Every sum has one owner: no atomics.
#pragma once

#include "cuda/masked_attention_dropout.h"

namespace mpma::cuda {

template <class T>
struct AttentionGradients {
  Rows<const T> grad_output, output;
  Rows<const float> logsumexp;
  Rows<T> query, key, value;  // without data: not needed
  bool aligned;               // the first two can be read 16 bytes at a time
};

// The inner product of two rows over every eighth vector from `part` on.
template <class T>
MPMA_DEVICE float inner_part(const T* x, const T* y, int width, bool aligned, int part) {
  float sum = 0.f;
  if (!aligned) {
    for (int d = part; d < width; d += 8) sum += to_float(x[d]) * to_float(y[d]);
    return sum;
  }
  for (int d = part * kVector<T>; d < width; d += 8 * kVector<T>) {
    const Bytes16 left = load_16(x + d), right = load_16(y + d);
    MPMA_UNROLL
    for (int i = 0; i < 4; ++i) {
      if constexpr (kIsHalf<T>) {
        MPMA_UNROLL
        for (int half = 0; half < 2; ++half) {
          const T a{static_cast<uint16_t>(left.word[i] >> 16 * half)};
          const T b{static_cast<uint16_t>(right.word[i] >> 16 * half)};
          sum += to_float(a) * to_float(b);
        }
      } else {
        sum += bits_float(left.word[i]) * bits_float(right.word[i]);
      }
    }
  }
  return sum;
}

// Of `rows` queries, a multiple of 4, from `first` on: the log-sum-exp in units of log 2, and the inner product of output
// and its gradient. Where there is no query the former is infinite, and all weights are 0. `warp` of `warps` share them.
template <class T>
MPMA_DEVICE void query_statistics(
    const Attention<T>& a, const AttentionGradients<T>& g, const Place& place, const Extent& queries, int first,
    int rows, float* statistic, float* inner, int warp, int warps) {
  for (int row = 4 * warp; row < rows; row += 4 * warps) {  // eight lanes a row
    const int mine = row + lane_index() / 8, i = first + mine;
    const bool there = mine < rows && i < queries.length;
    float sum = 0.f, logsumexp = infinity();
    if (there) {
      const int64_t at = queries.start + i;
      sum = inner_part(
          g.output.at(place.item, at, place.head), g.grad_output.at(place.item, at, place.head), a.sizes.width,
          g.aligned, lane_index() % 8);
      logsumexp = *g.logsumexp.at(place.item, at, place.head) * kLog2E;
    }
    MPMA_UNROLL
    for (int lanes = 1; lanes < 8; lanes *= 2) sum += shuffle_xor(sum, lanes);
    if (mine < rows && lane_index() % 8 == 0) {
      statistic[mine] = logsumexp;
      inner[mine] = sum;
    }
  }
}

template <int kM, int kN>
MPMA_DEVICE void scale_all(Accumulator<kM, kN>& x, float scale) {
  x.for_each([&](int, int, float& value) { value *= scale; });
}

}  // namespace mpma::cuda
