// The gradients of keys and values. A warp owns 16 or 32 keys of a head, whose sums stay in its registers while the
// block goes over tiles of queries. Where one block has all keys of the head, the gradient of a tile of queries is
// complete in it too, and everything is read once and written once.
#pragma once

#include "cuda/masked_attention_gradients.h"

namespace mpma::cuda {

template <class T, int kWidth>
struct KeyGradientShape {
  static constexpr int kM = kIsHalf<T> && kWidth <= 64 ? 2 : 1;
  static constexpr int kKeys = 16 * kM;   // of a warp
  static constexpr int kQueries = kIsHalf<T> || kWidth <= 64 ? 32 : 16;  // of a tile
  static constexpr int kWarps = 8;        // at most
  static constexpr int kStatistics = 64;  // queries whose statistics are there at a time, at least
  using TileK = Tile<T, kKeys, kWidth>;
  using TileQ = Tile<T, kQueries, kWidth>;
  using TileS = Tile<T, kKeys, kQueries>;
};

// The tiles of a block's warps lie one after the other, so that together they are one.
template <class T, int kWidth>
struct KeyGradientLayout {
  using Shape = KeyGradientShape<T, kWidth>;
  T *keys, *values, *queries, *gradients, *scores;
  float *statistic, *inner;

  MPMA_HOST_DEVICE KeyGradientLayout(SharedMemory& memory, int warps, int statistics)
      : keys(memory.take<T>(warps * Shape::TileK::kSize)),
        values(memory.take<T>(warps * Shape::TileK::kSize)),
        queries(memory.take<T>(2 * Shape::TileQ::kSize)),
        gradients(memory.take<T>(2 * Shape::TileQ::kSize)),
        scores(memory.take<T>(warps * Shape::TileS::kSize)),
        statistic(memory.take<float>(statistics)),
        inner(memory.take<float>(statistics)) {}

  MPMA_DEVICE typename Shape::TileK key(int warp) const { return {keys + warp * Shape::TileK::kSize}; }
  MPMA_DEVICE typename Shape::TileK value(int warp) const { return {values + warp * Shape::TileK::kSize}; }
  MPMA_DEVICE typename Shape::TileQ query(int buffer) const { return {queries + buffer * Shape::TileQ::kSize}; }
  MPMA_DEVICE typename Shape::TileQ gradient(int buffer) const { return {gradients + buffer * Shape::TileQ::kSize}; }
  MPMA_DEVICE typename Shape::TileS score(int warp) const { return {scores + warp * Shape::TileS::kSize}; }
};

// The sums of a warp's keys, without scale.
template <class T, int kWidth>
struct KeySums {
  using Shape = KeyGradientShape<T, kWidth>;
  using Scores = Accumulator<Shape::kM, Shape::kQueries / 8>;
  Accumulator<Shape::kM, kWidth / 8> key, value;

  MPMA_DEVICE void clear() { key.clear(), value.clear(); }

