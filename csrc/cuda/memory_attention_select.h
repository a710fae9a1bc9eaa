// Exact selection of a row's K largest scores by one warp. Ties go to the lower slot, -0 equals +0, and a NaN is larger than
// everything, so that it is selected and shows in the output.
//
// Scores come a chunk at a time. What may still be among the best is a row's candidates, in order of their slots: those not
// below a cut that is never above the K-th largest score. The first cut is the K-th largest of the maxima of groups of four
// scores, which about 1.4 K of 512 scores in random order reach; later ones come from the candidates.
#pragma once

#include "cuda/memory_attention.h"

namespace mpma::cuda {

// A row's candidates, and how many are too many to wait for the next chunk with.
constexpr int kCandidates = 128, kWaiting = 64;

// --- Integers in the order of the scores -----------------------------------------------------------------------------

constexpr int32_t kLargestKey = 0x7FFFFFFF;
constexpr int32_t kNoKey = -kLargestKey - 1;  // below the key of every score

MPMA_DEVICE int32_t key_of(float score) {
  if (score != score) return kLargestKey;
  // Adding zero makes +0 of -0. Negative numbers order the other way round in all bits but the sign.
  const auto bits = static_cast<int32_t>(float_bits(add_rn(score, 0.f)));
  return bits ^ ((bits >> 31) & kLargestKey);
}

MPMA_DEVICE float score_of(int32_t key) { return bits_float(static_cast<uint32_t>(key < 0 ? key ^ kLargestKey : key)); }

// A number such that at least k of the warp's keys are not below it and fewer than k above it. There are at least k keys.
// Bisection, which ends as soon as exactly k keys remain.
template <int kCount>
MPMA_DEVICE int32_t kth_largest(const int32_t (&key)[kCount], int k) {
  int32_t low = kLargestKey, high = kNoKey;
  MPMA_UNROLL
  for (int i = 0; i < kCount; ++i) {
    low = key[i] != kNoKey && key[i] < low ? key[i] : low;
    high = key[i] > high ? key[i] : high;
  }
  low = warp_minimum(low);
  high = warp_maximum(high);
  while (low < high) {
    const uint32_t gap = static_cast<uint32_t>(high) - static_cast<uint32_t>(low);
    const auto middle = static_cast<int32_t>(static_cast<uint32_t>(low) + gap / 2 + (gap & 1));
    int32_t count = 0;
    MPMA_UNROLL
    for (int i = 0; i < kCount; ++i) count += key[i] >= middle;
    count = warp_sum(count);
    if (count < k) {
      high = middle - 1;
    } else {
      low = middle;
      if (count == k) break;
    }
  }
  return low;
}

// --- Order within a warp ---------------------------------------------------------------------------------------------

// The lowest `count` of the bits that are set.
MPMA_DEVICE uint32_t lowest_bits(uint32_t bits, int count) {
  while (bits != 0 && popcount(bits) > count) bits ^= 0x80000000u >> leading_zeros(bits);
  return bits;
}

// Which of the kCount keys from kFirst on are taken, a bit each: those above `last`, and of those equal to it the first
// `ties` in order of lanes and bits; ties becomes what is left of it.
template <int kFirst, int kCount, int kAll>
MPMA_DEVICE uint32_t taken(const int32_t (&key)[kAll], int32_t last, int& ties) {
  uint32_t above = 0, equal = 0;
  MPMA_UNROLL
  for (int i = 0; i < kCount; ++i) {
    above |= static_cast<uint32_t>(key[kFirst + i] > last) << i;
    equal |= static_cast<uint32_t>(key[kFirst + i] == last) << i;
  }
  int total;
  const int before = sum_before(popcount(equal), total);
  equal = lowest_bits(equal, ties - before);
  ties = total < ties ? ties - total : 0;
  return above | equal;
}

// --- A chunk of scores in shared memory ------------------------------------------------------------------------------

// kRows x kColumns scores. A lane reads kColumns / 32 neighbours 16 bytes at a time: the groups of four are permuted so
// that 8 lanes then meet 8 different banks, and rows lie such that the pairs of an accumulator do as well.
template <int kRows, int kColumns>
struct ScoreChunk {
  static constexpr int kStride = kColumns + 8, kSize = kRows * kStride, kEach = kColumns / kWarp;

  float* data;

