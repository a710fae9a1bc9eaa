// What tiles.h and the emulator's twins offer and the example does not use.
#include "cuda/launch.h"
#include "cuda/shared_memory.h"
#include "cuda/tiles.h"
#include "emulation.h"
#include "philox.h"

namespace mpma::cuda {

template <class T>
struct ProductsArguments {
  const T *q, *k, *v;                           // (32, 64) each
  T *from_registers, *transposed;               // (32, 64)
  float *row_maxima, *column_sums;              // (32)
  int real_rows, real_columns;                  // of the outputs that are written
};

template <class T>
struct ProductsLayout {
  Tile<T, 32, 64> q, k, v;
  Tile<T, 32, 32> p;
  explicit MPMA_HOST_DEVICE ProductsLayout(SharedMemory& memory)
      : q{memory.take<T>(q.kSize)}, k{memory.take<T>(k.kSize)}, v{memory.take<T>(v.kSize)},
        p{memory.take<T>(p.kSize)} {}
};

// By one warp: S = Q K^T with its row maxima and column sums, S V from registers and S^T V from shared memory.
template <class T>
MPMA_KERNEL(32, 1)
products_kernel(ProductsArguments<T> a) {
  SharedMemory memory = SharedMemory::this_block();
  ProductsLayout<T> tiles(memory);
  load_tile(tiles.q, 64, true, [&](int row) { return a.q + 64 * row; });
  load_tile(tiles.k, 64, false, [&](int row) { return a.k + 64 * row; });
  load_tile(tiles.v, 64, true, [&](int row) { return a.v + 64 * row; });
  cp_async_commit();
  cp_async_wait<0>();
  barrier();
  Accumulator<2, 4> s;
  s.clear();
  multiply_long(s, by_rows(tiles.q), by_rows(tiles.k), 64);
  reduce_rows(s, -1e30f, Maximum{}).for_each([&](int row, float x) {
    if (lane_index() % 4 == 0) a.row_maxima[row] = x;
  });
  reduce_columns(s, 0.f, Plus{}).for_each([&](int column, float x) {
    if (lane_index() < 4) a.column_sums[column] = x;
  });
  store_shared(s, tiles.p, 0, 0);
  warp_barrier();
  Accumulator<2, 8> o;
  o.clear();
  multiply<T>(o, s, by_columns(tiles.v));
  store_global<T>(o, a.real_rows, a.real_columns, [&](int row) { return a.from_registers + 64 * row; });
  o.clear();
  multiply(o, by_columns(tiles.p), by_columns(tiles.v), 32);
  store_global<T>(o, a.real_rows, a.real_columns, [&](int row) { return a.transposed + 64 * row; });
}

template <class T>
const char* products(
    const void* q, const void* k, const void* v, void* from_registers, void* transposed, void* row_maxima,
    void* column_sums, int64_t real_rows, int64_t real_columns) {
  return emulated([&] {
    const ProductsArguments<T> a = {
        static_cast<const T*>(q), static_cast<const T*>(k), static_cast<const T*>(v), static_cast<T*>(from_registers),
        static_cast<T*>(transposed), static_cast<float*>(row_maxima), static_cast<float*>(column_sums),
        static_cast<int>(real_rows), static_cast<int>(real_columns)};
    launch<products_kernel<T>>(Launch{{1}, 32, shared_bytes<ProductsLayout<T>>(), nullptr}, a);
  });
}

// The bits of each float as T, and back.
template <class T>
MPMA_KERNEL(128, 1)
convert_kernel(const float* x, T* y, float* z, int64_t n) {
  const int64_t i = block_x() * thread_count() + thread_index();
  if (i >= n) return;
  y[i] = from_float<T>(x[i]);
  z[i] = to_float(y[i]);
}

template <class T>
const char* convert(const void* x, void* y, void* z, int64_t n) {
  return emulated([&] {
    launch<convert_kernel<T>>(
        Launch{{(n + 127) / 128}, 128, 0, nullptr}, static_cast<const float*>(x), static_cast<T*>(y),
        static_cast<float*>(z), n);
  });
}

// Lane i's results in row i: shuffle_xor 5, shuffle from 31 - i, shuffle_up 3, the ballot of odd lanes, bits of it, and
// the first of Philox's words.
MPMA_KERNEL(32, 1)
warp_kernel(int64_t* out) {
  const int lane = lane_index();
  const uint32_t odd = ballot(lane % 2 == 1);
  int64_t* row = out + 8 * lane;
  row[0] = shuffle_xor(lane, 5);
  row[1] = shuffle(int64_t{1} << 40 | lane, 31 - lane);
  row[2] = shuffle_up(lane, 3);
  row[3] = odd;
  row[4] = popcount(odd) + 100 * lowest_bit(odd) + 10000 * leading_zeros(odd >> 1);
  row[5] = reverse_bits(odd);
  row[6] = warp_any(lane == 3) + 10 * warp_all(lane < 31) + 100 * barrier_any(lane == 9);
  row[7] = philox(static_cast<uint32_t>(lane), 1, 2, 3, 5).word[0];
}

extern "C" {
#define MPMA_TYPE(NAME, T)                                                                                          \
  const char* products_##NAME(                                                                                      \
      const void* q, const void* k, const void* v, void* o, void* t, void* m, void* s, int64_t r, int64_t c) {      \
    return products<T>(q, k, v, o, t, m, s, r, c);                                                                  \
  }                                                                                                                 \
  const char* convert_##NAME(const void* x, void* y, void* z, int64_t n) { return convert<T>(x, y, z, n); }
MPMA_TYPE(bfloat16, Bfloat16)
MPMA_TYPE(float16, Half)
MPMA_TYPE(float32, float)

const char* warp(void* out) {
  return emulated([&] { launch<warp_kernel>(Launch{{1}, 32, 0, nullptr}, static_cast<int64_t*>(out)); });
}

// The same word as the host draws.
int64_t philox_on_host(int64_t lane) { return mpma::philox(static_cast<uint32_t>(lane), 1, 2, 3, 5).word[0]; }
}

}  // namespace mpma::cuda
