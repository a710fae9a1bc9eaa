// Exact selection of a row's K largest scores, tile by tile. Ties go to the lower slot, -0 equals +0 and a NaN is
// larger than everything, so that it is selected and shows in the output.
#pragma once

#include "cpu/simd.h"

namespace mpma::cpu {

// Integers in the order of the scores.
template <class T, class Isa>
struct ScoreKey {
  using Int = typename Simd<T, Isa>::Int;
  static constexpr Int kMax = std::numeric_limits<Int>::max();
  static constexpr Int kMin = std::numeric_limits<Int>::min();

  static MPMA_INLINE Int of(T score) {
    if (score != score) return kMax;
    score += T(0);  // -0 becomes +0
    Int bits;
    std::memcpy(&bits, &score, sizeof bits);
    return bits < 0 ? bits ^ kMax : bits;
  }

  static MPMA_INLINE T score(Int key) {
    const Int bits = key < 0 ? key ^ kMax : key;
    T score;
    std::memcpy(&score, &bits, sizeof score);
    return score;
  }
};

// A cut such that at least k keys are >= cut, and fewer than k are above it. keys[n ...] must be writable up to the
// next whole vector. Bisection: it counts whole vectors and ends early once exactly k keys remain.
template <class T, class Isa>
MPMA_INLINE typename Simd<T, Isa>::Int kth_largest(typename Simd<T, Isa>::Int* keys, int64_t n, int64_t k) {
  using S = Simd<T, Isa>;
  using Int = typename S::Int;
  using Unsigned = std::make_unsigned_t<Int>;
  Int low = keys[0], high = keys[0];
  for (int64_t i = 1; i < n; ++i) {
    low = keys[i] < low ? keys[i] : low;
    high = keys[i] > high ? keys[i] : high;
  }
  for (int64_t i = n; i % S::kWidth != 0; ++i) keys[i] = ScoreKey<T, Isa>::kMin;
  while (low < high) {
    const Unsigned gap = static_cast<Unsigned>(high) - static_cast<Unsigned>(low);
    const Int middle = static_cast<Int>(static_cast<Unsigned>(low) + gap / 2 + (gap & 1));
    typename S::IntVec counts = {};
    for (int64_t i = 0; i < n; i += S::kWidth) counts -= S::load(keys + i) >= middle;
    int64_t count = 0;
    for (int i = 0; i < S::kWidth; ++i) count += counts[i];
    if (count < k) {
      high = middle - 1;
    } else {
      low = middle;
      if (count == k) break;
    }
  }
  return low;
}

// What is kept of a row so far: at most K keys and their slots, ascending by slot, and the smallest key of K.
template <class T, class Isa>
struct Kept {
  using Int = typename Simd<T, Isa>::Int;
  Int* keys;
  int32_t* slots;
  int64_t count;
  Int smallest;
};

// Scratch of one thread for tiles of up to `tile` scores.
template <class T, class Isa>
struct SelectScratch {
  using Int = typename Simd<T, Isa>::Int;
  Int* keys;        // tile + K + one vector
  int32_t* slots;   // tile + K
  int32_t* blocks;  // tile / kBlock + 1
  static constexpr int kBlock = 16;
};

// A lower bound of the k-th largest of n scores: the k-th largest of at least 2k maxima of disjoint groups.
template <class T, class Isa>
MPMA_INLINE typename Simd<T, Isa>::Int group_bound(
    const T* scores, int64_t n, int64_t k, typename Simd<T, Isa>::Int* maxima) {
  using S = Simd<T, Isa>;
  const int64_t vectors = n / S::kWidth, groups = (2 * k + S::kWidth - 1) / S::kWidth, length = vectors / groups;
  if (length < 4) return ScoreKey<T, Isa>::kMin;
  for (int64_t g = 0; g < groups; ++g) {
    const T* p = scores + g * length * S::kWidth;
    const auto lowest = S::broadcast(-std::numeric_limits<T>::infinity());
    typename S::Vec top[4] = {lowest, lowest, lowest, lowest};  // four, to hide the latency of a maximum
    for (int64_t i = 0; i + 4 <= length; i += 4)
      for (int j = 0; j < 4; ++j) top[j] = S::maximum(S::load(p + (i + j) * S::kWidth), top[j]);
    const auto both = S::maximum(S::maximum(top[0], top[1]), S::maximum(top[2], top[3]));
    for (int i = 0; i < S::kWidth; ++i) maxima[g * S::kWidth + i] = ScoreKey<T, Isa>::of(both[i]);
  }
  return kth_largest<T, Isa>(maxima, groups * S::kWidth, k);
}

// Takes scores[0, n), those of slots slot0, slot0 + 1, ..., into what is kept. scores must be readable up to the next
// whole block.
template <class T, class Isa>
MPMA_INLINE void select_tile(
    const T* scores, int64_t n, int64_t slot0, int64_t k, const SelectScratch<T, Isa>& scratch, Kept<T, Isa>& kept) {
  using S = Simd<T, Isa>;
  using Key = ScoreKey<T, Isa>;
  constexpr int kBlock = SelectScratch<T, Isa>::kBlock;
  auto floor = group_bound<T, Isa>(scores, n, k, scratch.keys);
  if (kept.count == k && kept.smallest > floor) floor = kept.smallest;
  const T cut = Key::score(floor);

  // Blocks that hold a score not below the cut, listed without a branch, since no predictor can know them.
  int64_t hits = 0;
  for (int64_t i = 0; i < n; i += kBlock) {
    typename S::IntVec any = {};
    for (int j = 0; j < kBlock; j += S::kWidth) any |= ~(S::load(scores + i + j) < cut);
    typename S::Int folded = 0;
    for (int j = 0; j < S::kWidth; ++j) folded |= any[j];
    scratch.blocks[hits] = static_cast<int32_t>(i);
    hits += folded != 0;
  }

  std::memcpy(scratch.keys, kept.keys, kept.count * sizeof(*kept.keys));
  std::memcpy(scratch.slots, kept.slots, kept.count * sizeof(*kept.slots));
  int64_t count = kept.count;
  for (int64_t b = 0; b < hits; ++b) {
    const int64_t begin = scratch.blocks[b], end = begin + kBlock < n ? begin + kBlock : n;
    for (int64_t i = begin; i < end; ++i) {
      scratch.keys[count] = Key::of(scores[i]);
      scratch.slots[count] = static_cast<int32_t>(slot0 + i);
      count += !(scores[i] < cut);
    }
  }

  typename S::Int last = Key::kMin;
  int64_t ties = count;
  if (count > k) {
    last = kth_largest<T, Isa>(scratch.keys, count, k);
    ties = k;
    for (int64_t i = 0; i < count; ++i) ties -= scratch.keys[i] > last;
  }
  kept.count = 0;
  kept.smallest = Key::kMax;
  for (int64_t i = 0; i < count; ++i) {
    const auto key = scratch.keys[i];
    const bool tie = key == last;
    if (key < last || (tie && ties == 0)) continue;
    ties -= tie;
    kept.keys[kept.count] = key;
    kept.slots[kept.count++] = scratch.slots[i];
    kept.smallest = key < kept.smallest ? key : kept.smallest;
  }
}

}  // namespace mpma::cpu
