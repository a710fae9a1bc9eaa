// The sums of a warp in the backward of the max form: see token_patch_max_similarity_backward.h.
#pragma once

#include "cuda/max_similarity_side.h"
#include "cuda/shared_memory.h"

namespace mpma::cuda::max_similarity {

template <class T>
struct GradientArguments {
  Side<T> own, other;  // of own only the masks and sizes
  int width;
  bool aligned;
  const int32_t *own_index, *other_index;  // (pairs, M), nearest of the other item; (pairs, K), nearest of the own
  const float *own_weight, *other_weight;  // of each pair
  const float* unscale;                    // of each own item
  int64_t own_pair, other_pair;            // pairs from one own item to the next, from one other item to the next
  T* grad;                                 // (own items, M, D)
};

// A warp makes 32 own rows by 8 kN features, kN 8 in float32; the four warps of a block share the other side's rows, 32 a step.
constexpr int kGradientWarps = 4, kGradientThreads = 32 * kGradientWarps, kGradientRows = 32, kGradientDepth = 32;

template <class T, int kN>
struct GradientLayout {
  using TileM = Tile<T, kGradientRows, kGradientDepth>;
  using TileX = Tile<T, kGradientDepth, 8 * kN>;
  static constexpr int kBuffers = 3;
  T *x_buffers, *m_of_warps;

  explicit MPMA_HOST_DEVICE GradientLayout(SharedMemory& memory)
      : x_buffers(memory.take<T>(kBuffers * TileX::kSize)), m_of_warps(kIsHalf<T> ? memory.take<T>(kGradientWarps * TileM::kSize) : nullptr) {}

  MPMA_DEVICE TileX x(int buffer) const { return {x_buffers + buffer * TileX::kSize}; }
  MPMA_DEVICE TileM m(int warp) const { return {m_of_warps + warp * TileM::kSize}; }
};

// A step of the sum: rows `row` to row + 31 of one item of the other side.
struct OtherRows {
  int64_t item;
  int row;

  template <class T>
  MPMA_DEVICE void advance(const Side<T>& other) {
    row += kGradientDepth;
    if (row >= other.length) row = 0, ++item;
  }
};

// What a warp needs to know of a step, a lane of one own row and of one other row. It is read a step ahead.
struct Nearest {
  int of_own = -1, of_other = -1;
  float own_weight = 0.f, other_weight = 0.f;

  template <class T>
  MPMA_DEVICE void read(const GradientArguments<T>& g, int64_t own, int own_row, const OtherRows& at) {
    if (own >= g.own.items || at.item >= g.other.items) return;
    const int64_t pair = own * g.own_pair + at.item * g.other_pair;
    if (at.row == 0) {
      of_own = own_row < g.own.length ? g.own_index[pair * g.own.length + own_row] : -1;
      own_weight = g.own_weight[pair];
      other_weight = g.other_weight[pair];
    }
    const int k = at.row + lane_index();
    of_other = k < g.other.length ? g.other_index[pair * g.other.length + k] : -1;
  }
};

// The elements of M that a lane stands for: (lane, column) if its own row's nearest is in the step, and (row, lane) if the
// nearest of its other row is among the warp's.
struct Chosen {
  int column, row;
  bool of_own, of_other;

  MPMA_DEVICE Chosen(const Nearest& nearest, int own_row0, uint32_t real_own, int other_row0, uint32_t real_other)
      : column(nearest.of_own - other_row0), row(nearest.of_other - own_row0) {
    const int lane = lane_index();
    const bool column_here = column >= 0 && column < kGradientDepth, row_here = row >= 0 && row < kGradientRows;
    of_own = (real_own >> lane & 1) != 0 && column_here && (real_other >> (column & 31) & 1) != 0;
    of_other = (real_other >> lane & 1) != 0 && row_here && (real_own >> (row & 31) & 1) != 0;
  }
};

// The sums of a warp, in half precision.
template <class T, int kN>
struct GradientSums {
  using Layout = GradientLayout<T, kN>;
  Accumulator<2, kN> sums;

  MPMA_DEVICE void start(const Layout& layout) {
    sums.clear();
    const auto m = layout.m(warp_index());
    for (int i = lane_index(); i < kGradientRows * kGradientDepth; i += kWarp)
      m(i / kGradientDepth, i % kGradientDepth) = T{};
  }

