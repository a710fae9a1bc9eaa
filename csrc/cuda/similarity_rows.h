// The rows of token-patch similarity, tokens or patches: as they come, and packed for the products.
#pragma once

#include "cuda/launch.h"
#include "cuda/machine.h"

namespace mpma::cuda {

// Which rows are real; everything where `data` is null.
struct RealMask {
  const uint8_t* data;
  int64_t by_item, by_row;

  MPMA_DEVICE bool operator()(int64_t item, int64_t row) const {
    return data == nullptr || data[item * by_item + row * by_row] != 0;
  }
};

// (items, length, width), any strides.
template <class T>
struct FeatureRows {
  const T* data;
  int64_t items, length, width;
  int64_t by_item, by_row, by_column;
  RealMask real;
};

// The same in rows that the products read without asking: `length` and `width` rounded up, zeros for what is not real.
template <class T>
struct PackedRows {
  T* data;
  int64_t length, width;
};

constexpr int kPackThreads = 256;

MPMA_DEVICE float sum_of_lanes(float x) {
  for (int lanes = 1; lanes < kWarp; lanes *= 2) x += shuffle_xor(x, lanes);
  return x;
}

// A warp for each row. square (items, packed length), if not null, becomes the sum of the row's squares.
template <class T>
MPMA_KERNEL(kPackThreads, 1)
pack_rows_kernel(FeatureRows<T> from, PackedRows<T> to, float* square) {
  const int64_t row = block_x() * warp_count() + warp_index();
  if (row >= from.items * to.length) return;  // the whole warp, and no barrier follows
  const int64_t item = row / to.length, position = row % to.length;
  const bool real = position < from.length && from.real(item, position);
  const T* source = from.data + item * from.by_item + position * from.by_row;
  float sum = 0.f;
  for (int64_t d = lane_index(); d < to.width; d += kWarp) {
    const T x = real && d < from.width ? source[d * from.by_column] : T{};
    to.data[row * to.width + d] = x;
    sum = fma_rn(to_float(x), to_float(x), sum);
  }
  sum = sum_of_lanes(sum);
  if (square != nullptr && lane_index() == 0) square[row] = sum;
}

template <class T>
void launch_pack_rows(const FeatureRows<T>& from, const PackedRows<T>& to, float* square, void* stream) {
  constexpr int kRowsABlock = kPackThreads / kWarp;
  const Launch how = {{(from.items * to.length + kRowsABlock - 1) / kRowsABlock}, kPackThreads, 0, stream};
  launch<pack_rows_kernel<T>>(how, from, to, square);
}

// Gradients of rows, from float32 sums with the packed rows' distances to contiguous rows of the operand's dtype:
// sums + of_itself · row. Exactly zero where not real. of_itself (items, packed length) may be null, and so may sums.
template <class T>
MPMA_KERNEL(kPackThreads, 1)
unpack_gradients_kernel(
    FeatureRows<T> like, PackedRows<T> packed, const float* sums, const float* of_itself, T* gradients) {
  const int64_t row = block_x() * warp_count() + warp_index();
  if (row >= like.items * like.length) return;
  const int64_t item = row / like.length, position = row % like.length;
  const bool real = like.real(item, position);
  const int64_t there = item * packed.length + position;
  // A token that has no part in its own gradient, such as one clamped, may be infinite without a trace.
  const float share = real && of_itself != nullptr ? of_itself[there] : 0.f;
  for (int64_t d = lane_index(); d < like.width; d += kWarp) {
    float x = 0.f;
    if (real) {
      if (sums != nullptr) x = sums[there * packed.width + d];
      if (share != 0.f) x = fma_rn(share, to_float(packed.data[there * packed.width + d]), x);
    }
    gradients[row * like.width + d] = from_float<T>(x);
  }
}

template <class T>
void launch_unpack_gradients(
    const FeatureRows<T>& like, const PackedRows<T>& packed, const float* sums, const float* of_itself, T* gradients,
    void* stream) {
  constexpr int kRowsABlock = kPackThreads / kWarp;
  const Launch how = {{(like.items * like.length + kRowsABlock - 1) / kRowsABlock}, kPackThreads, 0, stream};
  launch<unpack_gradients_kernel<T>>(how, like, packed, sums, of_itself, gradients);
}

constexpr int kFillThreads = 256;

MPMA_KERNEL(kFillThreads, 1)
fill_zeros_kernel(float* data, int64_t count) {
  const int64_t i = block_x() * kFillThreads + thread_index();
  if (i < count) data[i] = 0.f;
}

inline void launch_fill_zeros(float* data, int64_t count, void* stream) {
  launch<fill_zeros_kernel>({{(count + kFillThreads - 1) / kFillThreads}, kFillThreads, 0, stream}, data, count);
}

}  // namespace mpma::cuda
