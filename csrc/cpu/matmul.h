// Matrix products of blocks that fit the caches. Included by foreach_isa.h.

namespace mpma::MPMA_ISA {

// Buffers are padded to whole groups of columns, the same number for every instruction set.
constexpr int64_t kColumnGroup = 16;

constexpr int64_t padded(int64_t columns) { return (columns + kColumnGroup - 1) / kColumnGroup * kColumnGroup; }

// Distance of the rows of a buffer: an odd number of groups, because with an even one the rows of a column panel
// would share a few sets of the first-level cache.
constexpr int64_t row_distance(int64_t columns) { return (padded(columns) / kColumnGroup | 1) * kColumnGroup; }

// Rows and columns of C that are summed in registers: 6 x 2 vectors fill the 16 registers of SSE2 and AVX2 together
// with two of B and one of A; 8 x 2 of the 32 of AVX-512 are enough to hide the latency of a product.
constexpr int kTileRows = MPMA_VECTOR_BYTES == 64 ? 8 : 6;
constexpr int kTileVectors = 2;
constexpr int64_t kDepth = 256;  // a panel of B of this many rows stays in the first-level cache
// Rows of a matrix that are far apart, half a page or more, cost an entry of the translation buffer each.
template <typename T>
constexpr bool far_apart(int64_t row) {
  return row * static_cast<int64_t>(sizeof(T)) >= 2048;
}
constexpr int64_t kTilesToPack = 4;  // so many tiles of A pay for packing a panel of B whose rows are far apart

template <typename T>
struct Product {
  const T* a;
  int64_t a_row, a_column;
  const T* b;
  int64_t b_row;
  T* c;
  int64_t c_row;
};

// Columns that are summed in registers together, and so a panel's.
template <typename T>
constexpr int64_t kPanel = kTileVectors * kWidth<T>;

template <typename T, int kVectors, int kRows>
void tile_product(const Product<T>& p, int64_t depth, bool add) {
  constexpr int kW = kWidth<T>;
  const auto c = [&](int i, int j) { return p.c + i * p.c_row + j * kW; };
  Vector<T> sum[kRows][kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) sum[i][j] = Vector<T>{};
  if (far_apart<T>(p.c_row)) {  // on their way while the sums are made
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; ++j) __builtin_prefetch(c(i, j), 1);
  }
  const T *a = p.a, *b = p.b;
  const int64_t a_row = p.a_row, a_column = p.a_column, b_row = p.b_row;
  for (int64_t k = 0; k < depth; ++k, a += a_column, b += b_row) {
    Vector<T> right[kVectors];
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) right[j] = load(b + j * kW);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; ++j) sum[i][j] += a[i * a_row] * right[j];
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) store(c(i, j), add ? load(c(i, j)) + sum[i][j] : sum[i][j]);
}

template <typename T, int kVectors, int... kRows>
constexpr auto tile_products(std::integer_sequence<int, kRows...>) {
  return std::array{&tile_product<T, kVectors, kRows + 1>...};
}

