// Matrix products whose operands may be rounded to bfloat16, because they hold the rows of bfloat16 tensors, which
// rounding leaves as they are, or numbers that a kernel for bfloat16 may round: attention weights and their gradients.
// With AVX-512's bfloat16 instructions they are rounded and summed in float32, two terms an instruction; elsewhere they
// are ordinary products. Included by foreach_isa.h, after matmul.h.

namespace mpma::MPMA_ISA {

#if MPMA_BFLOAT16

// Two terms of a sum as one word: the even one in its low half. What is packed at once fits the first two caches.
constexpr int64_t kPairs = kDepth / 2, kPackedColumns = 64;
typedef Vector<uint32_t> Words;

inline Words round_pairs(Vector<float> even, Vector<float> odd) {
  typedef uint16_t Halves __attribute__((vector_size(32)));
  const Words low = __builtin_convertvector((Halves)_mm512_cvtneps_pbh((__m512)even), Words);
  const Words high = __builtin_convertvector((Halves)_mm512_cvtneps_pbh((__m512)odd), Words);
  return low | high << 16;
}

// to[pair][column], kPackedColumns apart, of `depth` rows of B. Columns are read up to a whole vector.
inline void pack_right(const float* b, int64_t b_row, int64_t depth, int64_t columns, uint32_t* to) {
  for (int64_t k = 0; k < depth; k += 2, b += 2 * b_row, to += kPackedColumns)
    for (int64_t j = 0; j < columns; j += kWidth<float>)
      store(to + j, round_pairs(load(b + j), k + 1 < depth ? load(b + b_row + j) : Vector<float>{}));
}

// to[row][pair], kPairs apart, of rows of A that are contiguous.
inline void pack_left_rows(const float* a, int64_t a_row, int64_t rows, int64_t depth, uint32_t* to) {
  typedef uint32_t Eight __attribute__((vector_size(32), aligned(4), may_alias));
  for (int64_t i = 0; i < rows; ++i, a += a_row, to += kPairs)
    for (int64_t k = 0; k < depth; k += kWidth<float>) {
      float last[kWidth<float>] = {};
      const float* from = a + k;
      if (depth - k < kWidth<float>) from = static_cast<float*>(std::memcpy(last, from, (depth - k) * sizeof(float)));
      *reinterpret_cast<Eight*>(to + k / 2) = (Eight)_mm512_cvtneps_pbh((__m512)load(from));
    }
}

// to[pair][row], kTileRows apart, of rows of A with any strides. A whole vector is written beyond the last pair.
inline void pack_left_columns(
    const float* a, int64_t a_row, int64_t a_column, int64_t rows, int64_t depth, uint32_t* to) {
  for (int64_t k = 0; k < depth; k += 2, a += 2 * a_column, to += kTileRows) {
    float even[kWidth<float>] = {}, odd[kWidth<float>] = {};
    for (int64_t i = 0; i < rows; ++i) even[i] = a[i * a_row];
    for (int64_t i = 0; i < rows && k + 1 < depth; ++i) odd[i] = a[i * a_row + a_column];
    store(to, round_pairs(load(even), load(odd)));
  }
}

struct PackedProduct {
  const uint32_t* a;
  int64_t a_row, a_pair;
  const uint32_t* b;
  float* c;
  int64_t c_row, pairs;
  bool add;
};

template <int kVectors, int kRows>
void packed_tile(const PackedProduct& p) {
  constexpr int kW = kWidth<float>;
  Vector<float> sum[kRows][kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) sum[i][j] = p.add ? load(p.c + i * p.c_row + j * kW) : Vector<float>{};
  const uint32_t *a = p.a, *b = p.b;
  for (int64_t k = 0; k < p.pairs; ++k, a += p.a_pair, b += kPackedColumns) {
    Words right[kVectors];
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) right[j] = load(b + j * kW);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const Words left = Words{} + a[i * p.a_row];
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; ++j)
        sum[i][j] = (Vector<float>)_mm512_dpbf16_ps((__m512)sum[i][j], (__m512bh)left, (__m512bh)right[j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) store(p.c + i * p.c_row + j * kW, sum[i][j]);
}

template <int kVectors, int... kRows>
constexpr auto packed_tiles(std::integer_sequence<int, kRows...>) {
  return std::array{&packed_tile<kVectors, kRows + 1>...};
}

// As matmul.
inline void matmul_bfloat16(int64_t m, int64_t n, int64_t k, const Product<float>& p, bool add) {
  static constexpr auto wide = packed_tiles<kTileVectors>(std::make_integer_sequence<int, kTileRows>());
  static constexpr auto narrow = packed_tiles<1>(std::make_integer_sequence<int, kTileRows>());
  uint32_t left[kPairs * kTileRows + kWidth<float>], right[kPairs * kPackedColumns];
  const int64_t tiles = (m + kTileRows - 1) / kTileRows;
  for (int64_t depth0 = 0; depth0 == 0 || depth0 < k; depth0 += kDepth) {  // once even for k = 0, which sets C to 0
    const int64_t depth = std::min(k - depth0, kDepth), pairs = (depth + 1) / 2;
    for (int64_t column0 = 0; column0 < n; column0 += kPackedColumns) {
      const int64_t columns = std::min(n - column0, kPackedColumns);
      pack_right(p.b + depth0 * p.b_row + column0, p.b_row, depth, columns, right);
      int64_t row = 0;
      for (int64_t tile = 0; tile < tiles; ++tile) {  // rows shared out evenly, as in matmul
        const int64_t rows = m / tiles + (tile < m % tiles);
        const float* a = p.a + row * p.a_row + depth0 * p.a_column;
        if (p.a_column == 1)
          pack_left_rows(a, p.a_row, rows, depth, left);
        else
          pack_left_columns(a, p.a_row, p.a_column, rows, depth, left);
        for (int64_t j = 0; j < columns; j += kPanel<float>) {
          const bool single = columns - j <= kWidth<float>;
          (single ? narrow : wide)[rows - 1](
              {left, p.a_column == 1 ? kPairs : 1, p.a_column == 1 ? 1 : kTileRows, right + j,
               p.c + row * p.c_row + column0 + j, p.c_row, pairs, add || depth0 > 0});
        }
        row += rows;
      }
    }
  }
}

#endif

template <typename T>
void matmul_rounded(int64_t m, int64_t n, int64_t k, const Product<T>& p, bool add) {
#if MPMA_BFLOAT16
  static_assert(std::is_same_v<T, float>, "bfloat16 is computed in float32");
  matmul_bfloat16(m, n, k, p, add);
#else
  matmul<T>(m, n, k, p, add);
#endif
}

// The same, of which B is packed as [n / kPanel][k][kPanel]: one stream of memory a panel.
template <typename T>
void matmul_panels(int64_t m, int64_t n, int64_t k, const T* a, int64_t a_row, const T* panels, T* c, int64_t c_row) {
  for (int64_t column = 0; column < n; column += kPanel<T>)
    matmul_rounded<T>(
        m, std::min(kPanel<T>, n - column), k,
        {a, a_row, 1, panels + column * k, kPanel<T>, c + column, c_row}, false);
}

}  // namespace mpma::MPMA_ISA
