// Matrix products whose operands may be rounded to bfloat16, because they hold the rows of bfloat16 tensors, which
// rounding leaves as they are, or numbers that a kernel for bfloat16 may round: attention weights and their gradients.
// With bfloat16 instructions they are rounded and summed in float32, two terms an instruction of AVX-512 or 32 of AMX;
// elsewhere they are ordinary products. Included by foreach_isa.h, after matmul.h.

namespace mpma::MPMA_ISA {

#if MPMA_BFLOAT16

// Two terms of a sum as one word, the even one in its low half. A is packed as [row][pair] and B as [pair][column],
// which is how both kinds of instruction read them, in blocks that fit the second-level cache together.
typedef Vector<uint32_t> Words;
constexpr int64_t kWords = 16;  // of a vector; a register of AMX holds 16 rows of them
constexpr int64_t kPairs = kDepth / 2, kPackedRows = 128, kPackedColumns = 64;
constexpr int64_t kPackedRow = kPairs + kWords;  // not a power of two, as row_distance

// Pairs that `depth` terms are packed to, with zeros in the last: whole registers of AMX.
constexpr int64_t padded_pairs(int64_t depth) { return (depth + 2 * kWords - 1) / (2 * kWords) * kWords; }

// 32 terms in their order.
inline Words round_terms(Vector<float> first, Vector<float> second) {
  return (Words)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
}

inline Words round_pairs(Vector<float> even, Vector<float> odd) {
  typedef uint16_t Halves __attribute__((vector_size(MPMA_VECTOR_BYTES)));
  const Halves terms = (Halves)round_terms(even, odd);
  return (Words)__builtin_shufflevector(
      terms, terms, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13,
      29, 14, 30, 15, 31);
}

// to[pair][column], kPackedColumns apart, of `depth` rows of B, whose panels of columns are b_panel apart. Columns are
// read up to a whole vector.
inline void pack_right(
    const float* b, int64_t b_row, int64_t b_panel, int64_t depth, int64_t columns, uint32_t* to) {
  for (int64_t j = 0; j < columns; j += kWords) {
    const float* from = b + j / kPanel<float> * b_panel + j % kPanel<float>;
    const auto row = [&](int64_t k) { return k < depth ? load(from + k * b_row) : Vector<float>{}; };
    for (int64_t pair = 0; pair < padded_pairs(depth); ++pair)
      store(to + pair * kPackedColumns + j, round_pairs(row(2 * pair), row(2 * pair + 1)));
  }
}

// The first `real` elements, zeros from there.
inline Vector<float> load_first(const float* from, int64_t real) {
  const auto mask = static_cast<__mmask16>(real >= kWords ? 0xFFFF : real > 0 ? (1 << real) - 1 : 0);
  return (Vector<float>)_mm512_maskz_loadu_ps(mask, from);
}

// to[row][pair], kPackedRow apart, of rows of A that are contiguous.
inline void pack_left_rows(const float* a, int64_t a_row, int64_t rows, int64_t depth, uint32_t* to) {
  for (int64_t i = 0; i < rows; ++i, a += a_row, to += kPackedRow) {
    int64_t k = 0;
    for (; k + 2 * kWords <= depth; k += 2 * kWords) store(to + k / 2, round_terms(load(a + k), load(a + k + kWords)));
    if (k == depth) continue;
    const int64_t left = depth - k;
    store(to + k / 2, round_terms(load_first(a + k, left), load_first(a + k + kWords, left - kWords)));
  }
}

template <int... kLanes>
inline Words pick(Words low, Words high) {
  return __builtin_shufflevector(low, high, kLanes...);
}

// Rows of 16 vectors become columns: first in blocks of 4 by 4, whose rows the second step puts together.
inline void transpose_words(Words (&x)[kWords]) {
  Words two[kWords], four[kWords];
#pragma GCC unroll 16
  for (int i = 0; i < kWords; i += 2) {
    two[i] = pick<0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29>(x[i], x[i + 1]);
    two[i + 1] = pick<2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31>(x[i], x[i + 1]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < kWords; i += 4)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const Words low = two[i + j], high = two[i + 2 + j];
      four[i + 2 * j] = pick<0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29>(low, high);
      four[i + 2 * j + 1] = pick<2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31>(low, high);
    }
  const auto even = pick<0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27>;
  const auto odd = pick<4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31>;
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const Words even0 = even(four[i], four[i + 4]), even1 = even(four[i + 8], four[i + 12]);
    const Words odd0 = odd(four[i], four[i + 4]), odd1 = odd(four[i + 8], four[i + 12]);
    x[i] = even(even0, even1);
    x[i + 4] = even(odd0, odd1);
    x[i + 8] = odd(even0, even1);
    x[i + 12] = odd(odd0, odd1);
  }
}

