// Memory attention: what its kernels are given, and the rows of its operands in pieces of 16 bytes.
#pragma once

#include "cuda/launch.h"
#include "cuda/machine.h"
#include "philox.h"

namespace mpma::cuda {

// The widths and numbers of slots kept that are compiled.
constexpr int kWidestHead = 128, kMostKept = 64;

// A (rows, heads, width) operand whose last dimension is contiguous.
template <class T>
struct MemoryRows {
  const T* data;
  int64_t row_stride, head_stride;
  bool aligned;  // every row begins at a multiple of 16 bytes, and is one long

  MPMA_DEVICE const T* at(int64_t row, int head) const { return data + row * row_stride + head * head_stride; }
};

template <class T>
MemoryRows<T> memory_rows(const T* data, int64_t row_stride, int64_t head_stride, int64_t width) {
  return {data, row_stride, head_stride, aligned_rows(data, row_stride, head_stride, width)};
}

// One call: query (R, H, D), key and value (N, H, D).
template <class T>
struct MemoryProblem {
  MemoryRows<T> query, key, value;
  int64_t rows;
  int heads, slots, width;
  float scale;
  Dropout dropout;      // without its seed, which the device alone knows
  const int64_t* seed;  // null without dropout
};

// What the backward reads beside the problem, and the gradients of query, key and value, null where nobody needs them.
template <class T>
struct MemoryGradients {
  MemoryRows<T> grad_output;
  T *query, *key, *value;
};

// What dropout makes of the weights of one head.
class MemoryDropout {
 public:
  template <class T>
  MPMA_DEVICE MemoryDropout(const MemoryProblem<T>& m, int head)
      : dropout_(m.dropout), kept_(static_cast<float>(m.dropout.kept)), head_(head) {
    if (dropout_.active()) dropout_.seed = static_cast<uint64_t>(*m.seed);
  }

  MPMA_DEVICE bool active() const { return dropout_.active(); }

  // What the weight of a row on a slot is multiplied with.
  MPMA_DEVICE float factor(int64_t row, int slot) const {
    const PhiloxWords words = dropout_.memory_words(slot / 4, head_, row);
    const uint32_t even = slot % 4 == 0 ? words.word[0] : words.word[2];
    const uint32_t odd = slot % 4 == 1 ? words.word[1] : words.word[3];
    return factor((slot % 2 == 0 ? even : odd));
  }
  MPMA_DEVICE float factor(uint32_t word) const { return word < dropout_.threshold ? 0.f : kept_; }
  MPMA_DEVICE PhiloxWords words(int64_t row, int slot) const { return dropout_.memory_words(slot / 4, head_, row); }

 private:
  Dropout dropout_;
  float kept_;
  int head_;
};

// --- Rows in pieces --------------------------------------------------------------------------------------------------

// kVector<T> elements of a row from `column` on, zeros beyond its width.
template <class T>
MPMA_DEVICE Bytes16 load_piece(const T* row, int column, int width, bool aligned) {
  Bytes16 x = {{0, 0, 0, 0}};
  if (aligned) {
    if (column < width) x = load_16(row + column);
    return x;
  }
  MPMA_UNROLL
  for (int i = 0; i < kVector<T>; ++i) {
    if (column + i >= width) continue;
    if constexpr (kIsHalf<T>)
      x.word[i / 2] |= static_cast<uint32_t>(row[column + i].bits) << 16 * (i % 2);
    else
      x.word[i] = float_bits(row[column + i]);
  }
  return x;
}

// Element i of a piece.
template <class T>
MPMA_DEVICE float element(const Bytes16& x, int i) {
  if constexpr (kIsHalf<T>)
    return to_float(T{static_cast<uint16_t>(x.word[i / 2] >> 16 * (i % 2))});
  else
    return bits_float(x.word[i]);
}

template <class T>
MPMA_DEVICE void store_piece(T* row, int column, int width, bool aligned, const float (&x)[kVector<T>]) {
  if (aligned) {
    Bytes16 y;
    MPMA_UNROLL
    for (int i = 0; i < 4; ++i) {
      if constexpr (kIsHalf<T>)
        y.word[i] = pack<T>(x[2 * i], x[2 * i + 1]);
      else
        y.word[i] = float_bits(x[i]);
    }
    if (column < width) store_16(row + column, y);
    return;
  }
  MPMA_UNROLL
  for (int i = 0; i < kVector<T>; ++i)
    if (column + i < width) row[column + i] = from_float<T>(x[i]);
}

// How a warp holds rows of up to kWidth elements: a piece in each of kLanes lanes, kTogether rows at a time.
template <class T, int kWidth>
struct Pieces {
  static constexpr int kLanes = kWidth / kVector<T>, kTogether = kWarp / kLanes;

