// Philox4x32-10 for many counters at a time. Included by bodies of foreach_isa.h.

namespace mpma::MPMA_ISA {

// words[w * stride + g] = word w of Philox4x32-10 at counter (groups[g], row, head, sequence), for g up to `stride`, a
// multiple of kPhiloxGroups. The same function as philox(), many counters at a time.
constexpr int64_t kPhiloxGroups = 2 * kWidth<float>;  // two vectors, to hide the latency of a product

inline void philox_words(
    const uint32_t* groups, int64_t stride, uint32_t row, uint32_t head, uint32_t sequence, uint64_t seed,
    uint32_t* words) {
  using Words = Vector<uint32_t>;
  using Products = Vector<uint64_t>;
  constexpr int kW = kWidth<uint32_t>;
  const auto multiply = [](Words x, uint32_t factor, Words& high, Words& low) {
    const Products even = multiply_even(x, factor), odd = multiply_even((Words)((Products)x >> 32), factor);
    constexpr uint64_t kLow = 0xFFFFFFFF;
    high = (Words)((even >> 32) | (odd & ~kLow));
    low = (Words)((even & kLow) | (odd << 32));
  };
  const Words zero = {};
  for (int64_t g = 0; g < stride; g += kPhiloxGroups) {
    Words c[2][4];
    for (int v = 0; v < 2; ++v) {
      c[v][0] = load(groups + g + v * kW);
      c[v][1] = zero + row, c[v][2] = zero + head, c[v][3] = zero + sequence;
    }
    auto key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round, key0 += 0x9E3779B9, key1 += 0xBB67AE85) {
      for (int v = 0; v < 2; ++v) {
        Words left_high, left_low, right_high, right_low;
        multiply(c[v][0], 0xD2511F53, left_high, left_low);
        multiply(c[v][2], 0xCD9E8D57, right_high, right_low);
        c[v][0] = right_high ^ c[v][1] ^ key0;
        c[v][1] = right_low;
        c[v][2] = left_high ^ c[v][3] ^ key1;
        c[v][3] = left_low;
      }
    }
    for (int v = 0; v < 2; ++v)
      for (int w = 0; w < 4; ++w) store(words + w * stride + g + v * kW, c[v][w]);
  }
}

}  // namespace mpma::MPMA_ISA
