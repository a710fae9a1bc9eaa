// Sums over rows that are picked by number: the sparse halves of top-k attention and of its gradients.
#pragma once

#include "cpu/simd.h"

namespace mpma::cpu {

// out[j] = alpha * <x, row numbers[j] of base>
template <class T, class Isa>
MPMA_INLINE void dot_rows(
    const T* x, const T* base, int64_t stride, const int32_t* numbers, int64_t count, int64_t width, T alpha,
    T* out) {
  using S = Simd<T, Isa>;
  const int64_t whole = width - width % S::kWidth;
  for (int64_t j = 0; j < count; ++j) {
    const T* row = base + numbers[j] * stride;
    typename S::Vec sum = {};
    for (int64_t d = 0; d < whole; d += S::kWidth) sum += S::load(x + d) * S::load(row + d);
    T total = S::sum(sum);
    for (int64_t d = whole; d < width; ++d) total += x[d] * row[d];
    out[j] = alpha * total;
  }
}

template <class T, class Isa, int vectors>
MPMA_INLINE void add_rows_chunk(
    const T* weights, const T* base, int64_t stride, const int32_t* numbers, int64_t count, T* out) {
  using S = Simd<T, Isa>;
  typename S::Vec sum[vectors] = {};
  for (int64_t j = 0; j < count; ++j) {
    const T* row = base + numbers[j] * stride;
    const auto weight = S::broadcast(weights[j]);
    for (int v = 0; v < vectors; ++v) sum[v] += weight * S::load(row + v * S::kWidth);
  }
  for (int v = 0; v < vectors; ++v) S::store(out + v * S::kWidth, sum[v]);
}

// out = sum_j weights[j] * row numbers[j] of base; each element is one running sum over j.
template <class T, class Isa>
MPMA_INLINE void add_rows(
    const T* weights, const T* base, int64_t stride, const int32_t* numbers, int64_t count, int64_t width, T* out) {
  constexpr int kVec = Simd<T, Isa>::kWidth, kWide = 8;
  int64_t d = 0;
  for (; d + kWide * kVec <= width; d += kWide * kVec)
    add_rows_chunk<T, Isa, kWide>(weights, base + d, stride, numbers, count, out + d);
  for (; d + kVec <= width; d += kVec)
    add_rows_chunk<T, Isa, 1>(weights, base + d, stride, numbers, count, out + d);
  for (; d < width; ++d) {
    T sum = 0;
    for (int64_t j = 0; j < count; ++j) sum += weights[j] * base[numbers[j] * stride + d];
    out[d] = sum;
  }
}

}  // namespace mpma::cpu