// C (m, n) = A (m, k) B (k, n), or C += with `add`, one sum a block of kDepth terms: the error of a long sum grows with
// the number of blocks, not of terms. A has any strides, so that a transpose is a swap of two of them.
// Rows of B and C are contiguous and readable and writable to padded(n) columns, of which the last may be overwritten.
template <typename T>
void matmul(int64_t m, int64_t n, int64_t k, const Product<T>& p, bool add) {
  static constexpr auto wide = tile_products<T, kTileVectors>(std::make_integer_sequence<int, kTileRows>());
  static constexpr auto narrow = tile_products<T, 1>(std::make_integer_sequence<int, kTileRows>());
  const int64_t tiles = (m + kTileRows - 1) / kTileRows;
  alignas(64) T panel[kDepth * kPanel<T>];
  int64_t depth0 = 0;
  do {  // once even for k = 0, which sets C to 0
    const int64_t depth = std::min(kDepth, k - depth0);
    for (int64_t column = 0; column < n; column += kPanel<T>) {
      const bool single = n - column <= kWidth<T>;
      const T* b = p.b + depth0 * p.b_row + column;
      int64_t b_row = p.b_row;
      if (far_apart<T>(b_row) && tiles >= kTilesToPack) {
        const int64_t columns = (single ? 1 : kTileVectors) * kWidth<T>;
        for (int64_t i = 0; i < depth; ++i)
          for (int64_t j = 0; j < columns; j += kWidth<T>) store(panel + i * kPanel<T> + j, load(b + i * b_row + j));
        b = panel, b_row = kPanel<T>;
      }
      int64_t row = 0;
      for (int64_t tile = 0; tile < tiles; ++tile) {  // rows shared out evenly: no tile of a row or two is left over
        const int64_t rows = m / tiles + (tile < m % tiles);
        const T* a = p.a + row * p.a_row + depth0 * p.a_column;
        (single ? narrow : wide)[rows - 1](
            {a, p.a_row, p.a_column, b, b_row, p.c + row * p.c_row + column, p.c_row}, depth, add || depth0 > 0);
        row += rows;
      }
    }
    depth0 += kDepth;
  } while (depth0 < k);
}

// C = A B with the rows of A contiguous and B packed as [n / kPanel][k][kPanel]: one stream of memory a panel.
template <typename T>
void matmul_panels(int64_t m, int64_t n, int64_t k, const T* a, int64_t a_row, const T* panels, T* c, int64_t c_row) {
  for (int64_t column = 0; column < n; column += kPanel<T>)
    matmul<T>(
        m, std::min(kPanel<T>, n - column), k,
        {a, a_row, 1, panels + column * k, kPanel<T>, c + column, c_row}, false);
}

// to (4, 4) = from (4, 4), transposed.
template <typename A>
inline void transpose_4x4(const A* from, int64_t from_row, A* to, int64_t to_row) {
  typedef A Four __attribute__((vector_size(4 * sizeof(A)), aligned(sizeof(A)), may_alias));
  const auto row = [&](int64_t i) { return reinterpret_cast<const Four*>(from + i * from_row); };
  const auto out = [&](int64_t i) { return reinterpret_cast<Four*>(to + i * to_row); };
  const Four low01 = __builtin_shufflevector(*row(0), *row(1), 0, 4, 1, 5);
  const Four high01 = __builtin_shufflevector(*row(0), *row(1), 2, 6, 3, 7);
  const Four low23 = __builtin_shufflevector(*row(2), *row(3), 0, 4, 1, 5);
  const Four high23 = __builtin_shufflevector(*row(2), *row(3), 2, 6, 3, 7);
  *out(0) = __builtin_shufflevector(low01, low23, 0, 1, 4, 5);
  *out(1) = __builtin_shufflevector(low01, low23, 2, 3, 6, 7);
  *out(2) = __builtin_shufflevector(high01, high23, 0, 1, 4, 5);
  *out(3) = __builtin_shufflevector(high01, high23, 2, 3, 6, 7);
}

// The rows of a matrix (count, k) as columns, in panels: out [count / kPanel][k][kPanel], with zeros for the rows that
// the last panel lacks.
template <typename T>
void pack_transposed(const T* rows, int64_t stride, int64_t count, int64_t k, T* out) {
  for (int64_t first = 0; first < count; first += kPanel<T>, rows += kPanel<T> * stride, out += k * kPanel<T>) {
    const int64_t real = std::min(kPanel<T>, count - first), blocks = real / 4 * 4, depth = k / 4 * 4;
    for (int64_t d = 0; d < depth; d += 4)
      for (int64_t i = 0; i < blocks; i += 4)
        transpose_4x4(rows + i * stride + d, stride, out + d * kPanel<T> + i, kPanel<T>);
    for (int64_t d = 0; d < k; ++d) {
      for (int64_t i = d < depth ? blocks : 0; i < real; ++i) out[d * kPanel<T> + i] = rows[i * stride + d];
      std::fill(out + d * kPanel<T> + real, out + (d + 1) * kPanel<T>, T(0));
    }
  }
}

}  // namespace mpma::MPMA_ISA
