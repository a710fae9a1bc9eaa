// Scores of a warp's rows with a few slots at a time, straight from global memory: a lane keeps its part of the query in
// registers and reads its part of the keys as it lies in memory, so that nothing passes through shared memory and no warp
// waits for another.
//
// The 2-byte types are multiplied on the tensor cores, float32 by fused multiply-adds: so exact products stay exact, equal
// scores equal, and infinite ones infinite.
#pragma once

#include "cuda/memory_attention.h"
#include "cuda/tiles.h"

namespace mpma::cuda {

// Rows row0 to row0 + 16 kM - 1 of one head. Rows and slots beyond the last are taken for the last: what comes of them is
// for the caller to drop.
template <class T, int kM, int kWidth>
class Scorer {
 public:
  static constexpr int kSlots = 8;  // at a time
  using Sums = Accumulator<kM, 1>;
  struct Keys {
    Bytes16 piece[kWidth / 32];
  };

  MPMA_DEVICE Scorer(const MemoryProblem<T>& m, int head, int64_t row0) : m_(m), head_(head) {
    MPMA_UNROLL
    for (int i = 0; i < kM; ++i) {
      const T *upper = query(row0 + 16 * i + lane_index() / 4), *lower = query(row0 + 16 * i + lane_index() / 4 + 8);
      MPMA_UNROLL
      for (int p = 0; p < kWidth / 32; ++p) {
        const Bytes16 x = piece(upper, p, m.query.aligned), y = piece(lower, p, m.query.aligned);
        left_[2 * p][i].value = {{x.word[0], y.word[0], x.word[1], y.word[1]}};
        left_[2 * p + 1][i].value = {{x.word[2], y.word[2], x.word[3], y.word[3]}};
      }
    }
  }

  // Of the slots from `slot` on.
  MPMA_DEVICE Keys keys(int slot) const {
    const int own = slot + lane_index() / 4;
    const T* row = m_.key.at(own < m_.slots ? own : m_.slots - 1, head_);
    Keys k;
    MPMA_UNROLL
    for (int p = 0; p < kWidth / 32; ++p) k.piece[p] = piece(row, p, m_.key.aligned);
    return k;
  }

  // The scaled scores.
  MPMA_DEVICE Sums scores(const Keys& k) const {
    Sums sums;
    sums.clear();
    MPMA_UNROLL
    for (int p = 0; p < kWidth / 32; ++p)
      MPMA_UNROLL
      for (int half = 0; half < 2; ++half)
        MPMA_UNROLL
        for (int i = 0; i < kM; ++i)
          mma<T>(
              sums.sum[i][0], left_[2 * p + half][i].value,
              Registers2{{k.piece[p].word[2 * half], k.piece[p].word[2 * half + 1]}});
    sums.for_each([&](int, int, float& x) { x = multiply_rn(x, m_.scale); });
    return sums;
  }

 private:
  MPMA_DEVICE const T* query(int64_t row) const {
    return m_.query.at(row < m_.rows ? row : m_.rows - 1, head_);
  }
  // Four lanes have a row. The depth may be taken in any order, if it is the same for both factors: so each lane has 16
  // bytes at a time, half of them for each of two steps.
  MPMA_DEVICE Bytes16 piece(const T* row, int p, bool aligned) const {
    return load_piece(row, (4 * p + lane_index() % 4) * kVector<T>, m_.width, aligned);
  }

  const MemoryProblem<T>& m_;
  int head_;
  StepA<T> left_[kWidth / 16][kM];
};

template <int kM, int kWidth>
class Scorer<float, kM, kWidth> {
 public:
  static constexpr int kSlots = 16;
  using Sums = Accumulator<kM, 2>;
  struct Keys {
    const float* row[2][2];
  };

  MPMA_DEVICE Scorer(const MemoryProblem<float>& m, int head, int64_t row0) : m_(m), head_(head) {
    MPMA_UNROLL
    for (int i = 0; i < kM; ++i)
      MPMA_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int64_t row = row0 + 16 * i + 8 * half + lane_index() / 4;
        query_[i][half] = m.query.at(row < m.rows ? row : m.rows - 1, head);
      }
  }

  MPMA_DEVICE Keys keys(int slot) const {
    Keys k;
    MPMA_UNROLL
    for (int n = 0; n < 2; ++n)
      MPMA_UNROLL
      for (int j = 0; j < 2; ++j) {
        const int own = slot + 8 * n + lane_index() % 4 * 2 + j;
        k.row[n][j] = m_.key.at(own < m_.slots ? own : m_.slots - 1, head_);
      }
    return k;
  }

  MPMA_DEVICE Sums scores(const Keys& k) const {
    Sums sums;
    sums.clear();
    for (int column = 0; column < m_.width; column += 4) {
      Bytes16 right[2][2];
      MPMA_UNROLL
      for (int n = 0; n < 2; ++n)
        MPMA_UNROLL
        for (int j = 0; j < 2; ++j) right[n][j] = load_piece(k.row[n][j], column, m_.width, m_.key.aligned);
      MPMA_UNROLL
      for (int i = 0; i < kM; ++i)
        MPMA_UNROLL
        for (int half = 0; half < 2; ++half) {
          const Bytes16 left = load_piece(query_[i][half], column, m_.width, m_.query.aligned);
          MPMA_UNROLL
          for (int n = 0; n < 2; ++n)
            MPMA_UNROLL
            for (int j = 0; j < 2; ++j) {
              float& sum = sums.sum[i][n].value[2 * half + j];
              MPMA_UNROLL
              for (int d = 0; d < 4; ++d)
                sum = fma_rn(bits_float(left.word[d]), bits_float(right[n][j].word[d]), sum);
            }
        }
    }
    sums.for_each([&](int, int, float& x) { x = multiply_rn(x, m_.scale); });
    return sums;
  }

 private:
  const MemoryProblem<float>& m_;
  int head_;
  const float* query_[kM][2];
};

}  // namespace mpma::cuda
