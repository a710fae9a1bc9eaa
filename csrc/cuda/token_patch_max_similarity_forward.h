// The max form of token-patch similarity, forward: both maxima of every pair from one product.
//
// A block multiplies 128 token rows by two segments of patch rows, over the features in steps that are copied ahead. A
// report takes one or two halves of the 128 rows and an image one or two segments, so that the scores of a warp belong to
// one pair; they stay in its registers, and only maxima and their positions leave. Longer reports and images come as
// several tiles, one after the other.
#pragma once

#include "cuda/launch.h"
#include "cuda/token_patch_max_similarity_means.h"

namespace mpma::cuda::max_similarity {

// A warp's part of a tile.
struct Part {
  int first_row, first_column;  // within the report and the image
  int row_at, column_at;        // within the tile
  int row_warp, column_warp;
};

// Leaves the maxima of a warp's scores, which may be `ranked`, in shared memory. True where one is as low as what is hidden.
template <class T, int kN>
MPMA_DEVICE bool reduce_scores(
    const Accumulator<4, kN>& scores, const Part& part, bool ranked, const ForwardLayout<T, kN>& layout) {
  const uint32_t real_bits = layout.real[thread_index()];
  bool low = false;
  {
    Best best[4];
    const Left left = best_of_rows(scores, best);
    MPMA_UNROLL
    for (int i = 0; i < 2; ++i) {
      const bool real = (real_bits >> (left.first + i) & 1) != 0;
      const int at = part.column_warp * kRows + part.row_at + row_of_slot(left.first + i);
      layout.row_value[at] = ranked ? score_of_rank(best[i].value) : best[i].value;
      layout.row_index[at] = real ? part.first_column + best[i].index : kNowhere;
      low |= real && best[i].value <= kHidden;
    }
  }
  Best best[kN];
  const Left left = best_of_columns(scores, best);
  MPMA_UNROLL
  for (int i = 0; i < 2; ++i) {
    if (i >= left.count) break;
    const bool real = (real_bits >> (8 + left.first + i) & 1) != 0;
    const int at = part.row_warp * ForwardLayout<T, kN>::kColumns + part.column_at + column_of_slot(left.first + i);
    layout.column_value[at] = ranked ? score_of_rank(best[i].value) : best[i].value;
    layout.column_index[at] = real ? part.first_row + best[i].index : kNowhere;
    low |= real && best[i].value <= kHidden;
  }
  return low;
}

template <class T, int kN>
MPMA_DEVICE void reduce_tile(Accumulator<4, kN>& scores, const Part& part, const ForwardLayout<T, kN>& layout) {
  float finite = 0.f;  // becomes NaN where a score is NaN or infinite
  MPMA_UNROLL
  for (int m = 0; m < 4; ++m)
    MPMA_UNROLL
    for (int n = 0; n < kN; ++n)
      MPMA_UNROLL
      for (int i = 0; i < 4; ++i) finite = fma_rn(scores.sum[m][n].value[i], 0.f, finite);
  const bool low = reduce_scores(scores, part, false, layout);
  if (!warp_any(low || finite != 0.f)) return;
  const uint32_t real_bits = layout.real[thread_index()];
  MPMA_UNROLL
  for (int m = 0; m < 4; ++m)
    MPMA_UNROLL
    for (int n = 0; n < kN; ++n)
      MPMA_UNROLL
      for (int i = 0; i < 4; ++i) {
        float& x = scores.sum[m][n].value[i];
        x = rank_of(x, (real_bits >> (2 * m + i / 2) & real_bits >> (8 + 2 * n + i % 2) & 1) == 0);
      }
  reduce_scores(scores, part, true, layout);
}

template <class T, int kN>
MPMA_KERNEL(kForwardThreads, 2)
forward_kernel(ForwardArguments<T> g) {
  using Layout = ForwardLayout<T, kN>;
  constexpr int kDepth = Layout::kDepth, kSegment = Layout::kSegment;
  SharedMemory memory = SharedMemory::this_block();
  const Layout layout(memory);
  const Tiles tiles = Tiles::of_block<T, kSegment>(g);
  const int depth_steps = g.width > kDepth ? (g.width + kDepth - 1) / kDepth : 1;

  // The next step to be copied: of a tile of rows, a tile of columns and some features.
  const typename Layout::TokenCopier token_rows = {layout.token_rows};
  const typename Layout::PatchCopier patch_rows = {layout.patch_rows};
  int next_row_tile = 0, next_column_tile = 0, next_depth = 0, next_buffer = 0;
  const auto copy_next = [&] {
    if (next_row_tile < tiles.row_tiles) {
      if (next_depth == 0) {
        token_rows.start(g.tokens, tiles.first_report, next_row_tile * tiles.rows, g.log_row_warps);
        patch_rows.start(g.patches, tiles.first_image, next_column_tile * tiles.columns, g.log_column_warps);
      }
      const int feature = next_depth * kDepth;
      token_rows.copy(layout.a(next_buffer), feature, g.width, g.aligned);
      patch_rows.copy(layout.b(next_buffer), feature, g.width, g.aligned);
      next_buffer = next_buffer + 1 < kStages ? next_buffer + 1 : 0;
      if (++next_depth == depth_steps) {
        next_depth = 0;
        if (++next_column_tile == tiles.column_tiles) next_column_tile = 0, ++next_row_tile;
      }
    }
    cp_async_commit();
  };
  for (int i = 0; i + 1 < kStages; ++i) copy_next();

  const int row_warp = warp_index() / kColumnWarps, column_warp = warp_index() % kColumnWarps;
  const int row_at = row_warp * kRowSegment, column_at = column_warp * kSegment;
  RowSums& row_sums = layout.row_sums[thread_index()];
  ColumnSums& column_sums = layout.column_sums[thread_index()];
  start_sums(row_sums, column_sums);
  int buffer = 0;
  for (int row_tile = 0; row_tile < tiles.row_tiles; ++row_tile) {
    for (int column_tile = 0; column_tile < tiles.column_tiles; ++column_tile) {
      const Place row0 = place<kRowSegment>(row_at, tiles.first_report, row_tile * tiles.rows, g.log_row_warps);
      const Place column0 =
          place<kSegment>(column_at, tiles.first_image, column_tile * tiles.columns, g.log_column_warps);
      const Part part = {row0.row, column0.row, row_at, column_at, row_warp, column_warp};
      uint32_t real_rows = 0, real_columns = 0;
      MPMA_UNROLL
      for (int i = 0; i < 8; ++i)
        real_rows |= static_cast<uint32_t>(g.tokens.real(row0.item, row0.row + row_of_slot(i))) << i;
      MPMA_UNROLL
      for (int i = 0; i < 2 * kN; ++i)
        real_columns |= static_cast<uint32_t>(g.patches.real(column0.item, column0.row + column_of_slot(i))) << i;
      // A pair with nothing real on a side has nothing to look at.
      if (!warp_any(real_rows != 0) || !warp_any(real_columns != 0)) real_rows = real_columns = 0;
      layout.real[thread_index()] = real_rows | real_columns << 8;
      Accumulator<4, kN> scores;
      MPMA_UNROLL
      for (int m = 0; m < 4; ++m)
        MPMA_UNROLL
        for (int n = 0; n < kN; ++n)
          MPMA_UNROLL
          for (int i = 0; i < 4; ++i)
            scores.sum[m][n].value[i] =
                (real_rows >> (2 * m + i / 2) & real_columns >> (2 * n + i % 2) & 1) != 0 ? 0.f : kHidden;
      for (int depth = 0; depth < depth_steps; ++depth) {
        cp_async_wait<kStages - 2>();
        barrier();
        copy_next();  // over the buffer of the step before, which all have done
        multiply_by_steps(scores, by_rows(layout.a(buffer), row_at), by_rows(layout.b(buffer), column_at), kDepth);
        buffer = buffer + 1 < kStages ? buffer + 1 : 0;
      }
      // The barriers of the next tile's product lie between this tile's reading and that one's writing of maxima.
      reduce_tile(scores, part, layout);
      barrier();
      gather_rows(row_sums, g, tiles, layout, row_tile, column_tile);
      gather_columns(column_sums, g, tiles, layout, row_tile, column_tile);
    }
  }
  write_means(g, tiles, layout, row_sums, column_sums);
}

template <class T, int kN>
void launch_forward(ForwardArguments<T> g, void* stream) {
  constexpr int kSegment = 8 * kN;
  g.log_row_warps = g.tokens.length > kRowSegment;
  g.log_column_warps = g.patches.length > kSegment;
  const int reports = kRowWarps >> g.log_row_warps, images = kColumnWarps >> g.log_column_warps;
  const int64_t blocks =
      ((g.tokens.items + reports - 1) / reports) * ((g.patches.items + images - 1) / images);
  launch<forward_kernel<T, kN>>({{blocks}, kForwardThreads, shared_bytes<ForwardLayout<T, kN>>(), stream}, g);
}

// Rows of an image with those that fill up its segments of `segment` rows.
inline int64_t padded_patches(int64_t patches, int segment) {
  const int64_t tile = patches > segment ? 2 * segment : segment;
  return (patches + tile - 1) / tile * tile;
}

// Whether a launch needs `of_patch`.
inline bool several_row_tiles(int64_t tokens) { return tokens > kRows; }

// The segments, of 56 or 64 rows, that leave less to be filled up.
template <class T>
void launch_forward(ForwardArguments<T> g, void* stream) {
  g.aligned = aligned_rows(g.tokens.rows, g.tokens.item_stride, g.tokens.row_stride, g.width) &&
              aligned_rows(g.patches.rows, g.patches.item_stride, g.patches.row_stride, g.width);
  if constexpr (kIsHalf<T>)  // float32 has no registers for 64
    if (padded_patches(g.patches.length, 64) <= padded_patches(g.patches.length, 56)) return launch_forward<T, 8>(g, stream);
  launch_forward<T, 7>(g, stream);
}

}  // namespace mpma::cuda::max_similarity
