// The max form of token-patch similarity, backward: one product a side.
//
// An own item (a report, or an image) owns the gradient of its rows, summed over the other side's items in their order:
//   sum over others o of M_o X_o,  M_o[m, k] = g_o [row k is m's nearest] + h_o [own row m is k's nearest]
// with X_o the rows of o, and g_o and h_o the weights of the pair. M is all but empty: a warp sets its few elements in
// shared memory from the two saved indices, multiplies, and clears them again.
#pragma once

#include <type_traits>

#include "cuda/launch.h"
#include "cuda/shared_memory.h"
#include "cuda/token_patch_max_similarity_weights.h"

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

// A warp makes 32 own rows by 8 kN features; the four warps of a block share the other side's rows, 32 a step.
constexpr int kGradientWarps = 4, kGradientThreads = 32 * kGradientWarps, kGradientRows = 32, kGradientDepth = 32;

template <class T, int kN>
struct GradientLayout {
  using TileM = Tile<T, kGradientRows, kGradientDepth>;
  using TileX = Tile<T, kGradientDepth, 8 * kN>;
  static constexpr int kBuffers = 3;
  T *x_buffers, *m_of_warps;

  explicit MPMA_HOST_DEVICE GradientLayout(SharedMemory& memory)
      : x_buffers(memory.take<T>(kBuffers * TileX::kSize)), m_of_warps(memory.take<T>(kGradientWarps * TileM::kSize)) {}

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

// The elements of M that a lane sets and clears: one for its own row, one for its other row.
template <class T>
struct Elements {
  T *of_own = nullptr, *of_other = nullptr;

  template <class TileM>
  MPMA_DEVICE void set(
      const TileM& m, const Nearest& nearest, int own_row0, uint32_t real_own, int other_row0, uint32_t real_other) {
    const int lane = lane_index();
    const int column = nearest.of_own - other_row0, row = nearest.of_other - own_row0;
    const int back_to_own = shuffle(nearest.of_other, column & 31), back_to_other = shuffle(nearest.of_own, row & 31);
    of_own = of_other = nullptr;
    if ((real_own >> lane & 1) != 0 && column >= 0 && column < kGradientDepth && (real_other >> column & 1) != 0) {
      const bool mutual = back_to_own == own_row0 + lane;
      of_own = &m(lane, column);
      *of_own = from_float<T>(mutual ? nearest.own_weight + nearest.other_weight : nearest.own_weight);
    }
    if ((real_other >> lane & 1) != 0 && row >= 0 && row < kGradientRows && (real_own >> row & 1) != 0 &&
        back_to_other != other_row0 + lane) {
      of_other = &m(row, lane);
      *of_other = from_float<T>(nearest.other_weight);
    }
  }

