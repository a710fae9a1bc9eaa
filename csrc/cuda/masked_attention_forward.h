// The forward of masked attention. A warp owns 16 or 32 queries of a head, whose sums stay in its registers while the
// block goes over tiles of keys: the softmax is rescaled from tile to tile.
#pragma once

#include <type_traits>

#include "cuda/masked_attention_dropout.h"
#include "cuda/masked_attention_key_tiles.h"

namespace mpma::cuda {

template <class T>
struct AttentionOutputs {
  Rows<T> output;
  Rows<float> logsumexp;  // +infinity for a row without keys
};

template <class T, int kWidth>
struct ForwardShape {
  static constexpr int kM = kIsHalf<T> && kWidth <= 64 ? 2 : 1;
  static constexpr int kQueries = 16 * kM;  // of a warp
  static constexpr int kKeys = kIsHalf<T> && kM == 1 ? 64 : 32;  // of a tile
  static constexpr int kWarps = 4;  // at most
  using TileQ = Tile<T, kQueries, kWidth>;
  using TileK = Tile<T, kKeys, kWidth>;
};

template <class T, int kWidth>
struct ForwardLayout {
  using Shape = ForwardShape<T, kWidth>;
  T *queries, *keys, *values;

  MPMA_HOST_DEVICE ForwardLayout(SharedMemory& memory, int warps, int buffers)
      : queries(memory.take<T>(warps * Shape::TileQ::kSize)),
        keys(memory.take<T>(buffers * Shape::TileK::kSize)),
        values(memory.take<T>(buffers * Shape::TileK::kSize)) {}

  MPMA_DEVICE typename Shape::TileQ query(int warp) const { return {queries + warp * Shape::TileQ::kSize}; }
  MPMA_DEVICE typename Shape::TileK key(int buffer) const { return {keys + buffer * Shape::TileK::kSize}; }
  MPMA_DEVICE typename Shape::TileK value(int buffer) const { return {values + buffer * Shape::TileK::kSize}; }
};

// The softmax of a warp's rows so far.
template <class T, int kWidth>
struct RunningRows {
  using Shape = ForwardShape<T, kWidth>;
  Accumulator<Shape::kM, kWidth / 8> mixed;
  float top[Shape::kM][2];    // the largest score, in units of log 2
  float total[Shape::kM][2];  // of the weights of a lane's own columns

  MPMA_DEVICE void clear() {
    mixed.clear();
    MPMA_UNROLL
    for (int m = 0; m < Shape::kM; ++m)
      MPMA_UNROLL
      for (int i = 0; i < 2; ++i) top[m][i] = -infinity(), total[m][i] = 0.f;
  }

