// The max form of token-patch similarity, forward: both maxima of every pair from one product.
//
// A block multiplies 128 token rows by two segments of patch rows, over the features in steps that are copied ahead. A
// report takes one or two halves of the 128 rows and an image one or two segments, so that the scores of a warp belong to
// one pair; they stay in its registers, and only maxima and their positions leave. Longer reports and images come as
// several tiles, one after the other.
#pragma once

#include "cuda/launch.h"
#include "cuda/max_similarity_best.h"
#include "cuda/max_similarity_side.h"
#include "cuda/shared_memory.h"

namespace mpma::cuda::max_similarity {

template <class T>
struct ForwardArguments {
  Side<T> tokens, patches;
  int width;
  bool aligned;           // rows begin at 16-byte boundaries and are a multiple of 16 bytes long
  float *to_patches, *to_tokens;        // (reports, images)
  int32_t *patch_index, *token_index;   // (reports, images, T) and (reports, images, P)
  float* of_patch;                      // (reports, images, P), workspace for reports of several tiles
  int log_row_warps, log_column_warps;  // of a report, of an image: 0 or 1
};

constexpr int kRowWarps = 2, kColumnWarps = 2, kForwardThreads = 32 * kRowWarps * kColumnWarps;
constexpr int kRowSegment = 64, kRows = kRowSegment * kRowWarps;
constexpr int kStages = 3;

template <class T, int kN>
struct ForwardLayout {
  static constexpr int kDepth = 64 / sizeof(T), kSegment = 8 * kN, kColumns = kSegment * kColumnWarps;
  using TileA = Tile<T, kRows, kDepth>;
  using TileB = Tile<T, kColumns, kDepth>;
  T *a_buffers, *b_buffers;
  // Of each row by each of its warps, of each column by each of its warps; at the end sums and counts.
  float *row_value, *column_value;  // (kColumnWarps, kRows), (kRowWarps, kColumns)
  int *row_index, *column_index;

  explicit MPMA_HOST_DEVICE ForwardLayout(SharedMemory& memory)
      : a_buffers(memory.take<T>(kStages * TileA::kSize)), b_buffers(memory.take<T>(kStages * TileB::kSize)),
        row_value(memory.take<float>(kColumnWarps * kRows)), column_value(memory.take<float>(kRowWarps * kColumns)),
        row_index(memory.take<int>(kColumnWarps * kRows)), column_index(memory.take<int>(kRowWarps * kColumns)) {}

  MPMA_DEVICE TileA a(int buffer) const { return {a_buffers + buffer * TileA::kSize}; }
  MPMA_DEVICE TileB b(int buffer) const { return {b_buffers + buffer * TileB::kSize}; }
  MPMA_DEVICE Best row_best(int warp, int row) const {
    return {row_value[warp * kRows + row], row_index[warp * kRows + row]};
  }
  MPMA_DEVICE Best column_best(int warp, int column) const {
    return {column_value[warp * kColumns + column], column_index[warp * kColumns + column]};
  }
};

// What a block works on.
struct Tiles {
  int64_t first_report, first_image;
  int rows, columns;              // of a tile that belong to one report, to one image
  int row_tiles, column_tiles;    // of the reports, of the images

