// The gradient of queries, where no block has all keys of a head. A warp owns 16 queries of a head, whose sums stay in
// its registers while the block goes over tiles of keys.
#pragma once

#include "cuda/masked_attention_gradients.h"
#include "cuda/masked_attention_key_tiles.h"

namespace mpma::cuda {

template <class T, int kWidth>
struct QueryGradientShape {
  static constexpr int kQueries = 16;  // of a warp
  static constexpr int kKeys = 32;     // of a tile
  // As many as a block's 99 KB have room for, with two tiles of keys and of values.
  static constexpr int kWarps = !kIsHalf<T> && kWidth > 64 ? 1 : 4;
  using TileQ = Tile<T, kQueries, kWidth>;
  using TileK = Tile<T, kKeys, kWidth>;
};

template <class T, int kWidth>
struct QueryGradientLayout {
  using Shape = QueryGradientShape<T, kWidth>;
  T *queries, *gradients, *keys, *values;
  float *statistics, *inners;

  explicit MPMA_HOST_DEVICE QueryGradientLayout(SharedMemory& memory, int warps)
      : queries(memory.take<T>(warps * Shape::TileQ::kSize)),
        gradients(memory.take<T>(warps * Shape::TileQ::kSize)),
        keys(memory.take<T>(2 * Shape::TileK::kSize)),
        values(memory.take<T>(2 * Shape::TileK::kSize)),
        statistics(memory.take<float>(warps * Shape::kQueries)),
        inners(memory.take<float>(warps * Shape::kQueries)) {}

  MPMA_DEVICE typename Shape::TileQ query(int warp) const { return {queries + warp * Shape::TileQ::kSize}; }
  MPMA_DEVICE typename Shape::TileQ gradient(int warp) const { return {gradients + warp * Shape::TileQ::kSize}; }
  MPMA_DEVICE typename Shape::TileK key(int buffer) const { return {keys + buffer * Shape::TileK::kSize}; }
  MPMA_DEVICE typename Shape::TileK value(int buffer) const { return {values + buffer * Shape::TileK::kSize}; }
};

template <class T, int kWidth, bool kDropout>
MPMA_KERNEL(128, 2)
attention_query_gradients_kernel(Attention<T> a, AttentionGradients<T> g, int parts) {
  using Shape = QueryGradientShape<T, kWidth>;
  SharedMemory memory = SharedMemory::this_block();
  const QueryGradientLayout<T, kWidth> layout(memory, warp_count());
  const Place place = place_of(a, parts);
  const Extent queries = queries_of(a, place.item), keys = keys_of(a, place.item);
  const int width = a.sizes.width;
  if (a.packed()) fill_rest(g.query, place, parts, queries, width, 0.f);
  const int block_first = place.part * warp_count() * Shape::kQueries;
  if (block_first >= queries.length) return;
  const int warp = warp_index(), first = block_first + warp * Shape::kQueries;
  const bool busy = first < queries.length;

  const auto load_own = [&](const typename Shape::TileQ& tile, const Rows<const T>& rows, bool aligned) {
    load_rows(
        tile, rows.at(place.item, queries.start + first, place.head), rows.row,
        real_queries<Shape::kQueries>(queries, first), width, aligned, lane_index(), kWarp);
  };
  load_own(layout.query(warp), a.query, a.aligned);
  load_own(layout.gradient(warp), g.grad_output, g.aligned);
  cp_async_commit();
  KeyTiles<T, QueryGradientLayout<T, kWidth>> tiles(a, layout, place, keys);
  float* const statistics = layout.statistics + warp * Shape::kQueries;
  float* const inners = layout.inners + warp * Shape::kQueries;
  query_statistics(a, g, place, queries, first, Shape::kQueries, statistics, inners, 0, 1);
  warp_barrier();
  float statistic[2], inner[2];
  MPMA_UNROLL
  for (int i = 0; i < 2; ++i) {
    statistic[i] = statistics[8 * i + lane_index() / 4];
    inner[i] = inners[8 * i + lane_index() / 4];
  }

  Accumulator<1, kWidth / 8> sums;
  sums.clear();
  tiles.for_each([&](int first_key, uint32_t real, int buffer) {
    if (!busy) return;
    Kept<1, Shape::kKeys / 8> kept;
    if constexpr (kDropout)
      kept = kept_by_query<1, Shape::kKeys / 8>(dropout_draw(a, place), first, first_key);
    Accumulator<1, Shape::kKeys / 8> scores, grad_weights;
    scores.clear();
    multiply_long(scores, by_rows(layout.query(warp)), by_rows(layout.key(buffer)), kWidth);
    grad_weights.clear();
    multiply_long(grad_weights, by_rows(layout.gradient(warp)), by_rows(layout.value(buffer)), kWidth);
    const float scale = a.scale * kLog2E;
    const uint32_t real_columns = real >> (lane_index() % 4 * 2);
    MPMA_UNROLL
    for (int n = 0; n < Shape::kKeys / 8; ++n)
      MPMA_UNROLL
      for (int i = 0; i < 4; ++i) {
        float& x = scores.sum[0][n].value[i];
        const bool mine = (real_columns >> (8 * n + i % 2) & 1) != 0;
        float grad = grad_weights.sum[0][n].value[i];
        if constexpr (kDropout) grad = kept(0, n, i) ? grad * a.dropout.kept : 0.f;
        x = mine ? exp2_fast(x * scale - statistic[i / 2]) * (grad - inner[i / 2]) : 0.f;
      }
    multiply<T>(sums, scores, by_columns(layout.key(buffer)));
  });
  if (!busy) return;
  scale_all(sums, a.scale);
  store_global<T>(sums, queries.length - first, width, [&](int row) {
    return g.query.at(place.item, queries.start + first + row, place.head);
  });
}

template <class T, int kWidth, bool kDropout>
void launch_attention_query_gradients(const Attention<T>& a, const AttentionGradients<T>& g, void* stream) {
  using Shape = QueryGradientShape<T, kWidth>;
  const int queries = a.sizes.queries > 0 ? a.sizes.queries : 1;  // without any, to clear rows of no sequence
  const int64_t parts = ceil_divide(queries, Shape::kWarps * Shape::kQueries);
  const int64_t warps = ceil_divide(ceil_divide(queries, parts), Shape::kQueries);
  const int shared = shared_bytes<QueryGradientLayout<T, kWidth>>(static_cast<int>(warps));
  const Launch how = {{parts * a.places()}, static_cast<int>(warps) * kWarp, shared, stream};
  launch<attention_query_gradients_kernel<T, kWidth, kDropout>>(how, a, g, static_cast<int>(parts));
}

}  // namespace mpma::cuda
