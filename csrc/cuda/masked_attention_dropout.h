// Which attention weights dropout keeps: the word j % 4 of counter (j / 4, i, head, item) decides on query i and key j.
#pragma once

#include "cuda/masked_attention.h"
#include "philox.h"

namespace mpma::cuda {

// For one head of one item.
struct DropoutDraw {
  uint64_t seed;
  uint32_t threshold, head, item;

  // Bit j % 4 of the four keys of a quad: whether the weight of query i is kept.
  MPMA_DEVICE uint32_t quad(uint32_t quad, uint32_t i) const {
    const PhiloxWords words = philox(quad, i, head, item, seed);
    uint32_t bits = 0;
    MPMA_UNROLL
    for (int j = 0; j < 4; ++j) bits |= static_cast<uint32_t>(words.word[j] >= threshold) << j;
    return bits;
  }
};

template <class T>
MPMA_DEVICE DropoutDraw dropout_draw(const Attention<T>& a, const Place& place) {
  return {
      static_cast<uint64_t>(*a.dropout.seed), a.dropout.threshold, static_cast<uint32_t>(place.head),
      static_cast<uint32_t>(place.item)};
}

// One bit for each value that a lane holds of an accumulator.
template <int kM, int kN>
struct Kept {
  uint32_t word[(kM * kN + 7) / 8];

  MPMA_DEVICE bool operator()(int m, int n, int i) const {
    const int sum = m * kN + n;
    return (word[sum / 8] >> (sum % 8 * 4 + i) & 1) != 0;
  }

  MPMA_DEVICE void clear() {
    MPMA_UNROLL
    for (int i = 0; i < (kM * kN + 7) / 8; ++i) word[i] = 0;
  }
  MPMA_DEVICE void set(int m, int n, uint32_t bits) {
    const int sum = m * kN + n;
    word[sum / 8] |= bits << (sum % 8 * 4);
  }
};

// Of an accumulator (queries x keys) from query i0 and key j0 on, a multiple of 8. Two neighbouring lanes hold the same
// quads of two rows: each draws one row's, and gives half of it to the other.
template <int kM, int kN>
MPMA_DEVICE Kept<kM, kN> kept_by_query(const DropoutDraw& draw, int i0, int j0) {
  Kept<kM, kN> kept;
  kept.clear();
  const int odd = lane_index() % 2;
  MPMA_UNROLL
  for (int m = 0; m < kM; ++m)
    MPMA_UNROLL
    for (int n = 0; n < kN; ++n) {
      const uint32_t mine =
          draw.quad(j0 / 4 + 2 * n + lane_index() % 4 / 2, i0 + 16 * m + lane_index() / 4 + 8 * odd);
      const uint32_t other = shuffle_xor(mine, 1);
      kept.set(m, n, odd ? other >> 2 | (mine >> 2) << 2 : (mine & 3) | (other & 3) << 2);
    }
  return kept;
}

// Of an accumulator (keys x queries) from key j0, a multiple of 8, and query i0 on. The four lanes that hold the keys of
// a quad hold those of four quads, two queries of two keys each: every lane draws one of them, for all.
template <int kM, int kN>
MPMA_DEVICE Kept<kM, kN> kept_by_key(const DropoutDraw& draw, int j0, int i0) {
  Kept<kM, kN> kept;
  kept.clear();
  const int lane = lane_index(), key = lane / 4 % 4;
  MPMA_UNROLL
  for (int m = 0; m < kM; ++m)
    MPMA_UNROLL
    for (int n = 0; n < kN; ++n) {
      const uint32_t mine =
          draw.quad(j0 / 4 + 4 * m + lane / 16 + key / 2 * 2, i0 + 8 * n + lane % 4 * 2 + key % 2);
      uint32_t bits = 0;
      MPMA_UNROLL
      for (int i = 0; i < 4; ++i) bits |= (shuffle_xor(mine, 4 * i) >> key & 1) << (key ^ i);
      kept.set(m, n, bits);
    }
  return kept;
}

}  // namespace mpma::cuda
