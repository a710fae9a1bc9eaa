// The max form of token-patch similarity, backward: one product a side.
//
// An own item (a report, or an image) owns the gradient of its rows, summed over the other side's items in their order:
//   sum over others o of M_o X_o,  M_o[m, k] = g_o [row k is m's nearest] + h_o [own row m is k's nearest]
// with X_o the rows of o, and g_o and h_o the weights of the pair. M is all but empty. In half precision a warp sets its few
// elements in shared memory, multiplies on the tensor cores, and clears them again. float32 wants more digits than three
// TF32 products of a single pair of numbers have: there the chosen rows are added one by one.
#pragma once

#include <type_traits>

#include "cuda/launch.h"
#include "cuda/token_patch_max_similarity_sums.h"
#include "cuda/token_patch_max_similarity_weights.h"

namespace mpma::cuda::max_similarity {

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

  GradientSums<T, kN> sums;
  sums.start(layout);
  int buffer = 0, copied = 2;
  while (g.other.length > 0 && now.item < g.other.items) {
    cp_async_wait<1>();
    barrier();
    const uint32_t real2 = ballot(real_next);
    copy(next, real2, copied);  // over the buffer of the step before, which all have done
    next.advance(g.other);
    real_next = real_rows(next);
    const Chosen chosen(nearest, own_row0, real_own, now.row, real0);
    const int depth = g.other.length - now.row;
    now.advance(g.other);
    sums.add(layout, buffer, chosen, nearest, depth, [&] { nearest.read(g, own, own_row, now); });
    real0 = real1;
    real1 = real2;
    buffer = buffer + 1 < Layout::kBuffers ? buffer + 1 : 0;
    copied = copied + 1 < Layout::kBuffers ? copied + 1 : 0;
  }
  cp_async_wait<0>();
  if (own >= g.own.items) return;
  const int rows = g.own.length - own_row0 < kGradientRows ? g.own.length - own_row0 : kGradientRows;
  T* grad = g.grad + (own * g.own.length + own_row0) * g.width + feature0;
  sums.store(grad, g.width, rows, columns, real_own, g.unscale[own]);
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
  if constexpr (kIsHalf<T>)
    if (wide_tiles >= 2 * device.multiprocessors) return launch_gradient<T, 16>(g, stream);
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