  MPMA_DEVICE float* at(int row, int column) const {
    const int group = column / 4;
    return data + row * kStride + (group ^ (group / 8 % 8)) * 4 + column % 4;
  }
};

// --- A row's candidates ----------------------------------------------------------------------------------------------

// In shared memory: up to kCandidates pairs of a score's bits and a slot, their number, and the cut.
struct RowCandidates {
  Bytes8* entry;
  int* count;
  float* cut;
};

// Leaves the topk best of the candidates and, beside them, the kEach scores of every lane of which the first `real` count,
// those of slots `slot`, slot + 1, ... and all later than the candidates. There are more than topk.
template <int kEach>
MPMA_DEVICE void keep_best(
    const RowCandidates& row, int count, int topk, const float (&score)[kEach], int slot, int real) {
  constexpr int kOld = kCandidates / kWarp, kAll = kOld + kEach;
  Bytes8 entry[kOld];
  int32_t key[kAll];
  MPMA_UNROLL
  for (int i = 0; i < kOld; ++i) {
    const int place = kOld * lane_index() + i;
    key[i] = kNoKey;
    if (place < count) {
      entry[i] = load_8(row.entry + place);
      key[i] = key_of(bits_float(entry[i].word[0]));
    }
  }
  MPMA_UNROLL
  for (int i = kOld; i < kAll; ++i) key[i] = i - kOld < real ? key_of(score[i - kOld]) : kNoKey;
  const int32_t last = kth_largest(key, topk);
  int above = 0, old_count;
  MPMA_UNROLL
  for (int i = 0; i < kAll; ++i) above += key[i] > last;
  int ties = topk - warp_sum(above);
  const uint32_t old_bits = taken<0, kOld>(key, last, ties);
  int place = sum_before(popcount(old_bits), old_count);
  warp_barrier();
  MPMA_UNROLL
  for (int i = 0; i < kOld; ++i)
    if (old_bits >> i & 1) store_8(row.entry + place++, entry[i]);
  if constexpr (kEach > 1) {
    const uint32_t new_bits = taken<kOld, kEach>(key, last, ties);
    int new_count;
    place = old_count + sum_before(popcount(new_bits), new_count);
    MPMA_UNROLL
    for (int i = 0; i < kEach; ++i)
      if (new_bits >> i & 1)
        store_8(row.entry + place++, Bytes8{{float_bits(score[i]), static_cast<uint32_t>(slot + i)}});
  }
  if (lane_index() == 0) {
    *row.count = topk;
    // Later slots lose ties: they must score more than the last one that is kept.
    *row.cut = score_of(last == kLargestKey ? last : last + 1);
  }
  warp_barrier();
}

// Leaves the topk best of more than topk candidates.
MPMA_DEVICE void keep_best(const RowCandidates& row, int count, int topk) {
  const float nothing[1] = {0.f};
  keep_best(row, count, topk, nothing, 0, 0);
}

// Takes the scores of slots slot0, slot0 + 1, ... into the candidates of their row, which has none before slot 0. The
// columns from slot `slots` on hold -inf.
template <int kRows, int kColumns>
MPMA_DEVICE void take_chunk(
    const RowCandidates& row, const ScoreChunk<kRows, kColumns>& chunk, int number, int slot0, int slots, int topk) {
  constexpr int kEach = ScoreChunk<kRows, kColumns>::kEach;
  const int column = lane_index() * kEach;
  float score[kEach];
  int32_t group[kEach / 4];
  MPMA_UNROLL
  for (int g = 0; g < kEach / 4; ++g) {
    const Bytes16 x = load_16(chunk.at(number, column + 4 * g));
    MPMA_UNROLL
    for (int i = 0; i < 4; ++i) score[4 * g + i] = bits_float(x.word[i]);
  }
  float cut;
  int count = 0;
  if (slot0 == 0) {
    MPMA_UNROLL
    for (int g = 0; g < kEach / 4; ++g) {
      const auto larger = [](float x, float y) { return x > y ? x : y; };  // may miss a number beside a NaN
      const float *x = score + 4 * g;
      group[g] = key_of(larger(larger(x[0], x[1]), larger(x[2], x[3])));
    }
    cut = score_of(kth_largest(group, topk));
  } else {
    cut = *row.cut;
    count = *row.count;
  }
  uint32_t bits = 0;
  MPMA_UNROLL
  for (int i = 0; i < kEach; ++i) bits |= static_cast<uint32_t>(!(score[i] < cut)) << i;
  const int real = slots - slot0 - column;
  if (real < kEach) bits &= real > 0 ? (1u << real) - 1 : 0;
  int found;
  int place = count + sum_before(popcount(bits), found);
  if (found == 0) return;
  if (count + found > kCandidates) {
    keep_best(row, count, topk, score, slot0 + column, real);
    return;
  }
  for (; bits != 0; bits &= bits - 1, ++place) {
    const int i = lowest_bit(bits);
    const float x = *chunk.at(number, column + i);
    store_8(row.entry + place, Bytes8{{float_bits(x), static_cast<uint32_t>(slot0 + column + i)}});
  }
  count += found;
  warp_barrier();
  if (count > kWaiting && count > topk) {
    keep_best(row, count, topk);
  } else if (lane_index() == 0) {
    *row.count = count;
    *row.cut = cut;
  }
}

}  // namespace mpma::cuda
