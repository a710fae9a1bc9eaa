// Memory attention over every slot: a running softmax over tiles of the bank, as in FlashAttention (Dao et al., NeurIPS
// 2022). Rows are flattened, so that tiles are full whatever the batch. And what its backward shares with it.
#pragma once

#include <cmath>

#include "cuda/memory_attention.h"
#include "cuda/shared_memory.h"
#include "cuda/tiles.h"

namespace mpma::cuda {

// A block owns tiles of 64 rows or slots, 16 for each of its warps, and streams the others past them in smaller ones, twice
// buffered: all that fits the shared memory that every device has.
constexpr int kDenseOwned = 64, kDenseThreads = 128;
template <class T, int kWidth>
constexpr int kDenseStream = kWidth * sizeof(T) <= 128 ? 64 : kWidth * sizeof(T) <= 256 ? 32 : 16;

template <class T, int kWidth, int kOwnedTiles>
struct DenseLayout {
  using Owned = Tile<T, kDenseOwned, kWidth>;
  using Stream = Tile<T, kDenseStream<T, kWidth>, kWidth>;
  T *owned_, *stream_;

  explicit MPMA_HOST_DEVICE DenseLayout(SharedMemory& memory)
      : owned_(memory.take<T>(kOwnedTiles * Owned::kSize)), stream_(memory.take<T>(4 * Stream::kSize)) {}

