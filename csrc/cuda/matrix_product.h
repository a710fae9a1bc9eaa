// Products of large matrices, one or a batch of them: C = A B, or C += A B, with sums in float32.
#pragma once

#include "cuda/launch.h"
#include "cuda/shared_memory.h"
#include "cuda/tiles.h"

namespace mpma::cuda {

// Elements (i, j) of matrix `b` of a batch at data[b * batch + i * row + j].
template <class T>
struct Matrices {
  T* data;
  int64_t row, batch;
};

// How the factors lie in memory: A as (m, k) and B as (n, k); A as (m, k) and B as (k, n); A as (k, m) and B as (k, n).
enum class Factors { kRowsByRows, kRowsByColumns, kColumnsByColumns };

// The result (m, n), of which every element is multiplied by `scale`, one of a row, where that is not null, goes to c, or
// in float32 to `sums` where c is null, and there is added with `add`. Rows of a and b begin at 16-byte boundaries, and
// what is contiguous there (k, m or n) is a multiple of 16 bytes. The factors are only read; their type does not say so
// because results of one product are factors of the next.
template <class T>
struct Product {
  Matrices<T> a, b, c;
  Matrices<float> sums;
  int64_t m, n, k, batches;
  bool add;
  const float* scale;
  int64_t scale_row, scale_batch;
};

constexpr int kProductThreads = 256;

// A block makes 128 x kColumns of c with 2 x 4 warps, over steps of 32 in depth through a ring of buffers.
template <class T, Factors kFactors, int kColumns>
struct ProductLayout {
  static constexpr int kRows = 128, kDepth = 32, kBuffers = kIsHalf<T> ? 3 : 2;
  static constexpr bool kColumnsOfA = kFactors == Factors::kColumnsByColumns;
  static constexpr bool kColumnsOfB = kFactors != Factors::kRowsByRows;
  using TileA = Tile<T, kColumnsOfA ? kDepth : kRows, kColumnsOfA ? kRows : kDepth>;
  using TileB = Tile<T, kColumnsOfB ? kDepth : kColumns, kColumnsOfB ? kColumns : kDepth>;
  T *a_buffers, *b_buffers;

  explicit MPMA_HOST_DEVICE ProductLayout(SharedMemory& memory)
      : a_buffers(memory.take<T>(kBuffers * TileA::kSize)), b_buffers(memory.take<T>(kBuffers * TileB::kSize)) {}

