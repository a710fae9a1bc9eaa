// Matrix products of small blocks: a row-major left side times a right side packed in panels.
#pragma once

#include "cpu/simd.h"

namespace mpma::cpu {

// A micro-tile is kMicroRows x (two vectors): 12 accumulators, two of the right side and one broadcast fill the 16
// registers of AVX2 and SSE.
constexpr int kMicroRows = 6;

template <class T, class Isa>
constexpr int kPanel = 2 * Simd<T, Isa>::kWidth;

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// A (rows, heads, width) operand whose last dimension is contiguous.
template <class T>
struct View {
  const T* data;
  int64_t row_stride, head_stride;

  const T* at(int64_t row, int64_t head) const { return data + row * row_stride + head * head_stride; }
};

// Panel of rows [row0, row0 + kPanel), transposed: dst[d][row - row0], zero where there is no such row.
template <class T, class Isa>
MPMA_INLINE void pack_transposed(const View<T>& src, int64_t head, int64_t row0, int64_t rows, int64_t width, T* dst) {
  for (int64_t i = 0; i < kPanel<T, Isa>; ++i) {
    const T* row = row0 + i < rows ? src.at(row0 + i, head) : nullptr;
    for (int64_t d = 0; d < width; ++d) dst[d * kPanel<T, Isa> + i] = row ? row[d] : T(0);
  }
}

// Panel of columns [column0, column0 + kPanel): dst[row][d - column0], zero beyond the width.
template <class T, class Isa>
MPMA_INLINE void pack_columns(
    const View<T>& src, int64_t head, int64_t column0, int64_t rows, int64_t width, T* dst) {
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t d = 0; d < kPanel<T, Isa>; ++d)
      dst[row * kPanel<T, Isa> + d] = column0 + d < width ? src.at(row, head)[column0 + d] : T(0);
}

// rows x width of one head, zero rows appended up to `padded`.
template <class T>
MPMA_INLINE void copy_rows(
    const View<T>& src, int64_t head, int64_t row0, int64_t rows, int64_t padded, int64_t width, T* dst) {
  for (int64_t i = 0; i < rows; ++i) std::memcpy(dst + i * width, src.at(row0 + i, head), width * sizeof(T));
  std::memset(dst + rows * width, 0, (padded - rows) * width * sizeof(T));
}

enum class Store { kScaled, kAdd };

// c[i][j] = alpha * sum_k a[i][k] b[k][j], or c += sum. Each element is one running sum over k, whatever the tiling.
template <class T, class Isa, Store store>
MPMA_INLINE void micro_tile(int64_t depth, const T* a, int64_t lda, const T* b, T alpha, T* c, int64_t ldc) {
  using S = Simd<T, Isa>;
  typename S::Vec sum[kMicroRows][2] = {};
  for (int64_t k = 0; k < depth; ++k) {
    const auto b0 = S::load(b + k * kPanel<T, Isa>), b1 = S::load(b + k * kPanel<T, Isa> + S::kWidth);
#pragma GCC unroll 6
    for (int i = 0; i < kMicroRows; ++i) {
      const auto x = S::broadcast(a[i * lda + k]);
      sum[i][0] += x * b0;
      sum[i][1] += x * b1;
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < kMicroRows; ++i)
    for (int j = 0; j < 2; ++j) {
      T* p = c + i * ldc + j * S::kWidth;
      S::store(p, store == Store::kAdd ? S::load(p) + sum[i][j] : sum[i][j] * alpha);
    }
}

// c (rows, columns) from a (rows, depth) and panels of depth x kPanel; rows and columns are multiples of the tile.
template <class T, class Isa, Store store>
MPMA_INLINE void gemm(
    int64_t rows, int64_t columns, int64_t depth, const T* a, int64_t lda, const T* panels, int64_t panel_stride,
    T alpha, T* c, int64_t ldc) {
  for (int64_t j = 0; j < columns; j += kPanel<T, Isa>, panels += panel_stride)
    for (int64_t i = 0; i < rows; i += kMicroRows)
      micro_tile<T, Isa, store>(depth, a + i * lda, lda, panels, alpha, c + i * ldc + j, ldc);
}

}  // namespace mpma::cpu