  MPMA_DEVICE static int column() { return lane_index() % kLanes * kVector<T>; }
  MPMA_DEVICE static int which() { return lane_index() / kLanes; }  // of the rows held together

  // The sum over the lanes of a row, in each of them.
  MPMA_DEVICE static float sum_of_row(float x) {
    MPMA_UNROLL
    for (int lanes = 1; lanes < kLanes; lanes *= 2) x += shuffle_xor(x, lanes);
    return x;
  }
  // The sum over the rows held together, in all lanes.
  MPMA_DEVICE static float sum_of_rows(float x) {
    MPMA_UNROLL
    for (int lanes = kLanes; lanes < kWarp; lanes *= 2) x += shuffle_xor(x, lanes);
    return x;
  }
};

// sum += weight * row over `count` rows of a head: of_row(i, weight, number) says which is the i-th. A lane has its column's
// share of the rows that it holds; the total is that of sum_of_rows.
template <class T, int kWidth, class OfRow>
MPMA_DEVICE void add_rows(
    const MemoryRows<T>& rows, int head, int width, int count, float (&sum)[kVector<T>], const OfRow& of_row) {
  using P = Pieces<T, kWidth>;
  constexpr int kAtOnce = 4;  // loads under way
  for (int first = P::which(); first < count; first += kAtOnce * P::kTogether) {
    Bytes16 x[kAtOnce];
    float weight[kAtOnce];
    MPMA_UNROLL
    for (int j = 0; j < kAtOnce; ++j) {
      const int i = first + j * P::kTogether;
      x[j] = {{0, 0, 0, 0}};
      weight[j] = 0.f;
      if (i >= count) continue;
      int row;
      of_row(i, weight[j], row);
      x[j] = load_piece(rows.at(row, head), P::column(), width, rows.aligned);
    }
    MPMA_UNROLL
    for (int j = 0; j < kAtOnce; ++j)
      MPMA_UNROLL
      for (int d = 0; d < kVector<T>; ++d) sum[d] = fma_rn(weight[j], element<T>(x[j], d), sum[d]);
  }
}

// --- Numbers ---------------------------------------------------------------------------------------------------------

// exp(x) for x <= 0 within 3 units in the last place; NaN and -inf as they should be.
MPMA_DEVICE float exp_nonpositive(float x) {
  constexpr float kLog2E = 1.44269504f, kRest = 1.92596303e-8f, kLn2 = 0.693147181f;
  const float power = multiply_rn(x, kLog2E);
  const float y = exp2_fast(power);
  if (y == 0.f) return y;
  const float lost = fma_rn(x, kRest, fma_rn(x, kLog2E, -power));
  return fma_rn(y, multiply_rn(lost, kLn2), y);
}

MPMA_DEVICE float log_accurate(float x) { return multiply_rn(log2_accurate(x), 0.693147181f); }

MPMA_DEVICE float warp_largest(float x) {  // passes over NaN
  MPMA_UNROLL
  for (int lanes = 1; lanes < kWarp; lanes *= 2) {
    const float other = shuffle_xor(x, lanes);
    x = x > other ? x : other;
  }
  return x;
}
MPMA_DEVICE float warp_total(float x) {
  MPMA_UNROLL
  for (int lanes = 1; lanes < kWarp; lanes *= 2) x += shuffle_xor(x, lanes);
  return x;
}

// The sum over the lanes before this one; `total` becomes that over all.
MPMA_DEVICE int sum_before(int x, int& total) {
  int sum = x;
  MPMA_UNROLL
  for (int lanes = 1; lanes < kWarp; lanes *= 2) {
    const int other = shuffle_up(sum, lanes);
    if (lane_index() >= lanes) sum += other;
  }
  total = shuffle(sum, kWarp - 1);
  return sum - x;
}

}  // namespace mpma::cuda
