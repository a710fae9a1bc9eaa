// What the kernels of masked attention are given, and where in it a block works.
//
// Padded and packed sequences are one case. An item is a sample of the padded form, or a sequence of the packed one,
// whose steps from item to item are 0 and whose rows begin at its offset.
#pragma once

#include <type_traits>

#include "cuda/launch.h"
#include "cuda/shared_memory.h"
#include "cuda/tiles.h"

namespace mpma::cuda {

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr int kWidestHead = 128;

MPMA_DEVICE float infinity() { return bits_float(0x7F800000); }

// Row i of head h of item b begins at data + b * item + i * row + h * head, in elements; its own are neighbours.
template <class T>
struct Rows {
  T* data = nullptr;  // null: a mask that hides nothing, a gradient that nobody needs
  int64_t item = 0, row = 0, head = 0;

  MPMA_HOST_DEVICE T* at(int64_t b, int64_t i, int64_t h) const { return data + b * item + i * row + h * head; }
};

struct AttentionSizes {
  int items, heads;
  int queries, keys;             // of the longest item
  int64_t query_rows, key_rows;  // of the packed form, in all
  int width;
};

struct AttentionDropout {
  const int64_t* seed = nullptr;  // null: none
  uint32_t threshold = 0;         // a weight is dropped iff its word is below
  float kept = 1.f;               // what a kept weight is multiplied with
};

template <class T>
struct Attention {
  Rows<const T> query, key, value;
  Rows<const uint8_t> mask;               // of keys, not 0 = attend; all heads share it
  const int32_t *offsets_q, *offsets_k;   // (items + 1), ascending within the rows; null: padded
  AttentionSizes sizes;
  float scale;
  AttentionDropout dropout;
  bool aligned;  // every operand's rows can be read 16 bytes at a time

  MPMA_HOST_DEVICE bool packed() const { return offsets_q != nullptr; }
  // Of packed sequences two more: the rows before the first and after the last.
  MPMA_HOST_DEVICE int64_t places() const { return (sizes.items + (packed() ? 2 : 0)) * int64_t{1} * sizes.heads; }
};

template <class T>
bool aligned_rows(const Rows<T>& rows) {
  return aligned_rows(rows.data, rows.item, rows.row, rows.head);
}

// Which part of which head of which item a block works on. Parts are neighbours in the grid.
struct Place {
  int part, head, item;
};

template <class T>
MPMA_DEVICE Place place_of(const Attention<T>& a, int parts) {
  const auto block = static_cast<uint32_t>(block_x());
  const uint32_t rest = block / parts;
  const auto head = static_cast<int>(rest % a.sizes.heads);
  return {static_cast<int>(block % parts), head, static_cast<int>(rest / a.sizes.heads) - (a.packed() ? 1 : 0)};
}

struct Extent {
  int64_t start;  // the first row
  int length;     // rows that take part
  int64_t rows;   // rows in all: those that do not take part get zeros
};

// Of an item's queries or keys, by the offsets, the number of all rows and the length of the longest item.
template <class T>
MPMA_DEVICE Extent extent_of(const Attention<T>& a, const int32_t* offsets, int item, int64_t rows, int longest) {
  if (offsets == nullptr) return {0, longest, longest};
  const int64_t start = item < 0 ? 0 : offsets[item], stop = item < a.sizes.items ? offsets[item + 1] : rows;
  const bool sequence = item >= 0 && item < a.sizes.items;
  return {start, sequence ? static_cast<int>(stop - start < longest ? stop - start : longest) : 0, stop - start};
}
template <class T>
MPMA_DEVICE Extent queries_of(const Attention<T>& a, int item) {
  return extent_of(a, a.offsets_q, item, a.sizes.query_rows, a.sizes.queries);
}
template <class T>
MPMA_DEVICE Extent keys_of(const Attention<T>& a, int item) {
  return extent_of(a, a.offsets_k, item, a.sizes.key_rows, a.sizes.keys);
}

// Fills the rows of an item that do not take part; the blocks of its parts share them.
template <class T>
MPMA_DEVICE void fill_rest(
    const Rows<T>& to, const Place& place, int parts, const Extent& extent, int width, float value) {
  if (to.data == nullptr) return;
  T* const rows = to.at(place.item, extent.start, place.head);
  const int64_t end = extent.rows * width, step = int64_t{1} * parts * thread_count();
  int64_t i = int64_t{1} * extent.length * width + int64_t{1} * place.part * thread_count() + thread_index();
  for (; i < end; i += step) rows[i / width * to.row + i % width] = from_float<T>(value);
}

// Bit i: whether row i of a tile takes part.
template <int kRows>
using RealRows = std::conditional_t<(kRows > 32), uint64_t, uint32_t>;

// Of the keys from `first` on, the same in all lanes.
template <int kKeys, class T>
MPMA_DEVICE RealRows<kKeys> real_keys(const Attention<T>& a, int item, const Extent& keys, int first) {
  RealRows<kKeys> bits = 0;
  MPMA_UNROLL
  for (int begin = 0; begin < kKeys; begin += kWarp) {
    const int j = first + begin + lane_index();
    bool real = begin + lane_index() < kKeys && j < keys.length;
    if (real && a.mask.data != nullptr) real = *a.mask.at(item, keys.start + j, 0) != 0;
    bits |= static_cast<RealRows<kKeys>>(ballot(real)) << begin;
  }
  return bits;
}

// Of the queries from `first` on.
template <int kQueries>
MPMA_DEVICE RealRows<kQueries> real_queries(const Extent& queries, int first) {
  const int left = queries.length - first;
  const RealRows<kQueries> all = ~RealRows<kQueries>{0};
  return left >= kQueries ? all : left <= 0 ? 0 : ~(all << left);
}

// Fills a tile with rows of `width` elements that begin at start + row * step, with zeros where one does not take part: it
// is never read. As load_tile, which is slower: cp_async_commit, cp_async_wait and a barrier come before the first use.
template <class T, int kRows, int kWidth>
MPMA_DEVICE void load_rows(
    const Tile<T, kRows, kWidth>& tile, const T* start, int64_t step, RealRows<kRows> real, int width, bool aligned,
    int thread, int threads) {
  if (!aligned) {
    MPMA_NO_UNROLL
    for (int i = thread; i < kRows * kWidth; i += threads) {
      const int row = i / kWidth, column = i % kWidth;
      tile(row, column) = (real >> row & 1) != 0 && column < width ? start[row * step + column] : T{};
    }
    return;
  }
  // Every thread keeps its column, because a row's chunks are a divisor of a warp.
  constexpr int kChunks = kWidth / kVector<T>;
  static_assert(kWarp % kChunks == 0, "whole rows for a warp");
  const int column = thread % kChunks * kVector<T>, rows = threads / kChunks;
  const bool inside = column < width;
  MPMA_NO_UNROLL
  for (int row = thread / kChunks; row < kRows; row += rows) {
    const bool copied = inside && (real >> row & 1) != 0;
    cp_async_16(&tile(row, column), copied ? start + row * step + column : nullptr, copied);
  }
}

MPMA_HOST_DEVICE inline int64_t ceil_divide(int64_t x, int64_t y) { return (x + y - 1) / y; }

}  // namespace mpma::cuda
