// Tiles of shared memory, and products of them on the tensor cores, a warp at a time.
//
// float32 is multiplied as three TF32 products (high high + high low + low high), which keeps about 22 bits of each
// factor; an infinite factor gives NaN there. The tensor cores cut off what a sum has no room for instead of rounding it,
// which adds up: a long sum of float32 is made of short ones, added outside.
#pragma once

#include "cuda/machine.h"

namespace mpma::cuda {

// --- Tiles in shared memory ------------------------------------------------------------------------------------------

// kRows x kColumns in row-major order. kColumns is a multiple of 16. A row is an odd number of 16-byte chunks long, so
// that eight rows at the same column lie in different banks.
template <class T, int kRows, int kColumns>
struct Tile {
  static_assert(kColumns % 16 == 0, "products take 16 columns at a time");
  using Element = T;
  static constexpr int kRowCount = kRows, kColumnCount = kColumns;
  static constexpr int kStride = (kColumns / kVector<T> | 1) * kVector<T>;
  static constexpr int kSize = kRows * kStride;  // elements to take from SharedMemory

  T* data;

  MPMA_DEVICE T& operator()(int row, int column) const { return data[row * kStride + column]; }
};

// Fills a tile from global memory. source(row) is where that row's `columns` elements begin, or nullptr for a row that
// is not real: it is never read. What is not real becomes zero. With `aligned`, rows begin at 16-byte boundaries and
// `columns` is a multiple of 16 bytes, and the copies are asynchronous: cp_async_commit, cp_async_wait and a barrier
// come before the first use, in any case. The threads `thread` = 0 to `threads` - 1 share the work.
template <class T, int kRows, int kColumns, class Source>
MPMA_DEVICE void load_tile(
    const Tile<T, kRows, kColumns>& tile, int columns, bool aligned, int thread, int threads, const Source& source) {
  if (aligned) {
    constexpr int kChunks = kColumns / kVector<T>;
    for (int i = thread; i < kRows * kChunks; i += threads) {
      const int row = i / kChunks, column = i % kChunks * kVector<T>;
      const T* from = source(row);
      const bool real = from != nullptr && column < columns;
      cp_async_16(&tile(row, column), real ? from + column : nullptr, real);
    }
  } else {
    for (int i = thread; i < kRows * kColumns; i += threads) {
      const int row = i / kColumns, column = i % kColumns;
      const T* from = source(row);
      tile(row, column) = from != nullptr && column < columns ? from[column] : T{};
    }
  }
}

// By all threads of the block.
template <class T, int kRows, int kColumns, class Source>
MPMA_DEVICE void load_tile(
    const Tile<T, kRows, kColumns>& tile, int columns, bool aligned, const Source& source) {
  load_tile(tile, columns, aligned, thread_index(), thread_count(), source);
}

// --- Accumulators ----------------------------------------------------------------------------------------------------

// A warp's sums: 16 kM rows x 8 kN columns, spread over its lanes.
template <int kM, int kN>
struct Accumulator {
  static constexpr int kRowCount = 16 * kM, kColumnCount = 8 * kN;

  Sum sum[kM][kN];

  MPMA_DEVICE void clear() {
    for_each([](int, int, float& x) { x = 0.f; });
  }

  // f(row, column, value) for each value that this lane holds; row and column count from the accumulator's corner.
  template <class F>
  MPMA_DEVICE void for_each(const F& f) {
    const int row = lane_index() / 4, column = lane_index() % 4 * 2;
    MPMA_UNROLL
    for (int m = 0; m < kM; ++m)
      MPMA_UNROLL
      for (int n = 0; n < kN; ++n)
        MPMA_UNROLL
        for (int i = 0; i < 4; ++i) f(16 * m + row + i / 2 * 8, 8 * n + column + i % 2, sum[m][n].value[i]);
  }
};

// One value for each of an accumulator's rows; a lane holds those of its own rows, 2 kM of them.
template <int kM>
struct RowValues {
  float value[kM][2];

  MPMA_DEVICE float& operator()(int row) { return value[row / 16][row / 8 % 2]; }
  MPMA_DEVICE float operator()(int row) const { return value[row / 16][row / 8 % 2]; }