  // Blocks that run together share their operands: images by images within a band of 16 blocks of reports.
  template <class T, int kSegment>
  static MPMA_DEVICE Tiles of_block(const ForwardArguments<T>& g) {
    const int reports = kRowWarps >> g.log_row_warps, images = kColumnWarps >> g.log_column_warps;
    const int64_t report_blocks = (g.tokens.items + reports - 1) / reports;
    const int64_t image_blocks = (g.patches.items + images - 1) / images;
    const int64_t band = block_x() / (16 * image_blocks), rest = block_x() % (16 * image_blocks);
    const int64_t left = report_blocks - 16 * band, in_band = left < 16 ? left : 16;
    Tiles t;
    t.first_report = (16 * band + rest % in_band) * reports;
    t.first_image = rest / in_band * images;
    t.rows = kRowSegment << g.log_row_warps;
    t.columns = kSegment << g.log_column_warps;
    // At least one, so that the results of empty operands are written.
    t.row_tiles = g.tokens.length > t.rows ? (g.tokens.length + t.rows - 1) / t.rows : 1;
    t.column_tiles = g.patches.length > t.columns ? (g.patches.length + t.columns - 1) / t.columns : 1;
    return t;
  }
};

// Leaves the maxima of a warp's scores in shared memory.
template <class T, int kN>
MPMA_DEVICE void reduce_scores(
    const Accumulator<4, kN>& scores, uint32_t real_rows, uint32_t real_columns, int first_row, int first_column,
    int row_at, int column_at, const ForwardLayout<T, kN>& layout, int row_warp, int column_warp) {
  using Layout = ForwardLayout<T, kN>;
  const bool some = warp_any(real_rows != 0) && warp_any(real_columns != 0);
  Best rows[8], columns[2 * kN];
  int row_slot0 = 0, column_slot0 = 0, column_count = 0;
  best_of_rows<false>(scores, real_columns, rows, row_slot0);
  best_of_columns<false>(scores, real_rows, columns, column_slot0, column_count);
  float finite = 0.f;  // becomes NaN where a score is NaN or infinite
  MPMA_UNROLL
  for (int m = 0; m < 4; ++m)
    MPMA_UNROLL
    for (int n = 0; n < kN; ++n)
      MPMA_UNROLL
      for (int i = 0; i < 4; ++i) finite = fma_rn(scores.sum[m][n].value[i], 0.f, finite);
  bool careful = finite != 0.f;
  MPMA_UNROLL
  for (int i = 0; i < 2; ++i) {
    careful |= (real_rows >> (row_slot0 + i) & 1) != 0 && rows[i].value <= kHidden;
    careful |= i < column_count && (real_columns >> (column_slot0 + i) & 1) != 0 && columns[i].value <= kHidden;
  }
  if (warp_any(some && careful)) {
    best_of_rows<true>(scores, real_columns, rows, row_slot0);
    best_of_columns<true>(scores, real_rows, columns, column_slot0, column_count);
  }
  MPMA_UNROLL
  for (int i = 0; i < 2; ++i) {
    const bool found = some && (real_rows >> (row_slot0 + i) & 1) != 0 && rows[i].index != kNowhere;
    const int at = column_warp * kRows + row_at + row_of_slot(row_slot0 + i);
    layout.row_value[at] = rows[i].value;
    layout.row_index[at] = found ? first_column + rows[i].index : kNowhere;
  }
  MPMA_UNROLL
  for (int i = 0; i < 2; ++i) {
    if (i >= column_count) break;
    const bool found = some && (real_columns >> (column_slot0 + i) & 1) != 0 && columns[i].index != kNowhere;
    const int at = row_warp * Layout::kColumns + column_at + column_of_slot(column_slot0 + i);
    layout.column_value[at] = columns[i].value;
    layout.column_index[at] = found ? first_row + columns[i].index : kNowhere;
  }
}

// What a thread gathers of one tile row, for each image of the block.
template <class T, int kN>
struct RowSums {
  Best running = no_best();  // over the tiles of an image that has several
  float sum[kColumnWarps] = {};
  int real = 0;

  MPMA_DEVICE void gather(
      const ForwardArguments<T>& g, const Tiles& tiles, const ForwardLayout<T, kN>& layout, int row_tile,
      int column_tile) {
    const int row = thread_index();
    if (row >= kRows) return;
    const Place at = place<kRowSegment>(row, tiles.first_report, row_tile * tiles.rows, g.log_row_warps);
    const bool last = column_tile + 1 == tiles.column_tiles;
    MPMA_UNROLL
    for (int i = 0; i < kColumnWarps; ++i) {
      if (i >= kColumnWarps >> g.log_column_warps) break;
      Best best = i == 0 && column_tile > 0 ? running : no_best();
      for (int warp = i << g.log_column_warps; warp < (i + 1) << g.log_column_warps; ++warp)
        best = better_of<true>(best, layout.row_best(warp, row));
      if (i == 0) running = best;
      const int64_t image = tiles.first_image + i;
      if (!last || !g.tokens.within(at.item, at.row) || image >= g.patches.items) continue;
      const bool found = best.index != kNowhere;
      g.patch_index[(at.item * g.patches.items + image) * g.tokens.length + at.row] = found ? best.index : 0;
      if (found) sum[i] += best.value;
    }
    if (last) real += g.tokens.real(at.item, at.row);
  }
};

// What a thread gathers of one tile column, for each report of the block.
template <class T, int kN>
struct ColumnSums {
  float sum[kRowWarps] = {};
  int real = 0;

