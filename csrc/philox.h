// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) and the dropout
// rule built on it. Every backend draws the same words for the same seed and counter.
#pragma once

#include <cmath>
#include <cstdint>

#include "qualifiers.h"

namespace mpma {

struct PhiloxWords {
  uint32_t word[4];
};

MPMA_HOST_DEVICE inline PhiloxWords philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint64_t seed) {
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t left = uint64_t{0xD2511F53} * c0, right = uint64_t{0xCD9E8D57} * c2;
    c0 = static_cast<uint32_t>(right >> 32) ^ c1 ^ key0;
    c1 = static_cast<uint32_t>(right);
    c2 = static_cast<uint32_t>(left >> 32) ^ c3 ^ key1;
    c3 = static_cast<uint32_t>(left);
    key0 += 0x9E3779B9;
    key1 += 0xBB67AE85;
  }
  return {{c0, c1, c2, c3}};
}

// Dropout of attention weights: an element is dropped iff its word is below floor(p * 2^32).
struct Dropout {
  uint64_t seed;
  uint32_t threshold;
  double kept;  // what a kept weight is multiplied with

  Dropout(double p, uint64_t seed)
      : seed(seed), threshold(static_cast<uint32_t>(std::floor(std::ldexp(p, 32)))), kept(1.0 / (1.0 - p)) {}

  MPMA_HOST_DEVICE bool active() const { return threshold != 0; }

  // The words of slots 4 * group to 4 * group + 3 for one flattened row and head of memory attention.
  MPMA_HOST_DEVICE PhiloxWords memory_words(int64_t group, int64_t head, int64_t row) const {
    const auto r = static_cast<uint64_t>(row);
    return philox(
        static_cast<uint32_t>(group), static_cast<uint32_t>(head), static_cast<uint32_t>(r),
        static_cast<uint32_t>(r >> 32), seed);
  }
};

}  // namespace mpma