  MPMA_DEVICE Owned owned(int i) const { return {owned_ + i * Owned::kSize}; }
  MPMA_DEVICE Stream stream(int buffer, int i) const { return {stream_ + (2 * buffer + i) * Stream::kSize}; }
  // Two numbers that go with a streamed row, in the 16 bytes by which rows are longer than their elements.
  MPMA_DEVICE float* statistics(int buffer, int row) const {
    static_assert(Stream::kStride > kWidth, "a row has room for them");
    return reinterpret_cast<float*>(&stream(buffer, 0)(row, kWidth));
  }
};

// Loads the rows of a head from `first` on that are below `count`.
template <class T, int kRows, int kWidth>
MPMA_DEVICE void load_rows(
    const Tile<T, kRows, kWidth>& tile, const MemoryRows<T>& rows, int head, int64_t first, int64_t count, int width) {
  load_tile(tile, width, rows.aligned, [&](int row) -> const T* {
    return first + row < count ? rows.at(first + row, head) : nullptr;
  });
}

// c += A B^T, of the rows of two tiles. float32 by fused multiply-adds, so that infinite scores stay infinite.
template <class T, int kN, int kRowsA, int kRowsB, int kWidth>
MPMA_DEVICE void multiply_rows(
    Accumulator<1, kN>& c, const Tile<T, kRowsA, kWidth>& a, int row, const Tile<T, kRowsB, kWidth>& b) {
  if constexpr (kIsHalf<T>) {
    multiply(c, by_rows(a, row), by_rows(b), kWidth);
  } else {
    MPMA_NO_UNROLL
    for (int k = 0; k < kWidth; k += 4) {
      Bytes16 left[2];
      MPMA_UNROLL
      for (int i = 0; i < 2; ++i) left[i] = load_16(&a(row + lane_index() / 4 + 8 * i, k));
      MPMA_UNROLL
      for (int n = 0; n < kN; ++n)
        MPMA_UNROLL
        for (int j = 0; j < 2; ++j) {
          const Bytes16 right = load_16(&b(8 * n + lane_index() % 4 * 2 + j, k));
          MPMA_UNROLL
          for (int i = 0; i < 2; ++i)
            MPMA_UNROLL
            for (int d = 0; d < 4; ++d)
              c.sum[0][n].value[2 * i + j] =
                  fma_rn(bits_float(left[i].word[d]), bits_float(right.word[d]), c.sum[0][n].value[2 * i + j]);
        }
    }
  }
}

// exp(x) for x <= 0, as exactly as T can tell.
template <class T>
MPMA_DEVICE float dense_weight(float x) {
  if constexpr (kIsHalf<T>)
    return exp2_fast(multiply_rn(x, 1.44269504f));
  else
    return exp_nonpositive(x);
}

// What dropout makes of the weights of an accumulator's block of 8 columns, slots from a multiple of 8 on, for this lane's
// rows, `row` and row + 8. Two lanes share a counter's four words: each draws those of one row.
MPMA_DEVICE Sum drop_rows(const MemoryDropout& dropout, int64_t row, int slot) {
  const bool odd = lane_index() % 2 != 0;
  const PhiloxWords x = dropout.words(odd ? row + 8 : row, slot + lane_index() % 4 / 2 * 4);
  const uint32_t low = shuffle_xor(odd ? x.word[0] : x.word[2], 1), high = shuffle_xor(odd ? x.word[1] : x.word[3], 1);
  Sum factors;
  factors.value[0] = dropout.factor(odd ? low : x.word[0]);
  factors.value[1] = dropout.factor(odd ? high : x.word[1]);
  factors.value[2] = dropout.factor(odd ? x.word[2] : low);
  factors.value[3] = dropout.factor(odd ? x.word[3] : high);
  return factors;
}

template <class T, int kWidth>
MPMA_KERNEL(kDenseThreads, 1)
memory_dense_kernel(MemoryProblem<T> m, T* output, float* logsumexp) {
  constexpr int kStream = kDenseStream<T, kWidth>;
  SharedMemory memory = SharedMemory::this_block();
  const DenseLayout<T, kWidth, 1> layout(memory);
  const int64_t tiles = (m.rows + kDenseOwned - 1) / kDenseOwned;
  const int head = static_cast<int>(block_x() / tiles), own_row = warp_index() * 16;
  const int64_t row0 = block_x() % tiles * kDenseOwned;
  const auto load = [&](int slot, int buffer) {
    load_rows(layout.stream(buffer, 0), m.key, head, slot, m.slots, m.width);
    load_rows(layout.stream(buffer, 1), m.value, head, slot, m.slots, m.width);
    cp_async_commit();
  };
  load_rows(layout.owned(0), m.query, head, row0, m.rows, m.width);
  load(0, 0);
  const MemoryDropout dropout(m, head);
  Accumulator<1, kWidth / 8> mixed;
  mixed.clear();
  float top[2] = {-INFINITY, -INFINITY}, total[2] = {0.f, 0.f};
  for (int slot0 = 0, buffer = 0; slot0 < m.slots; slot0 += kStream, buffer ^= 1) {
    if (slot0 + kStream < m.slots) {
      load(slot0 + kStream, buffer ^ 1);
      cp_async_wait<1>();
    } else {
      cp_async_wait<0>();
    }
    barrier();
    Accumulator<1, kStream / 8> weights;
    weights.clear();
    multiply_rows(weights, layout.owned(0), own_row, layout.stream(buffer, 0));
    float shrink[2], base[2];
    MPMA_UNROLL
    for (int i = 0; i < 2; ++i) {
      float highest = top[i];
      MPMA_UNROLL
      for (int n = 0; n < kStream / 8; ++n)
        MPMA_UNROLL
        for (int j = 0; j < 2; ++j) {
          float& x = weights.sum[0][n].value[2 * i + j];
          x = slot0 + 8 * n + lane_index() % 4 * 2 + j < m.slots ? multiply_rn(x, m.scale) : -INFINITY;
          highest = x > highest ? x : highest;
        }
      MPMA_UNROLL
      for (int lanes = 1; lanes < 4; lanes *= 2) {
        const float other = shuffle_xor(highest, lanes);
        highest = other > highest ? other : highest;
      }
      base[i] = highest == -INFINITY ? 0.f : highest;  // any, while there is nothing but -inf
      shrink[i] = dense_weight<T>(top[i] - base[i]);
      top[i] = highest;
      total[i] *= shrink[i];
    }
    MPMA_UNROLL
    for (int n = 0; n < kStream / 8; ++n) {
      Sum& x = weights.sum[0][n];
      MPMA_UNROLL
      for (int i = 0; i < 4; ++i) {
        x.value[i] = dense_weight<T>(x.value[i] - base[i / 2]);
        total[i / 2] += x.value[i];
      }
      if (!dropout.active()) continue;
      const Sum factors = drop_rows(dropout, row0 + own_row + lane_index() / 4, slot0 + 8 * n);
      MPMA_UNROLL
      for (int i = 0; i < 4; ++i) x.value[i] *= factors.value[i];
    }
    MPMA_UNROLL
    for (int n = 0; n < kWidth / 8; ++n)
      MPMA_UNROLL
      for (int i = 0; i < 4; ++i) mixed.sum[0][n].value[i] *= shrink[i / 2];
    multiply<T>(mixed, weights, by_columns(layout.stream(buffer, 1)));
    barrier();
  }
  MPMA_UNROLL
  for (int i = 0; i < 2; ++i) {
    total[i] += shuffle_xor(total[i], 1);
    total[i] += shuffle_xor(total[i], 2);
    const int64_t row = row0 + own_row + lane_index() / 4 + 8 * i;
    const float base = top[i] == -INFINITY ? 0.f : top[i];
    if (lane_index() % 4 == 0 && row < m.rows) logsumexp[row * m.heads + head] = base + log_accurate(total[i]);
    MPMA_UNROLL
    for (int n = 0; n < kWidth / 8; ++n)
      MPMA_UNROLL
      for (int j = 0; j < 2; ++j)
        mixed.sum[0][n].value[2 * i + j] = divide_rn(mixed.sum[0][n].value[2 * i + j], total[i]);
  }
  const int64_t left = m.rows - row0 - own_row;
  store_global<T>(mixed, static_cast<int>(left < 16 ? left : 16), m.width, [&](int i) {
    return output + ((row0 + own_row + i) * m.heads + head) * m.width;
  });
}

template <class T, int kWidth>
void launch_memory_dense(const MemoryProblem<T>& m, T* output, float* logsumexp, void* stream) {
  const Launch how = {
      {(m.rows + kDenseOwned - 1) / kDenseOwned * m.heads}, kDenseThreads, shared_bytes<DenseLayout<T, kWidth, 1>>(),
      stream};
  launch<memory_dense_kernel<T, kWidth>>(how, m, output, logsumexp);
}

// output (R, H, D) and logsumexp (R, H), contiguous.
template <class T>
void launch_memory_dense(const MemoryProblem<T>& m, T* output, float* logsumexp, void* stream) {
  if (m.width <= 64)
    launch_memory_dense<T, 64>(m, output, logsumexp, stream);
  else
    launch_memory_dense<T, 128>(m, output, logsumexp, stream);
}

}  // namespace mpma::cuda
