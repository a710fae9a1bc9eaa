// What a block of the forward of the max form works on: see token_patch_max_similarity_forward.h.
#pragma once

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

// What a thread gathers of one row of its tiles, for each image of the block, and of one column, for each report. Kept in
// shared memory, because registers are short.
struct RowSums {
  Best running;  // over the tiles of an image that has several
  float sum[kColumnWarps];
  int real;
};
struct ColumnSums {
  float sum[kRowWarps];
  int real;
};

template <class T, int kN>
struct ForwardLayout {
  static constexpr int kDepth = 64 / sizeof(T), kSegment = 8 * kN, kColumns = kSegment * kColumnWarps;
  using TileA = Tile<T, kRows, kDepth>;
  using TileB = Tile<T, kColumns, kDepth>;
  using TokenCopier = RowCopier<T, kRows, kRowSegment, kDepth, kForwardThreads>;
  using PatchCopier = RowCopier<T, kColumns, kSegment, kDepth, kForwardThreads>;
  T *a_buffers, *b_buffers;
  // Of each row by each of its warps, of each column by each of its warps; at the end sums and counts.
  float *row_value, *column_value;  // (kColumnWarps, kRows), (kRowWarps, kColumns)
  int *row_index, *column_index;
  const T **token_rows, **patch_rows;
  RowSums* row_sums;  // of each thread
  ColumnSums* column_sums;
  uint32_t* real;  // of each thread: bits of its rows, then from the eighth on of its columns

  explicit MPMA_HOST_DEVICE ForwardLayout(SharedMemory& memory)
      : a_buffers(memory.take<T>(kStages * TileA::kSize)), b_buffers(memory.take<T>(kStages * TileB::kSize)),
        row_value(memory.take<float>(kColumnWarps * kRows)), column_value(memory.take<float>(kRowWarps * kColumns)),
        row_index(memory.take<int>(kColumnWarps * kRows)), column_index(memory.take<int>(kRowWarps * kColumns)),
        token_rows(memory.take<const T*>(TokenCopier::kSize)), patch_rows(memory.take<const T*>(PatchCopier::kSize)),
        row_sums(memory.take<RowSums>(kForwardThreads)), column_sums(memory.take<ColumnSums>(kForwardThreads)),
        real(memory.take<uint32_t>(kForwardThreads)) {}

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

}  // namespace mpma::cuda::max_similarity
