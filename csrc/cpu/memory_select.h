// Exact selection of a row's K largest scores, tile by tile. Ties go to the lower slot, -0 equals +0 and a NaN is
// larger than everything, so that it is selected and shows in the output. Included by foreach_isa.h.

namespace mpma::MPMA_ISA::memory {

template <class T>
using Integer = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;

// Integers in the order of the scores.
template <class T>
constexpr Integer<T> kLargestKey = std::numeric_limits<Integer<T>>::max();
template <class T>
constexpr Integer<T> kSmallestKey = std::numeric_limits<Integer<T>>::min();

template <class T>
inline Vector<Integer<T>> keys_of(Vector<T> scores) {
  // Adding zero turns -0 into +0. Negative numbers order the other way round in all bits but the sign.
  const auto bits = (Vector<Integer<T>>)(scores + T(0));
  const auto keys = bits ^ ((bits >> (8 * sizeof(T) - 1)) & kLargestKey<T>);
  return scores == scores ? keys : keys - keys + kLargestKey<T>;
}

template <class T>
inline Integer<T> key_of(T score) {
  Integer<T> bits;
  score += T(0);
  std::memcpy(&bits, &score, sizeof bits);
  return score == score ? bits ^ ((bits >> (8 * sizeof(T) - 1)) & kLargestKey<T>) : kLargestKey<T>;
}

template <class T>
inline T score_of(Integer<T> key) {
  const Integer<T> bits = key < 0 ? key ^ kLargestKey<T> : key;
  T score;
  std::memcpy(&score, &bits, sizeof score);
  return score;
}

// A cut such that at least k of n keys are not below it and fewer than k above it. keys is writable up to the next
// whole vector. Bisection on the integers: it counts whole vectors, and ends as soon as exactly k keys remain.
template <class T>
inline Integer<T> kth_largest(Integer<T>* keys, int64_t n, int64_t k) {
  using I = Integer<T>;
  using Unsigned = std::make_unsigned_t<I>;
  for (int64_t i = n; i % kWidth<T> != 0; ++i) keys[i] = keys[0];
  Vector<I> lows = load(keys), highs = lows;
  for (int64_t i = kWidth<T>; i < n; i += kWidth<T>) {
    const Vector<I> x = load(keys + i);
    lows = x < lows ? x : lows;
    highs = x > highs ? x : highs;
  }
  I low = lows[0], high = highs[0];
  for (int i = 1; i < kWidth<T>; ++i) {
    low = lows[i] < low ? lows[i] : low;
    high = highs[i] > high ? highs[i] : high;
  }
  for (int64_t i = n; i % kWidth<T> != 0; ++i) keys[i] = kSmallestKey<T>;
  while (low < high) {
    const Unsigned gap = static_cast<Unsigned>(high) - static_cast<Unsigned>(low);
    const I middle = static_cast<I>(static_cast<Unsigned>(low) + gap / 2 + (gap & 1));
    Vector<I> counts = {};
    for (int64_t i = 0; i < n; i += kWidth<T>) counts -= load(keys + i) >= middle;
    const I count = sum_lanes<I>(counts);
    if (count < k) {
      high = middle - 1;
    } else {
      low = middle;
      if (count == k) break;
    }
  }
  return low;
}

// What is kept of a row so far: at most K keys and their slots, ascending by slot, and the smallest key.
template <class T>
struct Kept {
  Integer<T>* keys;
  int32_t* slots;
  int64_t count;
  Integer<T> smallest;
};

constexpr int64_t kSelectBlock = 16;  // scores that are looked at together

// Scratch of one thread.
template <class T>
struct SelectScratch {
  cpu::Buffer<Integer<T>> keys;
  cpu::Buffer<int32_t> slots, blocks;
  cpu::Buffer<uint32_t> hits;