  // Makes weights of scores, which are -infinity for keys that do not take part, and scales what there was.
  MPMA_DEVICE void rescale(Accumulator<Shape::kM, Shape::kKeys / 8>& scores) {
    const RowValues<Shape::kM> highest = reduce_rows(scores, -infinity(), Maximum{});
    MPMA_UNROLL
    for (int m = 0; m < Shape::kM; ++m)
      MPMA_UNROLL
      for (int i = 0; i < 2; ++i) {
        const float now = Maximum{}(top[m][i], highest.value[m][i]);
        const float base = now == -infinity() ? 0.f : now;  // scores of -infinity only
        const float shrink = exp2_fast(top[m][i] - base);
        float sum = total[m][i] * shrink;
        MPMA_UNROLL
        for (int n = 0; n < Shape::kKeys / 8; ++n)
          MPMA_UNROLL
          for (int j = 0; j < 2; ++j) {
            float& x = scores.sum[m][n].value[2 * i + j];
            x = exp2_fast(x - base);
            sum += x;
          }
        MPMA_UNROLL
        for (int n = 0; n < kWidth / 8; ++n)
          MPMA_UNROLL
          for (int j = 0; j < 2; ++j) mixed.sum[m][n].value[2 * i + j] *= shrink;
        top[m][i] = now;
        total[m][i] = sum;
      }
  }
};

template <class T, int kWidth, bool kDropout>
MPMA_KERNEL(128, 2)
attention_forward_kernel(Attention<T> a, AttentionOutputs<T> to, int parts, int buffers) {
  using Shape = ForwardShape<T, kWidth>;
  using Real = RealRows<Shape::kKeys>;
  SharedMemory memory = SharedMemory::this_block();
  ForwardLayout<T, kWidth> layout(memory, warp_count(), buffers);
  const Place place = place_of(a, parts);
  const Extent queries = queries_of(a, place.item), keys = keys_of(a, place.item);
  if (a.packed()) {
    fill_rest(to.output, place, parts, queries, a.sizes.width, 0.f);
    fill_rest(to.logsumexp, place, parts, queries, 1, infinity());
  }
  const int block_first = place.part * warp_count() * Shape::kQueries;
  if (block_first >= queries.length) return;
  const int warp = warp_index(), first = block_first + warp * Shape::kQueries;
  const bool busy = first < queries.length;

  const int width = a.sizes.width;
  load_rows(
      layout.query(warp), a.query.at(place.item, queries.start + first, place.head), a.query.row,
      real_queries<Shape::kQueries>(queries, first), width, a.aligned, lane_index(), kWarp);
  cp_async_commit();
  KeyTiles<T, ForwardLayout<T, kWidth>> tiles(a, layout, place, keys);
  const bool found = tiles.any();

  RunningRows<T, kWidth> rows;
  rows.clear();
  tiles.for_each([&](int first_key, Real real, int buffer) {
    if (!busy) return;
    Kept<Shape::kM, Shape::kKeys / 8> kept;
    if constexpr (kDropout)
      kept = kept_by_query<Shape::kM, Shape::kKeys / 8>(dropout_draw(a, place), first, first_key);
    Accumulator<Shape::kM, Shape::kKeys / 8> scores;
    scores.clear();
    multiply_long(scores, by_rows(layout.query(warp)), by_rows(layout.key(buffer)), kWidth);
    const float scale = a.scale * kLog2E;
    const Real mine = real >> (lane_index() % 4 * 2);
    MPMA_UNROLL
    for (int m = 0; m < Shape::kM; ++m)
      MPMA_UNROLL
      for (int n = 0; n < Shape::kKeys / 8; ++n)
        MPMA_UNROLL
        for (int i = 0; i < 4; ++i) {
          float& x = scores.sum[m][n].value[i];
          x = (mine >> (8 * n + i % 2) & 1) != 0 ? x * scale : -infinity();
        }
    rows.rescale(scores);
    if constexpr (kDropout) {
      MPMA_UNROLL
      for (int m = 0; m < Shape::kM; ++m)
        MPMA_UNROLL
        for (int n = 0; n < Shape::kKeys / 8; ++n)
          MPMA_UNROLL
          for (int i = 0; i < 4; ++i)
            if (!kept(m, n, i)) scores.sum[m][n].value[i] = 0.f;
    }
    multiply<T>(rows.mixed, scores, by_columns(layout.value(buffer)));
  });
  if (!busy) return;

  const int left = queries.length - first;
  MPMA_UNROLL
  for (int m = 0; m < Shape::kM; ++m)
    MPMA_UNROLL
    for (int i = 0; i < 2; ++i) {
      float total = rows.total[m][i];
      total += shuffle_xor(total, 1);
      total += shuffle_xor(total, 2);
      const int row = 16 * m + 8 * i + lane_index() / 4;
      if (lane_index() % 4 == 0 && row < left)
        *to.logsumexp.at(place.item, queries.start + first + row, place.head) =
            found ? (rows.top[m][i] + log2_accurate(total)) * kLn2 : infinity();
      const float factor = divide_rn(kDropout ? a.dropout.kept : 1.f, total);
      MPMA_UNROLL
      for (int n = 0; n < kWidth / 8; ++n)
        MPMA_UNROLL
        for (int j = 0; j < 2; ++j) {
          float& x = rows.mixed.sum[m][n].value[2 * i + j];
          x = found ? x * factor : 0.f;
        }
    }
  store_global<T>(rows.mixed, left, width, [&](int row) {
    return to.output.at(place.item, queries.start + first + row, place.head);
  });
}

template <class T, int kWidth, bool kDropout>
void launch_attention_forward_as(const Attention<T>& a, const AttentionOutputs<T>& to, void* stream) {
  using Shape = ForwardShape<T, kWidth>;
  // Without queries there may be rows of no sequence to clear. The blocks of a head have equal parts of its queries.
  const int64_t parts = a.sizes.queries == 0 ? 1 : ceil_divide(a.sizes.queries, Shape::kWarps * Shape::kQueries);
  const int64_t warps = a.sizes.queries == 0 ? 1 : ceil_divide(ceil_divide(a.sizes.queries, parts), Shape::kQueries);
  const int buffers = a.sizes.keys > Shape::kKeys ? 2 : 1;
  const int shared = shared_bytes<ForwardLayout<T, kWidth>>(static_cast<int>(warps), buffers);
  const Launch how = {{parts * a.places()}, static_cast<int>(warps) * kWarp, shared, stream};
  launch<attention_forward_kernel<T, kWidth, kDropout>>(how, a, to, static_cast<int>(parts), buffers);
}

template <class T>
void launch_attention_forward(const Attention<T>& a, const AttentionOutputs<T>& to, void* stream) {
  const auto launch_of_width = [&](auto width) {
    if (a.dropout.seed != nullptr)
      launch_attention_forward_as<T, width, true>(a, to, stream);
    else
      launch_attention_forward_as<T, width, false>(a, to, stream);
  };
  if (a.sizes.width <= 64)
    launch_of_width(std::integral_constant<int, 64>{});
  else
    launch_of_width(std::integral_constant<int, 128>{});
}

}  // namespace mpma::cuda
