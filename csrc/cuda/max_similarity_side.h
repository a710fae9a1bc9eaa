// An operand of the max form of token-patch similarity: tokens or patches.
#pragma once

#include "cuda/tiles.h"

namespace mpma::cuda::max_similarity {

// Items of `length` rows each, and which of the rows are real. What is not real is never read.
template <class T>
struct Side {
  const T* rows;
  int64_t item_stride, row_stride;  // in elements; the features of a row lie side by side
  const bool* mask;                 // nullptr: every row is real
  int64_t mask_item, mask_row;
  int64_t items;
  int length;

  MPMA_DEVICE bool within(int64_t item, int row) const { return item < items && row < length; }
  MPMA_DEVICE bool real(int64_t item, int row) const {
    return within(item, row) && (mask == nullptr || mask[item * mask_item + row * mask_row]);
  }
};

// A row of a tile that is made of segments of equal size. An item takes 2^log_segments of them, or the tile is a part of
// one item.
struct Place {
  int64_t item;
  int row;
};
template <int kSegment>
MPMA_DEVICE Place place(int tile_row, int64_t first_item, int first_row, int log_segments) {
  const int segment = tile_row / kSegment;
  const int within_item = segment & ((1 << log_segments) - 1);
  return {first_item + (segment >> log_segments), first_row + within_item * kSegment + tile_row % kSegment};
}

// Copies some features of the rows of a tile. A thread always takes the same rows, so that where they lie, and whether they
// are real, is found once for all the features. It keeps that in shared memory: registers are short in the product.
template <class T, int kRows, int kSegment, int kDepth, int kThreads>
struct RowCopier {
  using TileX = Tile<T, kRows, kDepth>;
  static constexpr int kChunks = kDepth / kVector<T>;
  static constexpr int kRowsAtOnce = kThreads / kChunks;
  static constexpr int kTimes = (kRows + kRowsAtOnce - 1) / kRowsAtOnce;
  static constexpr int kSize = kTimes * kThreads;  // pointers to take from SharedMemory
  static_assert(kThreads % kChunks == 0, "a chunk's column is a thread's");

  const T** sources;  // each thread's own, nullptr for rows that are not real

  MPMA_DEVICE void start(const Side<T>& side, int64_t item, int row, int log_segments) const {
    MPMA_NO_UNROLL
    for (int i = 0; i < kTimes; ++i) {
      const int tile_row = thread_index() / kChunks + i * kRowsAtOnce;
      const Place at = place<kSegment>(tile_row, item, row, log_segments);
      const bool real = tile_row < kRows && side.real(at.item, at.row);
      sources[i * kThreads + thread_index()] =
          real ? side.rows + at.item * side.item_stride + at.row * side.row_stride : nullptr;
    }
  }

  // Features `feature` to feature + kDepth - 1 of `width`; asynchronous if `aligned`.
  MPMA_DEVICE void copy(const TileX& tile, int feature, int width, bool aligned) const {
    const int column = thread_index() % kChunks * kVector<T>;
    if (aligned) {
      MPMA_UNROLL
      for (int i = 0; i < kTimes; ++i) {
        const int tile_row = thread_index() / kChunks + i * kRowsAtOnce;
        if (tile_row >= kRows) break;
        const T* row = sources[i * kThreads + thread_index()];
        const bool there = row != nullptr && feature + column < width;
        cp_async_16(&tile(tile_row, column), there ? row + feature + column : nullptr, there);
      }
      return;
    }
    MPMA_NO_UNROLL
    for (int i = 0; i < kTimes * kVector<T>; ++i) {
      const int tile_row = thread_index() / kChunks + i / kVector<T> * kRowsAtOnce, at = column + i % kVector<T>;
      if (tile_row >= kRows) break;
      const T* row = sources[i / kVector<T> * kThreads + thread_index()];
      tile(tile_row, at) = row != nullptr && feature + at < width ? row[feature + at] : T{};
    }
  }
};

}  // namespace mpma::cuda::max_similarity
