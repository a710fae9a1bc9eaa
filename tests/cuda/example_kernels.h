// A matrix product, small and whole: the example of how a kernel is written, and the test of tiles.h.
#pragma once

#include "cuda/launch.h"
#include "cuda/shared_memory.h"
#include "cuda/tiles.h"

namespace mpma::cuda {

// c (m, n) = a (m, k) b (k, n), or b (n, k) transposed; every matrix contiguous.
template <class T>
struct GemmArguments {
  const T *a, *b;
  float* c;
  int64_t m, n, k;
  bool aligned;
};

// A block of four warps makes 64 x 64 of c, each warp 32 x 32, over steps of 32 in two buffers.
template <class T, bool kTransposedB>
struct GemmLayout {
  using TileA = Tile<T, 64, 32>;
  using TileB = Tile<T, kTransposedB ? 64 : 32, kTransposedB ? 32 : 64>;
  T *a_buffers, *b_buffers;

  explicit MPMA_HOST_DEVICE GemmLayout(SharedMemory& memory)
      : a_buffers(memory.take<T>(2 * TileA::kSize)), b_buffers(memory.take<T>(2 * TileB::kSize)) {}

  // Computed, because an array of tiles indexed at run time would live in local memory.
  MPMA_DEVICE TileA a(int buffer) const { return {a_buffers + buffer * TileA::kSize}; }
  MPMA_DEVICE TileB b(int buffer) const { return {b_buffers + buffer * TileB::kSize}; }
};

template <class T, bool kTransposedB>
MPMA_KERNEL(128, 1)
gemm_kernel(GemmArguments<T> g) {
  SharedMemory memory = SharedMemory::this_block();
  GemmLayout<T, kTransposedB> layout(memory);
  const int64_t row0 = block_x() * 64, column0 = block_y() * 64;
  const auto load = [&](int64_t step, int buffer) {
    const int64_t k0 = step * 32;
    const int depth = static_cast<int>(g.k - k0 < 32 ? g.k - k0 : 32);
    const int columns = static_cast<int>(g.n - column0 < 64 ? g.n - column0 : 64);
    load_tile(layout.a(buffer), depth, g.aligned, [&](int row) -> const T* {
      return row0 + row < g.m ? g.a + (row0 + row) * g.k + k0 : nullptr;
    });
    load_tile(layout.b(buffer), kTransposedB ? depth : columns, g.aligned, [&](int row) -> const T* {
      if (kTransposedB) return row < columns ? g.b + (column0 + row) * g.k + k0 : nullptr;
      return row < depth ? g.b + (k0 + row) * g.n + column0 : nullptr;
    });
    cp_async_commit();
  };
  const int row = warp_index() / 2 * 32, column = warp_index() % 2 * 32;
  Accumulator<2, 4> sums;
  sums.clear();
  const int64_t steps = (g.k + 31) / 32;
  load(0, 0);
  for (int64_t step = 0; step < steps; ++step) {
    const int buffer = static_cast<int>(step % 2);
    if (step + 1 < steps) {
      load(step + 1, 1 - buffer);
      cp_async_wait<1>();
    } else {
      cp_async_wait<0>();
    }
    barrier();
    const auto a = by_rows(layout.a(buffer), row, 0);
    if constexpr (kTransposedB)
      multiply(sums, a, by_rows(layout.b(buffer), column, 0), 32);
    else
      multiply(sums, a, by_columns(layout.b(buffer), 0, column), 32);
    barrier();
  }
  store_global<float>(
      sums, static_cast<int>(g.m - row0 - row < 32 ? g.m - row0 - row : 32),
      static_cast<int>(g.n - column0 - column < 32 ? g.n - column0 - column : 32),
      [&](int i) { return g.c + (row0 + row + i) * g.n + column0 + column; });
}

template <class T, bool kTransposedB>
void launch_gemm(GemmArguments<T> g, void* stream) {
  g.aligned = aligned_rows(g.a, g.k) && aligned_rows(g.b, kTransposedB ? g.k : g.n);
  const Launch how = {
      {(g.m + 63) / 64, (g.n + 63) / 64}, 128, shared_bytes<GemmLayout<T, kTransposedB>>(), stream};
  launch<gemm_kernel<T, kTransposedB>>(how, g);
}

}  // namespace mpma::cuda