  MPMA_DEVICE void gather(
      const ForwardArguments<T>& g, const Tiles& tiles, const ForwardLayout<T, kN>& layout, int row_tile,
      int column_tile) {
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
        best = better_of<true>(best, layout.column_best(warp, column));
      const bool found = best.index != kNowhere;
      g.token_index[out] = found || !last ? best.index : 0;
      if (!last)
        g.of_patch[out] = best.value;
      else if (found)
        sum[i] += best.value;
    }
    if (last) real += g.patches.real(at.item, at.row);
  }
};

// The means of all pairs of the block, a warp each.
template <class T, int kN>
MPMA_DEVICE void write_means(
    const ForwardArguments<T>& g, const Tiles& tiles, const ForwardLayout<T, kN>& layout, const RowSums<T, kN>& rows,
    const ColumnSums<T, kN>& columns) {
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

template <class T, int kN>
MPMA_KERNEL(kForwardThreads, 2)
forward_kernel(ForwardArguments<T> g) {
  using Layout = ForwardLayout<T, kN>;
  constexpr int kDepth = Layout::kDepth, kSegment = Layout::kSegment, kColumns = Layout::kColumns;
  SharedMemory memory = SharedMemory::this_block();
  const Layout layout(memory);
  const Tiles tiles = Tiles::of_block<T, kSegment>(g);
  const int depth_steps = g.width > kDepth ? (g.width + kDepth - 1) / kDepth : 1;

  // The next step to be copied: of a tile of rows, a tile of columns and some features.
  RowCopier<T, kRows, kRowSegment, kDepth, kForwardThreads> token_rows;
  RowCopier<T, kColumns, kSegment, kDepth, kForwardThreads> patch_rows;
  int next_row_tile = 0, next_column_tile = 0, next_depth = 0, next_buffer = 0;
  const auto copy_next = [&] {
    if (next_row_tile < tiles.row_tiles) {
      if (next_depth == 0) {
        token_rows.start(g.tokens, tiles.first_report, next_row_tile * tiles.rows, g.log_row_warps);
        patch_rows.start(g.patches, tiles.first_image, next_column_tile * tiles.columns, g.log_column_warps);
      }
      const int feature = next_depth * kDepth;
      token_rows.copy(layout.a(next_buffer), g.tokens, g.log_row_warps, feature, g.width, g.aligned);
      patch_rows.copy(layout.b(next_buffer), g.patches, g.log_column_warps, feature, g.width, g.aligned);
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
  RowSums<T, kN> row_sums;
  ColumnSums<T, kN> column_sums;
  int buffer = 0;
  for (int row_tile = 0; row_tile < tiles.row_tiles; ++row_tile) {
    for (int column_tile = 0; column_tile < tiles.column_tiles; ++column_tile) {
      const Place row0 = place<kRowSegment>(row_at, tiles.first_report, row_tile * tiles.rows, g.log_row_warps);
      const Place column0 = place<kSegment>(column_at, tiles.first_image, column_tile * tiles.columns, g.log_column_warps);
      uint32_t real_rows = 0, real_columns = 0;
      MPMA_UNROLL
      for (int i = 0; i < 8; ++i)
        real_rows |= static_cast<uint32_t>(g.tokens.real(row0.item, row0.row + row_of_slot(i))) << i;
      MPMA_UNROLL
      for (int i = 0; i < 2 * kN; ++i)
        real_columns |= static_cast<uint32_t>(g.patches.real(column0.item, column0.row + column_of_slot(i))) << i;
      Accumulator<4, kN> scores;
      scores.for_each([&](int row, int column, float& x) {
        x = (real_rows >> row_slot(row) & real_columns >> column_slot(column) & 1) != 0 ? 0.f : kHidden;
      });
      for (int depth = 0; depth < depth_steps; ++depth) {
        cp_async_wait<kStages - 2>();
        barrier();
        copy_next();  // over the buffer of the step before, which all have done
        multiply(scores, by_rows(layout.a(buffer), row_at), by_rows(layout.b(buffer), column_at), kDepth);
        buffer = buffer + 1 < kStages ? buffer + 1 : 0;
      }
      // The barriers of the next tile's product lie between this tile's reading and that one's writing of maxima.
      reduce_scores(
          scores, real_rows, real_columns, row0.row, column0.row, row_at, column_at, layout, row_warp, column_warp);
      barrier();
      row_sums.gather(g, tiles, layout, row_tile, column_tile);
      column_sums.gather(g, tiles, layout, row_tile, column_tile);
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
  if (padded_patches(g.patches.length, 56) < padded_patches(g.patches.length, 64))
    launch_forward<T, 7>(g, stream);
  else
    launch_forward<T, 8>(g, stream);
}

}  // namespace mpma::cuda::max_similarity