// The same of rows of A whose terms are a_column apart and which are next to each other. Rows are written up to a
// multiple of 16.
inline void pack_left_columns(const float* a, int64_t a_column, int64_t rows, int64_t depth, uint32_t* to) {
  for (int64_t i = 0; i < rows; i += kWords)
    for (int64_t pair = 0; pair < padded_pairs(depth); pair += kWords) {
      const auto at = [&](int64_t k) { return load_first(a + i + k * a_column, k < depth ? rows - i : 0); };
      Words block[kWords];
#pragma GCC unroll 16
      for (int64_t j = 0; j < kWords; ++j) block[j] = round_pairs(at(2 * (pair + j)), at(2 * (pair + j) + 1));
      transpose_words(block);
#pragma GCC unroll 16
      for (int64_t j = 0; j < kWords; ++j) store(to + (i + j) * kPackedRow + pair, block[j]);
    }
}

struct PackedProduct {
  int64_t rows, columns, pairs;
  const uint32_t *a, *b;
  float* c;
  int64_t c_row;
  bool add;
};

template <int kVectors, int kRows>
void packed_tile(const PackedProduct& p, int64_t row, int64_t column) {
  float* c = p.c + row * p.c_row + column;
  Vector<float> sum[kRows][kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) sum[i][j] = p.add ? load(c + i * p.c_row + j * kWords) : Vector<float>{};
  const uint32_t *a = p.a + row * kPackedRow, *b = p.b + column;
  for (int64_t k = 0; k < p.pairs; ++k, ++a, b += kPackedColumns) {
    Words right[kVectors];
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) right[j] = load(b + j * kWords);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const Words left = Words{} + a[i * kPackedRow];
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; ++j)
        sum[i][j] = (Vector<float>)_mm512_dpbf16_ps((__m512)sum[i][j], (__m512bh)left, (__m512bh)right[j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) store(c + i * p.c_row + j * kWords, sum[i][j]);
}

template <int kVectors, int... kRows>
constexpr auto packed_tiles(std::integer_sequence<int, kRows...>) {
  return std::array{&packed_tile<kVectors, kRows + 1>...};
}

inline void multiply_packed(const PackedProduct& p) {
  static constexpr auto wide = packed_tiles<kTileVectors>(std::make_integer_sequence<int, kTileRows>());
  static constexpr auto narrow = packed_tiles<1>(std::make_integer_sequence<int, kTileRows>());
  const int64_t tiles = (p.rows + kTileRows - 1) / kTileRows;
  for (int64_t column = 0; column < p.columns; column += kPanel<float>)
    for (int64_t tile = 0, row = 0; tile < tiles; ++tile) {  // rows shared out evenly, as in matmul
      const int64_t rows = p.rows / tiles + (tile < p.rows % tiles);
      (p.columns - column <= kWords ? narrow : wide)[rows - 1](p, row, column);
      row += rows;
    }
}