  // f(row, value) for each row of this lane; the four lanes of a row all hold it.
  template <class F>
  MPMA_DEVICE void for_each(const F& f) {
    MPMA_UNROLL
    for (int m = 0; m < kM; ++m)
      MPMA_UNROLL
      for (int i = 0; i < 2; ++i) f(16 * m + 8 * i + lane_index() / 4, value[m][i]);
  }
};

// One value for each of an accumulator's columns; a lane holds those of its own columns, 2 kN of them.
template <int kN>
struct ColumnValues {
  float value[kN][2];

  MPMA_DEVICE float& operator()(int column) { return value[column / 8][column % 2]; }
  MPMA_DEVICE float operator()(int column) const { return value[column / 8][column % 2]; }

  // f(column, value) for each column of this lane; the eight lanes of a column all hold it.
  template <class F>
  MPMA_DEVICE void for_each(const F& f) {
    MPMA_UNROLL
    for (int n = 0; n < kN; ++n)
      MPMA_UNROLL
      for (int j = 0; j < 2; ++j) f(8 * n + lane_index() % 4 * 2 + j, value[n][j]);
  }
};

struct Maximum {
  MPMA_DEVICE float operator()(float x, float y) const { return x > y ? x : y; }
};
struct Plus {
  MPMA_DEVICE float operator()(float x, float y) const { return x + y; }
};

// combine over the columns, starting from `first`, for each row.
template <int kM, int kN, class Combine>
MPMA_DEVICE RowValues<kM> reduce_rows(const Accumulator<kM, kN>& a, float first, const Combine& combine) {
  RowValues<kM> rows;
  MPMA_UNROLL
  for (int m = 0; m < kM; ++m)
    MPMA_UNROLL
    for (int i = 0; i < 2; ++i) {
      float x = first;
      MPMA_UNROLL
      for (int n = 0; n < kN; ++n)
        x = combine(combine(x, a.sum[m][n].value[2 * i]), a.sum[m][n].value[2 * i + 1]);
      x = combine(x, shuffle_xor(x, 1));
      rows.value[m][i] = combine(x, shuffle_xor(x, 2));
    }
  return rows;
}

// combine over the rows, starting from `first`, for each column.
template <int kM, int kN, class Combine>
MPMA_DEVICE ColumnValues<kN> reduce_columns(const Accumulator<kM, kN>& a, float first, const Combine& combine) {
  ColumnValues<kN> columns;
  MPMA_UNROLL
  for (int n = 0; n < kN; ++n)
    MPMA_UNROLL
    for (int j = 0; j < 2; ++j) {
      float x = first;
      MPMA_UNROLL
      for (int m = 0; m < kM; ++m) x = combine(combine(x, a.sum[m][n].value[j]), a.sum[m][n].value[2 + j]);
      x = combine(x, shuffle_xor(x, 4));
      x = combine(x, shuffle_xor(x, 8));
      columns.value[n][j] = combine(x, shuffle_xor(x, 16));
    }
  return columns;
}

// Two neighbouring elements in one access; `to` is aligned to both together.
template <class T>
MPMA_DEVICE void store_two(T* to, float low, float high) {
  if constexpr (kIsHalf<T>)
    *reinterpret_cast<uint32_t*>(to) = pack<T>(low, high);
  else
    store_8(to, {{float_bits(low), float_bits(high)}});
}

// Writes an accumulator to shared memory, its corner at (row, column) of the tile.
template <class T, int kRows, int kColumns, int kM, int kN>
MPMA_DEVICE void store_shared(
    const Accumulator<kM, kN>& a, const Tile<T, kRows, kColumns>& tile, int row, int column) {
  MPMA_UNROLL
  for (int m = 0; m < kM; ++m)
    MPMA_UNROLL
    for (int n = 0; n < kN; ++n)
      MPMA_UNROLL
      for (int i = 0; i < 2; ++i)
        store_two(
            &tile(row + 16 * m + 8 * i + lane_index() / 4, column + 8 * n + lane_index() % 4 * 2),
            a.sum[m][n].value[2 * i], a.sum[m][n].value[2 * i + 1]);
}

// Writes the first `rows` x `columns` of an accumulator to global memory, row i at out(i).
template <class T, int kM, int kN, class Out>
MPMA_DEVICE void store_global(const Accumulator<kM, kN>& a, int rows, int columns, const Out& out) {
  MPMA_UNROLL
  for (int m = 0; m < kM; ++m)
    MPMA_UNROLL
    for (int i = 0; i < 2; ++i) {
      const int row = 16 * m + 8 * i + lane_index() / 4;
      if (row >= rows) continue;
      T* to = out(row);
      const bool pairs = reinterpret_cast<uintptr_t>(to) % (2 * sizeof(T)) == 0;
      MPMA_UNROLL
      for (int n = 0; n < kN; ++n) {
        const int column = 8 * n + lane_index() % 4 * 2;
        const float low = a.sum[m][n].value[2 * i], high = a.sum[m][n].value[2 * i + 1];
        if (pairs && column + 1 < columns) {
          store_two(to + column, low, high);
        } else {
          if (column < columns) to[column] = from_float<T>(low);
          if (column + 1 < columns) to[column + 1] = from_float<T>(high);
        }
      }
    }
}

// --- Products --------------------------------------------------------------------------------------------------------

// A factor of a product, as (outer index, depth): by_rows reads element (i, k) at row i, column k of a tile, and
// by_columns at row k, column i. So with tiles Q (queries x width), K and V (keys x width), P (queries x keys):
//   Q K^T: multiply(sums, by_rows(q), by_rows(k), width)       P V:   multiply(sums, by_rows(p), by_columns(v), keys)
//   P^T G: multiply(sums, by_columns(p), by_columns(g), queries)
template <class T, int kStride, bool kTransposed>
struct Factor {
  const T* corner;