  // Adds a step of `depth` rows; `next` is called once M is set.
  template <class Next>
  MPMA_DEVICE void add(
      const Layout& layout, int buffer, const Chosen& chosen, const Nearest& nearest, int depth, const Next& next) {
    const auto m = layout.m(warp_index());
    const int lane = lane_index();
    // An element that both stand for is set by the own row's lane.
    const int back_to_own = shuffle(chosen.of_other ? chosen.row : -1, chosen.column & 31);
    const int back_to_other = shuffle(chosen.of_own ? chosen.column : -1, chosen.row & 31);
    T *of_own = nullptr, *of_other = nullptr;
    if (chosen.of_own) {
      const float both = back_to_own == lane ? nearest.other_weight : 0.f;
      of_own = &m(lane, chosen.column);
      *of_own = from_float<T>(nearest.own_weight + both);
    }
    if (chosen.of_other && back_to_other != lane) {
      of_other = &m(chosen.row, lane);
      *of_other = from_float<T>(nearest.other_weight);
    }
    next();
    warp_barrier();
    const auto a = by_rows(m);
    const auto b = by_columns(layout.x(buffer));
    if (depth > 16)
      multiply(sums, a, b, 32);
    else
      multiply(sums, a, b, 16);
    warp_barrier();
    if (of_own != nullptr) *of_own = T{};  // the barrier of the next step lies before its elements are set
    if (of_other != nullptr) *of_other = T{};
  }

  // The first `rows` x `columns`, zeros where a row is not real.
  MPMA_DEVICE void store(T* grad, int64_t width, int rows, int columns, uint32_t real, float unscale) {
    MPMA_UNROLL
    for (int m = 0; m < 2; ++m)
      MPMA_UNROLL
      for (int n = 0; n < kN; ++n)
        MPMA_UNROLL
        for (int i = 0; i < 4; ++i) {
          float& x = sums.sum[m][n].value[i];
          x = (real >> (16 * m + i / 2 * 8 + lane_index() / 4) & 1) != 0 ? multiply_rn(x, unscale) : 0.f;
        }
    store_global<T>(sums, rows, columns, [&](int row) { return grad + row * width; });
  }
};

// In float32: a lane holds two features of each row.
template <>
struct GradientSums<float, 8> {
  using Layout = GradientLayout<float, 8>;
  float sum[kGradientRows][2];

  MPMA_DEVICE void start(const Layout&) {
    MPMA_UNROLL
    for (int row = 0; row < kGradientRows; ++row) sum[row][0] = sum[row][1] = 0.f;
  }

  static MPMA_DEVICE void add_row(float (&sum)[2], float weight, const Layout::TileX& x, int k) {
    const Bytes8 features = load_8(&x(k, 2 * lane_index()));
    sum[0] = fma_rn(weight, bits_float(features.word[0]), sum[0]);
    sum[1] = fma_rn(weight, bits_float(features.word[1]), sum[1]);
  }

  template <class Next>
  MPMA_DEVICE void add(
      const Layout& layout, int buffer, const Chosen& chosen, const Nearest& nearest, int, const Next& next) {
    const float own_weight = nearest.own_weight, other_weight = nearest.other_weight;
    const auto x = layout.x(buffer);
    next();
    const uint32_t owners = ballot(chosen.of_own);
    MPMA_UNROLL
    for (int row = 0; row < kGradientRows; ++row) {
      const int k = shuffle(chosen.column, row);
      if ((owners >> row & 1) != 0) add_row(sum[row], own_weight, x, k);
      for (uint32_t others = ballot(chosen.of_other && chosen.row == row); others != 0; others &= others - 1)
        add_row(sum[row], other_weight, x, lowest_bit(others));
    }
  }

  MPMA_DEVICE void store(float* grad, int64_t width, int rows, int columns, uint32_t real, float unscale) {
    const int column = 2 * lane_index();
    MPMA_UNROLL
    for (int row = 0; row < kGradientRows; ++row) {
      if (row >= rows) break;
      MPMA_UNROLL
      for (int i = 0; i < 2; ++i)
        if (column + i < columns)
          grad[row * width + column + i] = (real >> row & 1) != 0 ? multiply_rn(sum[row][i], unscale) : 0.f;
    }
  }
};

}  // namespace mpma::cuda::max_similarity