// Two by two registers of C (0 to 3), with two of A (4, 5) and two of B (6, 7).
template <bool kTwoRows, bool kTwoColumns>
inline void amx_tile(const PackedProduct& p, int64_t row, int64_t column) {
  constexpr int64_t kARow = kPackedRow * 4, kBRow = kPackedColumns * 4;  // bytes
  const int64_t c_row = p.c_row * 4;
  float *c = p.c + row * p.c_row + column, *below = c + kWords * p.c_row;
  if (p.add) {
    _tile_loadd(0, c, c_row);
    if constexpr (kTwoColumns) _tile_loadd(1, c + kWords, c_row);
    if constexpr (kTwoRows) _tile_loadd(2, below, c_row);
    if constexpr (kTwoRows && kTwoColumns) _tile_loadd(3, below + kWords, c_row);
  } else {
    _tile_zero(0);
    if constexpr (kTwoColumns) _tile_zero(1);
    if constexpr (kTwoRows) _tile_zero(2);
    if constexpr (kTwoRows && kTwoColumns) _tile_zero(3);
  }
  const uint32_t *a = p.a + row * kPackedRow, *b = p.b + column;
  for (int64_t k = 0; k < p.pairs; k += kWords, a += kWords, b += kWords * kPackedColumns) {
    _tile_loadd(4, a, kARow);
    _tile_loadd(6, b, kBRow);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kTwoColumns) {
      _tile_loadd(7, b + kWords, kBRow);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (kTwoRows) {
      _tile_loadd(5, a + kWords * kPackedRow, kARow);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (kTwoColumns) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, c_row);
  if constexpr (kTwoColumns) _tile_stored(1, c + kWords, c_row);
  if constexpr (kTwoRows) _tile_stored(2, below, c_row);
  if constexpr (kTwoRows && kTwoColumns) _tile_stored(3, below + kWords, c_row);
}

// The registers' sizes: `rows` of A and C in the first of two, `below` in the second.
inline void set_amx_registers(int64_t rows, int64_t below) {
  struct {
    uint8_t palette = 1, reserved[15] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {};
  } sizes;
  static_assert(sizeof(sizes) == 64, "what LDTILECFG reads");
  const int64_t of_register[8] = {rows, rows, below, below, rows, below, kWords, kWords};
  for (int i = 0; i < 8; ++i) sizes.rows[i] = std::max<int64_t>(of_register[i], 1);
  asm volatile("ldtilecfg %0" : : "m"(sizes));
}

inline void multiply_amx(const PackedProduct& p) {
  asm volatile("" : : : "memory");  // what is packed is written before a register is loaded: GCC does not know
  const int64_t tiles = (p.rows + 2 * kWords - 1) / (2 * kWords);
  for (int64_t tile = 0, row = 0, set = 0; tile < tiles; ++tile) {
    const int64_t rows = p.rows / tiles + (tile < p.rows % tiles);
    if (rows != set) set_amx_registers(std::min(rows, kWords), rows - kWords);
    set = rows;
    for (int64_t column = 0; column < p.columns; column += 2 * kWords) {
      const bool two_rows = rows > kWords, two_columns = p.columns - column > kWords;
      const auto tile_product = two_rows ? (two_columns ? &amx_tile<true, true> : &amx_tile<true, false>)
                                         : (two_columns ? &amx_tile<false, true> : &amx_tile<false, false>);
      tile_product(p, row, column);
    }
    row += rows;
  }
  _tile_release();
}

// As matmul. A has contiguous rows or contiguous columns; panels of B's columns are b_panel apart.
inline void matmul_bfloat16(int64_t m, int64_t n, int64_t k, const Product<float>& p, int64_t b_panel, bool add) {
  alignas(64) uint32_t left[kPackedRows * kPackedRow], right[kPairs * kPackedColumns];
  for (int64_t depth0 = 0; depth0 == 0 || depth0 < k; depth0 += kDepth) {  // once even for k = 0, which sets C to 0
    const int64_t depth = std::min(k - depth0, kDepth);
    for (int64_t row = 0; row < m; row += kPackedRows) {
      const int64_t rows = std::min(m - row, kPackedRows);
      const float* a = p.a + row * p.a_row + depth0 * p.a_column;
      if (p.a_column == 1)
        pack_left_rows(a, p.a_row, rows, depth, left);
      else
        pack_left_columns(a, p.a_column, rows, depth, left);
      for (int64_t column = 0; column < n; column += kPackedColumns) {
        const int64_t columns = std::min(n - column, kPackedColumns);
        const float* b = p.b + depth0 * p.b_row + column / kPanel<float> * b_panel;
        pack_right(b, p.b_row, b_panel, depth, columns, right);
        const PackedProduct block = {rows, columns, padded_pairs(depth), left, right,
                                     p.c + row * p.c_row + column, p.c_row, add || depth0 > 0};
        fastest_isa() == Isa::kAmx ? multiply_amx(block) : multiply_packed(block);
      }
    }
  }
}

#endif

template <typename T>
void matmul_rounded(int64_t m, int64_t n, int64_t k, const Product<T>& p, bool add) {
#if MPMA_BFLOAT16
  static_assert(std::is_same_v<T, float>, "bfloat16 is computed in float32");
  matmul_bfloat16(m, n, k, p, kPanel<float>, add);
#else
  matmul<T>(m, n, k, p, add);
#endif
}

// As matmul_panels.
template <typename T>
void matmul_panels_rounded(
    int64_t m, int64_t n, int64_t k, const T* a, int64_t a_row, const T* panels, T* c, int64_t c_row) {
#if MPMA_BFLOAT16
  matmul_bfloat16(m, n, k, {a, a_row, 1, panels, kPanel<float>, c, c_row}, k * kPanel<float>, false);
#else
  matmul_panels<T>(m, n, k, a, a_row, panels, c, c_row);
#endif
}

}  // namespace mpma::MPMA_ISA