  MPMA_DEVICE Factor from(int depth) const { return {corner + depth * (kTransposed ? kStride : 1)}; }
};

// From row `row` and column `column` on.
template <class T, int kRows, int kColumns>
MPMA_DEVICE auto by_rows(const Tile<T, kRows, kColumns>& tile, int row = 0, int column = 0) {
  return Factor<T, Tile<T, kRows, kColumns>::kStride, false>{&tile(row, column)};
}
template <class T, int kRows, int kColumns>
MPMA_DEVICE auto by_columns(const Tile<T, kRows, kColumns>& tile, int row = 0, int column = 0) {
  return Factor<T, Tile<T, kRows, kColumns>::kStride, true>{&tile(row, column)};
}

// The depth of one step on the tensor cores.
template <class T>
constexpr int kDepthStep = kIsHalf<T> ? 16 : 8;

// A step's operands: those of A for 16 rows, of B for 8 columns. float32 is split in two TF32 numbers. The order of the
// depth within a step is the same for A and B, and for float32 it is 0 2 4 6 1 3 5 7: so two neighbours in memory are one
// lane's, and an accumulator's registers are an operand's.
template <class T>
struct StepA {
  Registers4 value;
};
template <>
struct StepA<float> {
  Registers4 high, low;
};
template <class T>
struct StepB {
  Registers2 value;
};
template <>
struct StepB<float> {
  Registers2 high, low;
};

MPMA_DEVICE void split_tf32(float x, uint32_t& high, uint32_t& low) {
  high = to_tf32(x);
  low = to_tf32(x - bits_float(high));
}

MPMA_DEVICE void split_tf32(float x0, float x1, float x2, float x3, StepA<float>& a) {
  split_tf32(x0, a.high.r[0], a.low.r[0]);
  split_tf32(x1, a.high.r[1], a.low.r[1]);
  split_tf32(x2, a.high.r[2], a.low.r[2]);
  split_tf32(x3, a.high.r[3], a.low.r[3]);
}

// Outer indices `outer` to outer + 15, from depth `depth` on.
template <class T, int kStride, bool kTransposed>
MPMA_DEVICE StepA<T> load_a(const Factor<T, kStride, kTransposed>& factor, int outer, int depth) {
  StepA<T> a;
  if constexpr (kIsHalf<T>) {
    // Matrices in the order (outer, depth): (0, 0), (8, 0), (0, 8), (8, 8).
    const int i = lane_index() % 8, matrix = lane_index() / 8, o = matrix % 2 * 8, k = matrix / 2 * 8;
    if constexpr (kTransposed)
      a.value = ldmatrix_transposed(factor.corner + (depth + k + i) * kStride + outer + o);
    else
      a.value = ldmatrix(factor.corner + (outer + o + i) * kStride + depth + k);
  } else {
    constexpr int kOuter = kTransposed ? 1 : kStride, kDepth = kTransposed ? kStride : 1;
    const float* x = factor.corner + (outer + lane_index() / 4) * kOuter + (depth + lane_index() % 4 * 2) * kDepth;
    split_tf32(x[0], x[8 * kOuter], x[kDepth], x[8 * kOuter + kDepth], a);
  }
  return a;
}

// Outer indices `outer` to outer + 15, as two operands of 8.
template <class T, int kStride, bool kTransposed>
MPMA_DEVICE void load_b(const Factor<T, kStride, kTransposed>& factor, int outer, int depth, StepB<T> (&b)[2]) {
  if constexpr (kIsHalf<T>) {
    // Matrices in the order (outer, depth): (0, 0), (0, 8), (8, 0), (8, 8).
    const int i = lane_index() % 8, matrix = lane_index() / 8, o = matrix / 2 * 8, k = matrix % 2 * 8;
    Registers4 r;
    if constexpr (kTransposed)
      r = ldmatrix_transposed(factor.corner + (depth + k + i) * kStride + outer + o);
    else
      r = ldmatrix(factor.corner + (outer + o + i) * kStride + depth + k);
    b[0].value = {{r.r[0], r.r[1]}};
    b[1].value = {{r.r[2], r.r[3]}};
  } else {
    constexpr int kOuter = kTransposed ? 1 : kStride, kDepth = kTransposed ? kStride : 1;
    const float* x = factor.corner + (outer + lane_index() / 4) * kOuter + (depth + lane_index() % 4 * 2) * kDepth;
    MPMA_UNROLL
    for (int half = 0; half < 2; ++half) {
      split_tf32(x[8 * half * kOuter], b[half].high.r[0], b[half].low.r[0]);
      split_tf32(x[8 * half * kOuter + kDepth], b[half].high.r[1], b[half].low.r[1]);
    }
  }
}

template <class T>
MPMA_DEVICE void multiply_step(Sum& c, const StepA<T>& a, const StepB<T>& b) {
  if constexpr (kIsHalf<T>) {
    mma<T>(c, a.value, b.value);
  } else {  // the small products first
    mma_tf32(c, a.low, b.high);
    mma_tf32(c, a.high, b.low);
    mma_tf32(c, a.high, b.high);
  }
}

// c += A B over a depth that is a multiple of 16; both begin at their factor's corner. kN is at least 2. kUnroll steps of the
// 2-byte types go together: fewer take fewer registers.
template <int kUnroll = 4, int kM, int kN, class T, int kStrideA, bool kTransposedA, int kStrideB, bool kTransposedB>
MPMA_DEVICE void multiply(
    Accumulator<kM, kN>& c, const Factor<T, kStrideA, kTransposedA>& a, const Factor<T, kStrideB, kTransposedB>& b,
    int depth) {
  static_assert(kN >= 2, "columns come 16 at a time");
  MPMA_UNROLL_PRODUCT
  for (int k = 0; k < depth; k += kDepthStep<T>) {
    StepA<T> left[kM];
    MPMA_UNROLL
    for (int m = 0; m < kM; ++m) left[m] = load_a(a, 16 * m, k);
    MPMA_UNROLL
    for (int n = 0; n < kN; n += 2) {
      const int odd = n + 1 < kN ? 0 : 1;  // the last 8 columns of an odd number come with the 8 before them
      StepB<T> right[2];
      load_b(b, 8 * (n - odd), k, right);
      MPMA_UNROLL
      for (int m = 0; m < kM; ++m)
        MPMA_UNROLL
        for (int half = odd; half < 2; ++half) multiply_step(c.sum[m][n - odd + half], left[m], right[half]);
    }
  }
}

// c += part, whose first columns are those from 8 n on of c.
template <int kM, int kN, int kPart>
MPMA_DEVICE void add_to(Accumulator<kM, kN>& c, const Accumulator<kM, kPart>& part, int n = 0) {
  MPMA_UNROLL
  for (int m = 0; m < kM; ++m)
    MPMA_UNROLL
    for (int j = 0; j < kPart; ++j)
      MPMA_UNROLL
      for (int i = 0; i < 4; ++i) c.sum[m][n + j].value[i] += part.sum[m][j].value[i];
}

// multiply over a long depth: in float32 each 32 in depth have a sum of their own.
template <int kUnroll = 4, int kM, int kN, class T, int kStrideA, bool kTransposedA, int kStrideB, bool kTransposedB>
MPMA_DEVICE void multiply_long(
    Accumulator<kM, kN>& c, const Factor<T, kStrideA, kTransposedA>& a, const Factor<T, kStrideB, kTransposedB>& b,
    int depth) {
  if constexpr (kIsHalf<T>) {
    multiply<kUnroll>(c, a, b, depth);
  } else {
    MPMA_NO_UNROLL
    for (int k = 0; k < depth; k += 32) {
      Accumulator<kM, kN> part;
      part.clear();
      multiply(part, a.from(k), b.from(k), depth - k < 32 ? depth - k : 32);
      add_to(c, part);
    }
  }
}

// multiply where a sum of its own for all columns would take too many registers: in float32 each step has one, for a few
// columns at a time, and A is read again for the next few.
template <int kM, int kN, class T, int kStrideA, bool kTransposedA, int kStrideB, bool kTransposedB>
MPMA_DEVICE void multiply_by_steps(
    Accumulator<kM, kN>& c, const Factor<T, kStrideA, kTransposedA>& a, const Factor<T, kStrideB, kTransposedB>& b,
    int depth) {
  if constexpr (kIsHalf<T>) {
    multiply(c, a, b, depth);
  } else {
    MPMA_UNROLL
    for (int n = 0; n < kN; n += 2) {
      const int odd = n + 1 < kN ? 0 : 1;
      MPMA_NO_UNROLL
      for (int k = 0; k < depth; k += kDepthStep<T>) {
        StepB<T> right[2];
        load_b(b, 8 * (n - odd), k, right);
        MPMA_UNROLL
        for (int m = 0; m < kM; ++m) {
          const StepA<T> left = load_a(a, 16 * m, k);
          MPMA_UNROLL
          for (int half = odd; half < 2; ++half) {
            Sum part = {{0.f, 0.f, 0.f, 0.f}};
            multiply_step(part, left, right[half]);
            MPMA_UNROLL
            for (int i = 0; i < 4; ++i) c.sum[m][n - odd + half].value[i] += part.value[i];
          }
        }
      }
    }
  }
}

// A step's operands of 16 rows of an accumulator, from depth `depth` on, rounded to T.
template <class T, int kM, int kN>
MPMA_DEVICE StepA<T> load_a(const Accumulator<kM, kN>& a, int m, int depth) {
  StepA<T> step;
  const float* x = a.sum[m][depth / 8].value;
  if constexpr (kIsHalf<T>) {
    const float* y = a.sum[m][depth / 8 + 1].value;
    step.value = {{pack<T>(x[0], x[1]), pack<T>(x[2], x[3]), pack<T>(y[0], y[1]), pack<T>(y[2], y[3])}};
  } else {
    split_tf32(x[0], x[2], x[1], x[3], step);
  }
  return step;
}

// c += A B with A in registers: an accumulator of another product. As in multiply_long, float32 has a sum of its own here.
template <class T, int kM, int kN, int kDepth8, int kStrideB, bool kTransposedB>
MPMA_DEVICE void multiply(
    Accumulator<kM, kN>& c, const Accumulator<kM, kDepth8>& a, const Factor<T, kStrideB, kTransposedB>& b) {
  static_assert(kN % 2 == 0 && kDepth8 % 2 == 0, "columns and depth come 16 at a time");
  if constexpr (kIsHalf<T>) {
    MPMA_UNROLL
    for (int k = 0; k < 8 * kDepth8; k += kDepthStep<T>) {
      StepA<T> left[kM];
      MPMA_UNROLL
      for (int m = 0; m < kM; ++m) left[m] = load_a<T>(a, m, k);
      MPMA_UNROLL
      for (int n = 0; n < kN; n += 2) {
        StepB<T> right[2];
        load_b(b, 8 * n, k, right);
        MPMA_UNROLL
        for (int m = 0; m < kM; ++m)
          MPMA_UNROLL
          for (int half = 0; half < 2; ++half) multiply_step(c.sum[m][n + half], left[m], right[half]);
      }
    }
  } else {
    StepA<T> left[kDepth8][kM];
    MPMA_UNROLL
    for (int k = 0; k < kDepth8; ++k)
      MPMA_UNROLL
      for (int m = 0; m < kM; ++m) left[k][m] = load_a<T>(a, m, 8 * k);
    MPMA_UNROLL
    for (int n = 0; n < kN; n += 2) {
      Accumulator<kM, 2> part;
      part.clear();
      MPMA_UNROLL
      for (int k = 0; k < kDepth8; ++k) {
        StepB<T> right[2];
        load_b(b, 8 * n, 8 * k, right);
        MPMA_UNROLL
        for (int m = 0; m < kM; ++m)
          MPMA_UNROLL
          for (int half = 0; half < 2; ++half) multiply_step(part.sum[m][half], left[k][m], right[half]);
      }
      add_to(c, part, n);
    }
  }
}

}  // namespace mpma::cuda
