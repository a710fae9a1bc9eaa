// Maxima and where they stand: of a warp's scores, along its rows and along its columns.
#pragma once

#include "cuda/tiles.h"

namespace mpma::cuda::max_similarity {

constexpr int kNowhere = 0x7FFFFFFF;  // the index of no maximum
// What the sums of hidden scores start from, so that no score need be masked after the product: adding zeros leaves it as
// it is. Scores as low as that, which hide among the hidden, are found and everything is reduced again, ranked.
constexpr float kHidden = -0x1p127f;
constexpr float kLargest = 0x1.fffffep127f;

MPMA_DEVICE float infinity() { return bits_float(0x7F800000); }

// A score's rank among the scores of a warp: NaN, then infinity, numbers, minus infinity, and what is hidden. Numbers are
// their own ranks; the largest and the smallest one share theirs with the infinities.
MPMA_DEVICE float rank_of(float score, bool hidden) {
  const float number = score > kLargest ? kLargest : score < -kLargest ? -kLargest : score;
  return hidden ? -infinity() : score != score ? infinity() : number;
}
MPMA_DEVICE float score_of_rank(float rank) {
  return rank > kLargest ? bits_float(0x7FC00000) : rank == kLargest ? infinity() : rank == -kLargest ? -infinity() : rank;
}

struct Best {
  float value;
  int index;
};

MPMA_DEVICE Best no_best() { return {-infinity(), kNowhere}; }

// The better of two numbers: of equal values the one with the lower index.
MPMA_DEVICE Best better_of(const Best& a, const Best& b) {
  return b.value > a.value || (b.value == a.value && b.index < a.index) ? b : a;
}

// The same of any two: a NaN is above all numbers, and any number above no maximum.
MPMA_DEVICE Best better_of_any(const Best& a, const Best& b) {
  if (a.index == kNowhere || b.index == kNowhere) return b.index == kNowhere ? a : b;
  const bool a_nan = a.value != a.value, b_nan = b.value != b.value;
  if (a_nan || b_nan) return b_nan && (!a_nan || b.index < a.index) ? b : a;
  return better_of(a, b);
}

// A step of a reduction over lanes in which the work is halved with every step: two lanes that differ in `bit` of their
// number have a maximum each of two things; the one without the bit gets the combined one of the first, the other of the
// second.
MPMA_DEVICE Best halve(const Best& first, const Best& second, int bit) {
  const bool upper = (lane_index() & bit) != 0;
  const Best kept = upper ? second : first, given = upper ? first : second;
  return better_of(kept, {shuffle_xor(given.value, bit), shuffle_xor(given.index, bit)});
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
template <int kCount, int kSize>
MPMA_DEVICE void halve(Best (&best)[kSize], int bit, Left& left) {
  constexpr int kHalf = (kCount + 1) / 2;
  MPMA_UNROLL
  for (int i = 0; i < kHalf; ++i)  // an odd one out is combined in both lanes
    best[i] = halve(best[i], best[i + kHalf < kCount ? i + kHalf : i], bit);
  left.halve(kHalf, bit);
}

// A lane's rows (2 kM of them) and columns (2 kN) by number, a bit each in a mask.
MPMA_DEVICE int row_of_slot(int slot) { return slot / 2 * 16 + slot % 2 * 8 + lane_index() / 4; }
MPMA_DEVICE int column_of_slot(int slot) { return slot / 2 * 8 + slot % 2 + lane_index() % 4 * 2; }

// The maximum of what this lane holds of a row.
template <int kN>
MPMA_DEVICE Best best_of_row(const Accumulator<4, kN>& scores, int slot) {
  Best best = {scores.sum[slot / 2][0].value[slot % 2 * 2], 0};
  MPMA_UNROLL
  for (int i = 1; i < 2 * kN; ++i) {
    const Best x = {scores.sum[slot / 2][i / 2].value[slot % 2 * 2 + i % 2], i / 2 * 8 + i % 2};
    if (x.value > best.value) best = x;
  }
  best.index += lane_index() % 4 * 2;
  return best;
}

// The same of a column.
template <int kN>
MPMA_DEVICE Best best_of_column(const Accumulator<4, kN>& scores, int slot) {
  Best best = {scores.sum[0][slot / 2].value[slot % 2], 0};
  MPMA_UNROLL
  for (int i = 1; i < 8; ++i) {
    const Best x = {scores.sum[i / 2][slot / 2].value[i % 2 * 2 + slot % 2], i / 2 * 16 + i % 2 * 8};
    if (x.value > best.value) best = x;
  }
  best.index += lane_index() / 4;
  return best;
}

// The maxima of rows over all the warp's columns: a lane gets those of the two slots `left`, in best[0] and best[1].
template <int kN>
MPMA_DEVICE Left best_of_rows(const Accumulator<4, kN>& scores, Best (&best)[4]) {
  Left left = {0, 8};
  MPMA_UNROLL
  for (int i = 0; i < 4; ++i)  // at once, so that fewer are alive
    best[i] = halve(best_of_row(scores, i), best_of_row(scores, i + 4), 1);
  left.halve(4, 1);
  halve<4>(best, 2, left);
  return left;
}

// The maxima of columns over all the warp's rows: a lane gets those of the slots `left`, up to two.
template <int kN>
MPMA_DEVICE Left best_of_columns(const Accumulator<4, kN>& scores, Best (&best)[kN]) {
  Left left = {0, 2 * kN};
  MPMA_UNROLL
  for (int i = 0; i < kN; ++i) best[i] = halve(best_of_column(scores, i), best_of_column(scores, i + kN), 4);
  left.halve(kN, 4);
  halve<kN>(best, 8, left);
  halve<(kN + 1) / 2>(best, 16, left);
  return left;
}

}  // namespace mpma::cuda::max_similarity