  MPMA_DEVICE void clear() const {
    if (of_own != nullptr) *of_own = T{};
    if (of_other != nullptr) *of_other = T{};
  }
};

template <class T, int kN>
MPMA_KERNEL(kGradientThreads, 2)
gradient_kernel(GradientArguments<T> g) {
  using Layout = GradientLayout<T, kN>;
  constexpr int kColumns = 8 * kN;
  SharedMemory memory = SharedMemory::this_block();
  const Layout layout(memory);
  const int64_t segments_of_item = (g.own.length + kGradientRows - 1) / kGradientRows;
  const int64_t segments = g.own.items * segments_of_item;
  const int64_t blocks_of_rows = (segments + kGradientWarps - 1) / kGradientWarps;
  const int64_t segment = block_x() % blocks_of_rows * kGradientWarps + warp_index();
  const int feature0 = static_cast<int>(block_x() / blocks_of_rows) * kColumns;
  const int columns = g.width - feature0 < kColumns ? g.width - feature0 : kColumns;
  // Beyond the last segment: an item that is none.
  const int64_t own = segment / segments_of_item;
  const int own_row0 = static_cast<int>(segment % segments_of_item) * kGradientRows, own_row = own_row0 + lane_index();
  const uint32_t real_own = ballot(g.own.real(own, own_row));

  const auto m = layout.m(warp_index());
  for (int i = lane_index(); i < kGradientRows * kGradientDepth; i += kWarp) m(i / kGradientDepth, i % kGradientDepth) = T{};

  const auto real_rows = [&](const OtherRows& at) { return g.other.real(at.item, at.row + lane_index()); };
  const auto copy = [&](const OtherRows& at, uint32_t real, int buffer) {
    const auto x = layout.x(buffer);
    if (at.item < g.other.items) {
      const T* item = g.other.rows + at.item * g.other.item_stride + feature0;
      load_tile(x, columns, g.aligned, [&](int row) -> const T* {
        return (real >> row & 1) != 0 ? item + (at.row + row) * g.other.row_stride : nullptr;
      });
    }
    cp_async_commit();
  };
  // Two steps are on their way while one is multiplied. real[0] belongs to the step that is multiplied next.
  OtherRows next = {0, 0}, now = {0, 0};
  uint32_t real0 = ballot(real_rows(next));
  copy(next, real0, 0);
  next.advance(g.other);
  uint32_t real1 = ballot(real_rows(next));
  copy(next, real1, 1);
  next.advance(g.other);
  bool real_next = real_rows(next);
  Nearest nearest;
  nearest.read(g, own, own_row, now);

  Accumulator<2, kN> sums;
  sums.clear();
  int buffer = 0, copied = 2;
  while (g.other.length > 0 && now.item < g.other.items) {
    cp_async_wait<1>();
    barrier();
    const uint32_t real2 = ballot(real_next);
    copy(next, real2, copied);  // over the buffer of the step before, which all have done
    next.advance(g.other);
    real_next = real_rows(next);
    Elements<T> elements;
    elements.set(m, nearest, own_row0, real_own, now.row, real0);
    const int depth = g.other.length - now.row;
    now.advance(g.other);
    nearest.read(g, own, own_row, now);
    warp_barrier();
    const auto a = by_rows(m);
    const auto b = by_columns(layout.x(buffer));
    if (depth > 16)
      multiply(sums, a, b, 32);
    else
      multiply(sums, a, b, 16);
    warp_barrier();
    elements.clear();  // the barrier of the next step lies before its elements are set
    real0 = real1;
    real1 = real2;
    buffer = buffer + 1 < Layout::kBuffers ? buffer + 1 : 0;
    copied = copied + 1 < Layout::kBuffers ? copied + 1 : 0;
  }
  cp_async_wait<0>();
  if (own >= g.own.items) return;
  const float unscale = g.unscale[own];
  MPMA_UNROLL
  for (int i = 0; i < 2; ++i)
    MPMA_UNROLL
    for (int n = 0; n < kN; ++n)
      MPMA_UNROLL
      for (int j = 0; j < 4; ++j) {
        const int row = 16 * i + j / 2 * 8 + lane_index() / 4;
        float& x = sums.sum[i][n].value[j];
        x = (real_own >> row & 1) != 0 ? multiply_rn(x, unscale) : 0.f;
      }
  const int rows = g.own.length - own_row0 < kGradientRows ? g.own.length - own_row0 : kGradientRows;
  store_global<T>(sums, rows, columns, [&](int row) {
    return g.grad + (own * g.own.length + own_row0 + row) * g.width + feature0;
  });
}

template <class T, int kN>
void launch_gradient(const GradientArguments<T>& g, void* stream) {
  const int64_t segments = g.own.items * ((g.own.length + kGradientRows - 1) / kGradientRows);
  const int64_t blocks = (segments + kGradientWarps - 1) / kGradientWarps * ((g.width + 8 * kN - 1) / (8 * kN));
  launch<gradient_kernel<T, kN>>({{blocks}, kGradientThreads, shared_bytes<GradientLayout<T, kN>>(), stream}, g);
}

// Floats of workspace that launch_backward wants.
inline int64_t backward_workspace(int64_t reports, int64_t images) {
  return 2 * reports * images + 2 * (reports + images);
}

template <class T>
struct BackwardArguments {
  Side<T> tokens, patches;
  int width;
  const float *grad_to_patches, *grad_to_tokens;  // (reports, images)
  const int32_t *patch_index, *token_index;
  float* workspace;
  T *grad_tokens, *grad_patches;  // contiguous; nullptr where not needed
};

template <class T>
struct BackwardSide {
  Side<T> side;
  const float* grad;
  const int32_t* index;
  const float* count;
  int64_t pair_step;

  PairSide pairs() const {
    return {grad, side.mask, side.mask_item, side.mask_row, side.items, pair_step, side.length};
  }
};

template <class T>
void launch_side(
    const BackwardSide<T>& own, const BackwardSide<T>& other, int width, float* weights, float* unscale, T* grad,
    const Device& device, void* stream) {
  if (own.side.items == 0 || own.side.length == 0 || width == 0) return;
  const int64_t pairs = own.side.items * other.side.items;
  launch_weights(
      {own.pairs(), other.pairs(), own.count, other.count, weights, weights + pairs, unscale,
       std::is_same_v<T, Half>},
      stream);
  const GradientArguments<T> g = {
      own.side, other.side, width,
      aligned_rows(other.side.rows, other.side.item_stride, other.side.row_stride, width),
      own.index, other.index, weights, weights + pairs, unscale, own.pair_step, other.pair_step, grad};
  // A wide tile sets its M and reads its indices half as often, but there must be enough of them for every multiprocessor.
  // Each sum has the same order in both.
  const int64_t wide_tiles = own.side.items * ((own.side.length + 31) / 32) / kGradientWarps * (width / 128);
  if (wide_tiles >= 2 * device.multiprocessors)
    launch_gradient<T, 16>(g, stream);
  else
    launch_gradient<T, 8>(g, stream);
}

template <class T>
void launch_backward(const BackwardArguments<T>& g, const Device& device, void* stream) {
  const int64_t reports = g.tokens.items, images = g.patches.items;
  float* weights = g.workspace;
  float* token_counts = weights + 2 * reports * images;
  float* patch_counts = token_counts + reports;
  float* unscale = patch_counts + images;  // of the larger side's items
  const BackwardSide<T> tokens = {g.tokens, g.grad_to_patches, g.patch_index, token_counts, images};
  const BackwardSide<T> patches = {g.patches, g.grad_to_tokens, g.token_index, patch_counts, 1};
  launch_count(tokens.pairs(), token_counts, stream);
  launch_count(patches.pairs(), patch_counts, stream);
  if (g.grad_tokens != nullptr)
    launch_side(tokens, patches, g.width, weights, unscale, g.grad_tokens, device, stream);
  if (g.grad_patches != nullptr)
    launch_side(patches, tokens, g.width, weights, unscale, g.grad_patches, device, stream);
}

}  // namespace mpma::cuda::max_similarity