  // Writes the first `rows` rows, 0 for the keys that do not take part.
  MPMA_DEVICE static void store(
      Accumulator<Shape::kM, kWidth / 8>& sums, uint32_t real, float scale, const Rows<T>& to, const Place& place,
      int64_t first, int rows, int width) {
    MPMA_UNROLL
    for (int m = 0; m < Shape::kM; ++m)
      MPMA_UNROLL
      for (int i = 0; i < 4; ++i) {
        const bool mine = (real >> (16 * m + i / 2 * 8 + lane_index() / 4) & 1) != 0;
        MPMA_UNROLL
        for (int n = 0; n < kWidth / 8; ++n) {
          float& x = sums.sum[m][n].value[i];
          x = mine ? x * scale : 0.f;
        }
      }
    store_global<T>(sums, rows, width, [&](int row) { return to.at(place.item, first + row, place.head); });
  }
};

// dQ of one tile of queries, complete: dS (keys x queries, of all warps) by K. The warps share it in pieces of 16 x 16.
template <class T, int kWidth>
MPMA_DEVICE void store_query_gradient(
    const KeyGradientLayout<T, kWidth>& layout, const Attention<T>& a, const Rows<T>& to, const Place& place,
    int64_t first, int rows) {
  using Shape = KeyGradientShape<T, kWidth>;
  constexpr int kAcross = kWidth / 16;
  for (int piece = warp_index(); piece < Shape::kQueries / 16 * kAcross; piece += warp_count()) {
    const int row = piece / kAcross * 16, column = piece % kAcross * 16;
    if (row >= rows || column >= a.sizes.width) continue;
    Accumulator<1, 2> sums;
    sums.clear();
    multiply_long(
        sums, by_columns(layout.score(0), 0, row), by_columns(layout.key(0), 0, column), warp_count() * Shape::kKeys);
    scale_all(sums, a.scale);
    store_global<T>(sums, rows - row, a.sizes.width - column, [&](int i) {
      return to.at(place.item, first + row + i, place.head) + column;
    });
  }
}

template <class T, int kWidth, bool kDropout>
MPMA_KERNEL(256, 1)
attention_key_gradients_kernel(Attention<T> a, AttentionGradients<T> g, int parts, int statistics) {
  using Shape = KeyGradientShape<T, kWidth>;
  SharedMemory memory = SharedMemory::this_block();
  const KeyGradientLayout<T, kWidth> layout(memory, warp_count(), statistics);
  const Place place = place_of(a, parts);
  const Extent queries = queries_of(a, place.item), keys = keys_of(a, place.item);
  const int width = a.sizes.width;
  const bool with_query = parts == 1 && g.query.data != nullptr;
  if (a.packed()) {
    fill_rest(g.key, place, parts, keys, width, 0.f);
    fill_rest(g.value, place, parts, keys, width, 0.f);
    if (with_query) fill_rest(g.query, place, parts, queries, width, 0.f);
  }
  const int block_first = place.part * warp_count() * Shape::kKeys;
  if (block_first >= keys.length && !with_query) return;
  const int warp = warp_index(), first = block_first + warp * Shape::kKeys;
  const uint32_t real = real_keys<Shape::kKeys>(a, place.item, keys, first);

  const auto load_own = [&](const typename Shape::TileK& tile, const Rows<const T>& rows) {
    const T* const start = rows.at(place.item, keys.start + first, place.head);
    load_rows(tile, start, rows.row, real, width, a.aligned, lane_index(), kWarp);
  };
  load_own(layout.key(warp), a.key);
  load_own(layout.value(warp), a.value);
  cp_async_commit();
  const T* const query_rows = a.query.at(place.item, queries.start, place.head);
  const T* const gradient_rows = g.grad_output.at(place.item, queries.start, place.head);
  const auto load_queries = [&](int tile, int buffer) {
    const int begin = tile * Shape::kQueries;
    const auto load = [&](const typename Shape::TileQ& to, const T* rows, int64_t step, bool aligned) {
      load_rows(
          to, rows + begin * step, step, real_queries<Shape::kQueries>(queries, begin), width, aligned, thread_index(),
          thread_count());
    };
    load(layout.query(buffer), query_rows, a.query.row, a.aligned);
    load(layout.gradient(buffer), gradient_rows, g.grad_output.row, g.aligned);
    cp_async_commit();
  };
  const int tiles = static_cast<int>(ceil_divide(queries.length, Shape::kQueries));
  if (tiles > 0) load_queries(0, 0);
  // What a warp without keys adds to the gradients of queries.
  typename KeySums<T, kWidth>::Scores scores;
  scores.clear();
  if (real == 0 && with_query) store_shared(scores, layout.score(warp), 0, 0);

  KeySums<T, kWidth> sums;
  sums.clear();
  int buffer = 0;
  for (int tile = 0; tile < tiles; ++tile) {
    const int begin = tile * Shape::kQueries, in_chunk = begin % statistics;
    if (in_chunk == 0) {
      barrier();  // everybody is done with those before
      const int left = (tiles - tile) * Shape::kQueries;
      query_statistics(
          a, g, place, queries, begin, left < statistics ? left : statistics, layout.statistic, layout.inner, warp,
          warp_count());
    }
    cp_async_wait<0>();
    barrier();  // this tile is there, and everybody is done with the one before and with its scores
    if (tile + 1 < tiles) load_queries(tile + 1, 1 - buffer);
    if (real != 0) {
      const auto query = layout.query(buffer), gradient = layout.gradient(buffer);
      scores.clear();
      multiply_long<kDropout ? 2 : 4>(scores, by_rows(layout.key(warp)), by_rows(query), kWidth);
      Kept<Shape::kM, Shape::kQueries / 8> kept;
      if constexpr (kDropout)
        kept = kept_by_key<Shape::kM, Shape::kQueries / 8>(dropout_draw(a, place), first, begin);
      const float scale = a.scale * kLog2E;
      const uint32_t mine = real >> (lane_index() / 4);  // bit 16 m + 8 i: of this lane's rows
      MPMA_UNROLL
      for (int n = 0; n < Shape::kQueries / 8; ++n)
        MPMA_UNROLL
        for (int j = 0; j < 2; ++j) {
          const float statistic = layout.statistic[in_chunk + 8 * n + lane_index() % 4 * 2 + j];
          MPMA_UNROLL
          for (int m = 0; m < Shape::kM; ++m)
            MPMA_UNROLL
            for (int i = 0; i < 2; ++i) {
              float& x = scores.sum[m][n].value[2 * i + j];
              x = (mine >> (16 * m + 8 * i) & 1) != 0 ? exp2_fast(x * scale - statistic) : 0.f;
            }
        }
      if (g.value.data != nullptr) {
        if constexpr (kDropout) {
          typename KeySums<T, kWidth>::Scores dropped;
          MPMA_UNROLL
          for (int m = 0; m < Shape::kM; ++m)
            MPMA_UNROLL
            for (int n = 0; n < Shape::kQueries / 8; ++n)
              MPMA_UNROLL
              for (int i = 0; i < 4; ++i)
                dropped.sum[m][n].value[i] = kept(m, n, i) ? scores.sum[m][n].value[i] * a.dropout.kept : 0.f;
          multiply<T>(sums.value, dropped, by_columns(gradient));
        } else {
          multiply<T>(sums.value, scores, by_columns(gradient));
        }
      }
      if (g.key.data != nullptr || with_query) {
        typename KeySums<T, kWidth>::Scores grad_weights;
        grad_weights.clear();
        multiply_long<1>(grad_weights, by_rows(layout.value(warp)), by_rows(gradient), kWidth);
        MPMA_UNROLL
        for (int n = 0; n < Shape::kQueries / 8; ++n)
          MPMA_UNROLL
          for (int j = 0; j < 2; ++j) {
            const float inner = layout.inner[in_chunk + 8 * n + lane_index() % 4 * 2 + j];
            MPMA_UNROLL
            for (int m = 0; m < Shape::kM; ++m)
              MPMA_UNROLL
              for (int i = 0; i < 2; ++i) {
                float& x = scores.sum[m][n].value[2 * i + j];
                float grad = grad_weights.sum[m][n].value[2 * i + j];
                if constexpr (kDropout) grad = kept(m, n, 2 * i + j) ? grad * a.dropout.kept : 0.f;
                // A key that does not take part passes nothing, not even a NaN of the query's.
                const bool takes_part = (mine >> (16 * m + 8 * i) & 1) != 0;
                x = takes_part ? x * (grad - inner) : 0.f;
              }
          }
        if (with_query) store_shared(scores, layout.score(warp), 0, 0);
        if (g.key.data != nullptr) multiply<T>(sums.key, scores, by_columns(query));
      }
    }
    if (with_query) {
      barrier();  // all scores are there
      store_query_gradient(layout, a, g.query, place, queries.start + begin, queries.length - begin);
    }
    buffer = 1 - buffer;
  }
  cp_async_wait<0>();  // the keys, where there was no query
  // Once more, rather than kept in registers all the while.
  const Place here = place_of(a, parts);
  const Extent own = keys_of(a, here.item);
  const int left = own.length - first;
  if (g.value.data != nullptr)
    sums.store(sums.value, real, 1.f, g.value, here, own.start + first, left, width);
  if (g.key.data != nullptr)
    sums.store(sums.key, real, a.scale, g.key, here, own.start + first, left, width);
}

// How the keys of a head are shared: whether one block can have them all decides who makes the gradient of queries.
struct KeyParts {
  int parts, warps, statistics, shared_bytes;
};

template <class T, int kWidth>
KeyParts key_parts(const AttentionSizes& sizes, const Device& device) {
  using Shape = KeyGradientShape<T, kWidth>;
  const auto bytes = [](int warps, int statistics) {
    return shared_bytes<KeyGradientLayout<T, kWidth>>(warps, statistics);
  };
  const int needed = static_cast<int>(ceil_divide(sizes.keys > 0 ? sizes.keys : 1, Shape::kKeys));
  int warps = needed < Shape::kWarps ? needed : Shape::kWarps;
  while (warps > 1 && bytes(warps, Shape::kStatistics) > device.shared_memory) --warps;
  KeyParts found;
  found.parts = static_cast<int>(ceil_divide(needed, warps));
  found.warps = static_cast<int>(ceil_divide(needed, found.parts));
  found.statistics = sizes.queries > Shape::kStatistics ? 4 * Shape::kStatistics : Shape::kStatistics;
  if (bytes(found.warps, found.statistics) > device.shared_memory) found.statistics = Shape::kStatistics;
  found.shared_bytes = bytes(found.warps, found.statistics);
  return found;
}

template <class T, int kWidth, bool kDropout>
void launch_attention_key_gradients(
    const Attention<T>& a, const AttentionGradients<T>& g, const KeyParts& of, void* stream) {
  const Launch how = {{of.parts * a.places()}, of.warps * kWarp, of.shared_bytes, stream};
  launch<attention_key_gradients_kernel<T, kWidth, kDropout>>(how, a, g, of.parts, of.statistics);
}

}  // namespace mpma::cuda
