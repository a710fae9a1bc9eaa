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

// A step of a reduction over lanes in which the work is halved with every step: two lanes that differ in `bit` of their
// number have a maximum each of two things; the one without the bit gets the combined one of the first, the other of the
// second.
template <bool kCareful>
MPMA_DEVICE Best halve(const Best& first, const Best& second, int bit) {
  const bool upper = (lane_index() & bit) != 0;
  const Best kept = upper ? second : first, given = upper ? first : second;
  return better_of<kCareful>(kept, {shuffle_xor(given.value, bit), shuffle_xor(given.index, bit)});
}

// Which of a lane's rows or columns are left to it.
struct Left {
  int first, count;

  MPMA_DEVICE void halve(int half, int bit) {
    const bool upper = (lane_index() & bit) != 0;
    const int rest = count > half ? count - half : 0;
    first += upper ? half : 0;
    count = upper ? rest : (count < half ? count : half);
  }
};

// The same for kCount maxima of each lane: the first half of them or the second, from best[0] on.
template <bool kCareful, int kCount, int kSize>
MPMA_DEVICE void halve(Best (&best)[kSize], int bit, Left& left) {
  constexpr int kHalf = (kCount + 1) / 2;
  MPMA_UNROLL
  for (int i = 0; i < kHalf; ++i)  // an odd one out is combined in both lanes
    best[i] = halve<kCareful>(best[i], best[i + kHalf < kCount ? i + kHalf : i], bit);
  left.halve(kHalf, bit);
}

// A lane's rows (2 kM of them) and columns (2 kN) by number, a bit each in a mask.
MPMA_DEVICE int row_slot(int row) { return row / 16 * 2 + row / 8 % 2; }
MPMA_DEVICE int column_slot(int column) { return column / 8 * 2 + column % 2; }
MPMA_DEVICE int row_of_slot(int slot) { return slot / 2 * 16 + slot % 2 * 8 + lane_index() / 4; }
MPMA_DEVICE int column_of_slot(int slot) { return slot / 2 * 8 + slot % 2 + lane_index() % 4 * 2; }

// The maximum of what this lane holds of a row; with kCareful only over the columns whose bit is set.
template <bool kCareful, int kN>
MPMA_DEVICE Best best_of_row(const Accumulator<4, kN>& scores, int slot, uint32_t columns) {
  Best best = kCareful ? no_best() : Best{scores.sum[slot / 2][0].value[slot % 2 * 2], 0};
  MPMA_UNROLL
  for (int i = 0; i < 2 * kN; ++i) {
    const Best x = {scores.sum[slot / 2][i / 2].value[slot % 2 * 2 + i % 2], i / 2 * 8 + i % 2};
    if constexpr (kCareful) {
      if ((columns >> i & 1) != 0) best = better_of<true>(best, x);
    } else {
      if (x.value > best.value) best = x;
    }
  }
  if (best.index != kNowhere) best.index += lane_index() % 4 * 2;
  return best;
}

// The same of a column, over the rows whose bit is set.
template <bool kCareful, int kN>
MPMA_DEVICE Best best_of_column(const Accumulator<4, kN>& scores, int slot, uint32_t rows) {
  Best best = kCareful ? no_best() : Best{scores.sum[0][slot / 2].value[slot % 2], 0};
  MPMA_UNROLL
  for (int i = 0; i < 8; ++i) {
    const Best x = {scores.sum[i / 2][slot / 2].value[i % 2 * 2 + slot % 2], i / 2 * 16 + i % 2 * 8};
    if constexpr (kCareful) {
      if ((rows >> i & 1) != 0) best = better_of<true>(best, x);
    } else {
      if (x.value > best.value) best = x;
    }
  }
  if (best.index != kNowhere) best.index += lane_index() / 4;
  return best;
}

// The maxima of rows over all the warp's columns: a lane gets those of the two slots `left`, in best[0] and best[1].
template <bool kCareful, int kN>
MPMA_DEVICE Left best_of_rows(const Accumulator<4, kN>& scores, uint32_t columns, Best (&best)[4]) {
  Left left = {0, 8};
  MPMA_UNROLL
  for (int i = 0; i < 4; ++i)  // at once, so that fewer are alive
    best[i] = halve<kCareful>(
        best_of_row<kCareful>(scores, i, columns), best_of_row<kCareful>(scores, i + 4, columns), 1);
  left.halve(4, 1);
  halve<kCareful, 4>(best, 2, left);
  return left;
}

// The maxima of columns over all the warp's rows: a lane gets those of the slots `left`, up to two.
template <bool kCareful, int kN>
MPMA_DEVICE Left best_of_columns(const Accumulator<4, kN>& scores, uint32_t rows, Best (&best)[kN]) {
  Left left = {0, 2 * kN};
  MPMA_UNROLL
  for (int i = 0; i < kN; ++i)
    best[i] = halve<kCareful>(
        best_of_column<kCareful>(scores, i, rows), best_of_column<kCareful>(scores, i + kN, rows), 4);
  left.halve(kN, 4);
  halve<kCareful, kN>(best, 8, left);
  halve<kCareful, (kN + 1) / 2>(best, 16, left);
  return left;
}

}  // namespace mpma::cuda::max_similarity