  MPMA_DEVICE TileA a(int buffer) const { return {a_buffers + buffer * TileA::kSize}; }
  MPMA_DEVICE TileB b(int buffer) const { return {b_buffers + buffer * TileB::kSize}; }
};

MPMA_DEVICE int at_most(int64_t x, int most) { return x < most ? static_cast<int>(x) : most; }

// Rows (outer, depth) or, with kByColumns, (depth, outer) of a factor's tile from (outer0, depth0) on.
template <bool kByColumns, class T, int kRows, int kColumns>
MPMA_DEVICE void load_factor(
    const Tile<T, kRows, kColumns>& tile, const T* matrix, int64_t distance, int64_t outer0, int64_t outer,
    int64_t depth0, int64_t depth) {
  const int64_t row0 = kByColumns ? depth0 : outer0, column0 = kByColumns ? outer0 : depth0;
  const int rows = at_most((kByColumns ? depth : outer) - row0, kRows);
  const int columns = at_most((kByColumns ? outer : depth) - column0, kColumns);
  const T* corner = matrix + row0 * distance + column0;
  load_tile(tile, columns, true, [&](int row) -> const T* { return row < rows ? corner + row * distance : nullptr; });
}

// A warp's part, from row `row` of A and column `column` of B on, of the product of two whole tiles.
template <Factors kFactors, int kM, int kN, class TileA, class TileB>
MPMA_DEVICE void multiply_tiles(Accumulator<kM, kN>& sums, const TileA& a, int row, const TileB& b, int column) {
  if constexpr (kFactors == Factors::kRowsByRows)
    multiply_long(sums, by_rows(a, row, 0), by_rows(b, column, 0), TileA::kColumnCount);
  else if constexpr (kFactors == Factors::kRowsByColumns)
    multiply_long(sums, by_rows(a, row, 0), by_columns(b, 0, column), TileA::kColumnCount);
  else
    multiply_long(sums, by_columns(a, 0, row), by_columns(b, 0, column), TileA::kRowCount);
}

template <class T, Factors kFactors, int kColumns>
MPMA_KERNEL(kProductThreads, kIsHalf<T> ? 2 : 1)
product_kernel(Product<T> p) {
  using Layout = ProductLayout<T, kFactors, kColumns>;
  constexpr int kWarpRows = Layout::kRows / 2, kWarpColumns = kColumns / 4;
  SharedMemory memory = SharedMemory::this_block();
  const Layout layout(memory);
  // Neighbouring blocks share rows of A, and all of them a B that stays in the second-level cache.
  const int64_t tiles_n = (p.n + kColumns - 1) / kColumns, tiles_m = (p.m + Layout::kRows - 1) / Layout::kRows;
  const int64_t batch = block_x() / (tiles_m * tiles_n), tile = block_x() % (tiles_m * tiles_n);
  const int64_t row0 = tile / tiles_n * Layout::kRows, column0 = tile % tiles_n * kColumns;
  const T *a = p.a.data + batch * p.a.batch, *b = p.b.data + batch * p.b.batch;
  const int64_t steps = (p.k + Layout::kDepth - 1) / Layout::kDepth;

  const auto load = [&](int64_t step) {
    const int buffer = static_cast<int>(step % Layout::kBuffers);
    if (step < steps) {
      const int64_t depth0 = step * Layout::kDepth;
      load_factor<Layout::kColumnsOfA>(layout.a(buffer), a, p.a.row, row0, p.m, depth0, p.k);
      load_factor<Layout::kColumnsOfB>(layout.b(buffer), b, p.b.row, column0, p.n, depth0, p.k);
    }
    cp_async_commit();
  };
  const int row = warp_index() / 4 * kWarpRows, column = warp_index() % 4 * kWarpColumns;
  Accumulator<kWarpRows / 16, kWarpColumns / 8> sums;
  sums.clear();
  for (int64_t step = 0; step < Layout::kBuffers - 1; ++step) load(step);
  for (int64_t step = 0; step < steps; ++step) {
    cp_async_wait<Layout::kBuffers - 2>();
    barrier();  // what was copied is seen by all, and the buffer read a step ago is free
    load(step + Layout::kBuffers - 1);
    const int buffer = static_cast<int>(step % Layout::kBuffers);
    multiply_tiles<kFactors>(sums, layout.a(buffer), row, layout.b(buffer), column);
  }

  const int rows = at_most(p.m - row0 - row, kWarpRows), columns = at_most(p.n - column0 - column, kWarpColumns);
  if (p.scale != nullptr) {
    const float* scale = p.scale + batch * p.scale_batch + (row0 + row) * p.scale_row;
    sums.for_each([&](int i, int, float& x) { x *= i < rows ? scale[i * p.scale_row] : 0.f; });
  }
  const auto corner = [&](const auto& c) { return c.data + batch * c.batch + (row0 + row) * c.row + column0 + column; };
  if (p.c.data != nullptr) {
    T* c = corner(p.c);
    store_global<T>(sums, rows, columns, [&](int i) { return c + i * p.c.row; });
  } else {
    float* c = corner(p.sums);
    if (p.add)
      sums.for_each([&](int i, int j, float& x) {
        if (i < rows && j < columns) x += c[i * p.sums.row + j];
      });
    store_global<float>(sums, rows, columns, [&](int i) { return c + i * p.sums.row; });
  }
  cp_async_wait<0>();
}

template <Factors kFactors, int kColumns, class T>
void launch_product_of(const Product<T>& p, void* stream) {
  using Layout = ProductLayout<T, kFactors, kColumns>;
  const int64_t tiles_m = (p.m + Layout::kRows - 1) / Layout::kRows, tiles_n = (p.n + kColumns - 1) / kColumns;
  const Launch how = {{tiles_m * tiles_n * p.batches}, kProductThreads, shared_bytes<Layout>(), stream};
  launch<product_kernel<T, kFactors, kColumns>>(how, p);
}

// Results of few columns take narrow tiles where that leaves less of them empty.
template <Factors kFactors, class T>
void launch_product(const Product<T>& p, void* stream) {
  if (p.n <= 192 && (p.n + 127) % 128 < 64)
    launch_product_of<kFactors, 64>(p, stream);
  else
    launch_product_of<kFactors, 128>(p, stream);
}

}  // namespace mpma::cuda