  SelectScratch(int64_t tile, int64_t k)
      : keys(tile + k + kSelectBlock), slots(tile + k + 1), blocks(tile / kSelectBlock + 2),
        hits(tile / kSelectBlock + 2) {}
};

// Scales a tile of scores and returns a lower bound of the k-th largest: the k-th largest of the maxima of at least 2k
// groups. It cuts all but about 1.4 k of 64 k scores in random order, whatever their distribution.
template <class T>
inline Integer<T> scale_and_bound(T* scores, int64_t n, int64_t k, T scale, Integer<T>* maxima) {
  constexpr int kChains = 4;  // independent maxima, to hide their latency
  int64_t groups = (2 * k + kWidth<T> - 1) / kWidth<T>, length = n / kWidth<T> / groups / kChains * kChains;
  if (length == 0) groups = 0;
  T* p = scores;
  for (int64_t g = 0; g < groups; ++g) {
    const auto lowest = Vector<T>{} - std::numeric_limits<T>::infinity();
    Vector<T> top[kChains] = {lowest, lowest, lowest, lowest};
    for (int64_t i = 0; i < length; i += kChains)
      for (int j = 0; j < kChains; ++j, p += kWidth<T>) {
        const Vector<T> x = load(p) * scale;
        store(p, x);
        top[j] = x > top[j] ? x : top[j];  // passes over a NaN, which leaves a lower bound
      }
    const auto left = top[0] > top[1] ? top[0] : top[1], right = top[2] > top[3] ? top[2] : top[3];
    store(maxima + g * kWidth<T>, keys_of<T>(left > right ? left : right));
  }
  for (; p < scores + n; p += kWidth<T>) store(p, load(p) * scale);
  return groups ? kth_largest<T>(maxima, groups * kWidth<T>, k) : kSmallestKey<T>;
}

// Takes n products, those of slots slot0, slot0 + 1, ..., into what is kept of their row. They are scaled in place and
// readable and writable up to the next whole block.
template <class T>
inline void select_tile(
    T* scores, int64_t n, int64_t slot0, int64_t k, T scale, const SelectScratch<T>& scratch, Kept<T>& kept) {
  using I = Integer<T>;
  I *pool = scratch.keys.get(), floor = scale_and_bound(scores, n, k, scale, pool);
  int32_t *slots = scratch.slots.get(), *blocks = scratch.blocks.get();
  uint32_t* hits = scratch.hits.get();
  if (kept.count == k && kept.smallest > floor) floor = kept.smallest;

  // Blocks with a score not below the cut are listed without a branch, since no predictor can know them, with a bit for
  // each such score.
  const T cut = score_of<T>(floor);
  int64_t listed = 0;
  for (int64_t i = 0; i < n; i += kSelectBlock) {
    uint32_t bits = 0;
    for (int64_t j = 0; j < kSelectBlock; j += kWidth<T>) bits |= lane_bits<I>(~(load(scores + i + j) < cut)) << j;
    if (n - i < kSelectBlock) bits &= (1u << (n - i)) - 1;
    blocks[listed] = static_cast<int32_t>(i);
    hits[listed] = bits;
    listed += bits != 0;
  }

  std::memcpy(pool, kept.keys, kept.count * sizeof(I));
  std::memcpy(slots, kept.slots, kept.count * sizeof(int32_t));
  int64_t count = kept.count;
  for (int64_t b = 0; b < listed; ++b)
    for (uint32_t bits = hits[b]; bits != 0; bits &= bits - 1) {
      const int64_t i = blocks[b] + __builtin_ctz(bits);
      pool[count] = key_of(scores[i]);
      slots[count++] = static_cast<int32_t>(slot0 + i);
    }

  I last = kSmallestKey<T>;
  int64_t ties = count;
  if (count > k) {
    last = kth_largest<T>(pool, count, k);
    ties = k;
    for (int64_t i = 0; i < count; ++i) ties -= pool[i] > last;
  }
  kept.count = 0;
  kept.smallest = kLargestKey<T>;
  for (int64_t i = 0; i < count; ++i) {
    const I key = pool[i];
    const bool tie = key == last;
    if (key < last || (tie && ties == 0)) continue;
    ties -= tie;
    kept.keys[kept.count] = key;
    kept.slots[kept.count++] = slots[i];
    kept.smallest = key < kept.smallest ? key : kept.smallest;
  }
}

}  // namespace mpma::MPMA_ISA::memory
