// Maxima and where they stand: of a warp's scores, along its rows and along its columns.
#pragma once

#include "cuda/tiles.h"

namespace mpma::cuda::max_similarity {

constexpr int kNowhere = 0x7FFFFFFF;  // the index of no maximum
// What the sums of hidden scores start from, so that no score need be masked after the product: adding zeros leaves it as
// it is. Scores as low as that, which hide among the hidden, are found and looked at again one by one.
constexpr float kHidden = -0x1p127f;

struct Best {
  float value;
  int index;
};

MPMA_DEVICE Best no_best() { return {-bits_float(0x7F800000), kNowhere}; }

// The better of two: of equal values the one with the lower index. A NaN is above all numbers, and any number above no
// maximum; without kCareful there are neither.
template <bool kCareful>
MPMA_DEVICE Best better_of(const Best& a, const Best& b) {
  bool take = b.value > a.value || (b.value == a.value && b.index < a.index);
  if constexpr (kCareful) {
    const bool a_nan = a.value != a.value, b_nan = b.value != b.value;
    if (a_nan || b_nan) take = b_nan && (!a_nan || b.index < a.index);
    if (a.index == kNowhere || b.index == kNowhere) take = b.index != kNowhere;
  }
  return take ? b : a;
}

// One step of a reduction over lanes in which the work is halved with every step. Two lanes that differ in `bit` of their
// number hold kCount maxima each; afterwards the one without the bit holds the first half of the combined ones, the other
// the second, both from best[0] on. `first` and `count` keep track of which, and how many, a lane holds.
template <bool kCareful, int kCount, int kSize>
MPMA_DEVICE void halve(Best (&best)[kSize], int bit, int& first, int& count) {
  constexpr int kHalf = (kCount + 1) / 2;
  const bool upper = (lane_index() & bit) != 0;
  MPMA_UNROLL
  for (int i = 0; i < kHalf; ++i) {
    const int j = i + kHalf < kCount ? i + kHalf : i;  // an odd one out is combined in both lanes
    const Best kept = upper ? best[j] : best[i], given = upper ? best[i] : best[j];
    const Best other = {shuffle_xor(given.value, bit), shuffle_xor(given.index, bit)};
    best[i] = better_of<kCareful>(kept, other);
  }
  first += upper ? kHalf : 0;
  const int rest = count - kHalf;
  count = upper ? (rest > 0 ? rest : 0) : (count < kHalf ? count : kHalf);
}

// A bit for each row (2 kM of them) or column (2 kN) of a lane.
MPMA_DEVICE int row_slot(int row) { return row / 16 * 2 + row / 8 % 2; }
MPMA_DEVICE int column_slot(int column) { return column / 8 * 2 + column % 2; }
MPMA_DEVICE int row_of_slot(int slot) { return slot / 2 * 16 + slot % 2 * 8 + lane_index() / 4; }
MPMA_DEVICE int column_of_slot(int slot) { return slot / 2 * 8 + slot % 2 + lane_index() % 4 * 2; }

// The maxima of a lane's rows over all the warp's columns: best[0] and best[1], of slots `first` and first + 1. With
// kCareful only over columns whose bit is set in `columns`.
template <bool kCareful, int kN>
MPMA_DEVICE void best_of_rows(const Accumulator<4, kN>& scores, uint32_t columns, Best (&best)[8], int& first) {
  MPMA_UNROLL
  for (int slot = 0; slot < 8; ++slot) {
    Best b = kCareful ? no_best() : Best{scores.sum[slot / 2][0].value[slot % 2 * 2], 0};
    MPMA_UNROLL
    for (int i = 0; i < 2 * kN; ++i) {
      const Best x = {scores.sum[slot / 2][i / 2].value[slot % 2 * 2 + i % 2], i / 2 * 8 + i % 2};
      if constexpr (kCareful) {
        if ((columns >> i & 1) != 0) b = better_of<true>(b, x);
      } else {
        if (x.value > b.value) b = x;
      }
    }
    if (b.index != kNowhere) b.index += lane_index() % 4 * 2;
    best[slot] = b;
  }
  int count = 8;
  first = 0;
  halve<kCareful, 8>(best, 1, first, count);
  halve<kCareful, 4>(best, 2, first, count);
}

// The maxima of a lane's columns over all the warp's rows: `count` (up to 2) of them, from slot `first` on. With kCareful
// only over rows whose bit is set in `rows`.
template <bool kCareful, int kN>
MPMA_DEVICE void best_of_columns(
    const Accumulator<4, kN>& scores, uint32_t rows, Best (&best)[2 * kN], int& first, int& count) {
  MPMA_UNROLL
  for (int slot = 0; slot < 2 * kN; ++slot) {
    Best b = kCareful ? no_best() : Best{scores.sum[0][slot / 2].value[slot % 2], 0};
    MPMA_UNROLL
    for (int i = 0; i < 8; ++i) {
      const Best x = {scores.sum[i / 2][slot / 2].value[i % 2 * 2 + slot % 2], i / 2 * 16 + i % 2 * 8};
      if constexpr (kCareful) {
        if ((rows >> i & 1) != 0) b = better_of<true>(b, x);
      } else {
        if (x.value > b.value) b = x;
      }
    }
    if (b.index != kNowhere) b.index += lane_index() / 4;
    best[slot] = b;
  }
  count = 2 * kN;
  first = 0;
  constexpr int kHalf = kN, kQuarter = (kHalf + 1) / 2;
  halve<kCareful, 2 * kN>(best, 4, first, count);
  halve<kCareful, kHalf>(best, 8, first, count);
  halve<kCareful, kQuarter>(best, 16, first, count);
}

}  // namespace mpma::cuda::max_similarity
