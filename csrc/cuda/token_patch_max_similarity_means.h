// From the maxima of tiles to the results of a block: see token_patch_max_similarity_forward.h.
#pragma once

#include "cuda/token_patch_max_similarity_block.h"

namespace mpma::cuda::max_similarity {

MPMA_DEVICE void start_sums(RowSums& rows, ColumnSums& columns) {
  rows.running = no_best();
  MPMA_UNROLL
  for (int i = 0; i < kColumnWarps; ++i) rows.sum[i] = 0.f;
  MPMA_UNROLL
  for (int i = 0; i < kRowWarps; ++i) columns.sum[i] = 0.f;
  rows.real = columns.real = 0;
}

// Takes the maxima of a tile's rows.
template <class T, int kN>
MPMA_DEVICE void gather_rows(
    RowSums& sums, const ForwardArguments<T>& g, const Tiles& tiles, const ForwardLayout<T, kN>& layout, int row_tile,
    int column_tile) {
  const int row = thread_index();
  if (row >= kRows) return;
  const Place at = place<kRowSegment>(row, tiles.first_report, row_tile * tiles.rows, g.log_row_warps);
  const bool last = column_tile + 1 == tiles.column_tiles;
  MPMA_UNROLL
  for (int i = 0; i < kColumnWarps; ++i) {
    if (i >= kColumnWarps >> g.log_column_warps) break;
    Best best = i == 0 && column_tile > 0 ? sums.running : no_best();
    for (int warp = i << g.log_column_warps; warp < (i + 1) << g.log_column_warps; ++warp)
      best = better_of_any(best, layout.row_best(warp, row));
    if (i == 0) sums.running = best;
    const int64_t image = tiles.first_image + i;
    if (!last || !g.tokens.within(at.item, at.row) || image >= g.patches.items) continue;
    const bool found = best.index != kNowhere;
    g.patch_index[(at.item * g.patches.items + image) * g.tokens.length + at.row] = found ? best.index : 0;
    if (found) sums.sum[i] += best.value;
  }
  if (last) sums.real += g.tokens.real(at.item, at.row);
}

// Takes the maxima of a tile's columns.
template <class T, int kN>
MPMA_DEVICE void gather_columns(
    ColumnSums& sums, const ForwardArguments<T>& g, const Tiles& tiles, const ForwardLayout<T, kN>& layout,
    int row_tile, int column_tile) {
  constexpr int kSegment = ForwardLayout<T, kN>::kSegment;
  const int column = thread_index();
  if (column >= ForwardLayout<T, kN>::kColumns) return;
  const Place at = place<kSegment>(column, tiles.first_image, column_tile * tiles.columns, g.log_column_warps);
  if (!g.patches.within(at.item, at.row)) return;
  const bool last = row_tile + 1 == tiles.row_tiles;
  MPMA_UNROLL
  for (int i = 0; i < kRowWarps; ++i) {
    if (i >= kRowWarps >> g.log_row_warps) break;
    const int64_t report = tiles.first_report + i;
    if (report >= g.tokens.items) break;
    const int64_t out = (report * g.patches.items + at.item) * g.patches.length + at.row;
    Best best = no_best();
    if (row_tile > 0) best = {g.of_patch[out], g.token_index[out]};
    for (int warp = i << g.log_row_warps; warp < (i + 1) << g.log_row_warps; ++warp)
      best = better_of_any(best, layout.column_best(warp, column));
    const bool found = best.index != kNowhere;
    g.token_index[out] = found || !last ? best.index : 0;
    if (!last)
      g.of_patch[out] = best.value;
    else if (found)
      sums.sum[i] += best.value;
  }
  if (last) sums.real += g.patches.real(at.item, at.row);
}

// The means of all pairs of the block, a warp each.
template <class T, int kN>
MPMA_DEVICE void write_means(
    const ForwardArguments<T>& g, const Tiles& tiles, const ForwardLayout<T, kN>& layout, const RowSums& rows,
    const ColumnSums& columns) {
  constexpr int kColumns = ForwardLayout<T, kN>::kColumns;
  barrier();  // the maxima have been read
  const int thread = thread_index();
  if (thread < kRows) {
    MPMA_UNROLL
    for (int i = 0; i < kColumnWarps; ++i) layout.row_value[i * kRows + thread] = rows.sum[i];
    layout.row_index[thread] = rows.real;
  }
  if (thread < kColumns) {
    MPMA_UNROLL
    for (int i = 0; i < kRowWarps; ++i) layout.column_value[i * kColumns + thread] = columns.sum[i];
    layout.column_index[thread] = columns.real;
  }
  barrier();
  const int reports = kRowWarps >> g.log_row_warps, images = kColumnWarps >> g.log_column_warps;
  for (int pair = warp_index(); pair < reports * images; pair += warp_count()) {
    const int report = pair / images, image = pair % images;
    float token_sum = 0.f, patch_sum = 0.f;
    int tokens = 0, patches = 0;
    for (int i = report * tiles.rows + lane_index(); i < (report + 1) * tiles.rows; i += kWarp) {
      token_sum += layout.row_value[image * kRows + i];
      tokens += layout.row_index[i];
    }
    for (int i = image * tiles.columns + lane_index(); i < (image + 1) * tiles.columns; i += kWarp) {
      patch_sum += layout.column_value[report * kColumns + i];
      patches += layout.column_index[i];
    }
    for (int lanes = 1; lanes < kWarp; lanes *= 2) {
      token_sum += shuffle_xor(token_sum, lanes);
      patch_sum += shuffle_xor(patch_sum, lanes);
      tokens += shuffle_xor(tokens, lanes);
      patches += shuffle_xor(patches, lanes);
    }
    const int64_t j = tiles.first_report + report, i = tiles.first_image + image;
    if (lane_index() == 0 && j < g.tokens.items && i < g.patches.items) {
      g.to_patches[j * g.patches.items + i] = divide_rn(token_sum, static_cast<float>(tokens > 0 ? tokens : 1));
      g.to_tokens[j * g.patches.items + i] = divide_rn(patch_sum, static_cast<float>(patches > 0 ? patches : 1));
    }
  }
}

}  // namespace mpma::cuda::max_similarity
