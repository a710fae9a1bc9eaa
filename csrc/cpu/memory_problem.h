// What the two forms of memory attention, top-k and dense, share.
#pragma once

#include "cpu/gemm.h"
#include "cpu/parallel.h"
#include "philox.h"

namespace mpma::cpu {

// One call: query (R, H, D), key and value (N, H, D).
template <class T>
struct MemoryProblem {
  View<T> query, key, value;
  int64_t rows, heads, slots, width;
  T scale;
  Dropout dropout;
};

// What the backward of a call gets beside it: grad_output (R, H, D), logsumexp (R, H).
template <class T>
struct MemoryGradients {
  View<T> grad_output;
  const T* logsumexp;
  T *query, *key, *value;  // null where not needed
};

// Panels of rows for products over the width: [head][row panel][width][kPanel].
template <class T, class Isa>
struct TransposedPanels {
  int64_t width, per_head;
  Buffer<T> data;

  TransposedPanels(const View<T>& src, int64_t heads, int64_t rows, int64_t width)
      : width(width), per_head(round_up(rows, kPanel<T, Isa>) * width), data(heads * per_head) {
    const int64_t panels = per_head / stride();
    parallel<Isa>(heads * panels, [&](int64_t begin, int64_t end) __attribute__((always_inline)) {
      for (int64_t i = begin; i < end; ++i)
        pack_transposed<T, Isa>(
            src, i / panels, i % panels * kPanel<T, Isa>, rows, width, data.get() + i * stride());
    });
  }

  int64_t stride() const { return width * kPanel<T, Isa>; }
  const T* at(int64_t head, int64_t row) const { return data.get() + head * per_head + row * width; }
};

// Panels of columns for products over the rows: [head][column panel][row][kPanel].
template <class T, class Isa>
struct ColumnPanels {
  int64_t rows, per_head;
  Buffer<T> data;

  ColumnPanels(const View<T>& src, int64_t heads, int64_t rows, int64_t width)
      : rows(rows), per_head(round_up(width, kPanel<T, Isa>) * rows), data(heads * per_head) {
    const int64_t panels = round_up(width, kPanel<T, Isa>) / kPanel<T, Isa>;
    parallel<Isa>(heads * panels, [&](int64_t begin, int64_t end) __attribute__((always_inline)) {
      for (int64_t i = begin; i < end; ++i)
        pack_columns<T, Isa>(src, i / panels, i % panels * kPanel<T, Isa>, rows, width, data.get() + i * stride());
    });
  }

  int64_t stride() const { return rows * kPanel<T, Isa>; }
  const T* at(int64_t head, int64_t row) const { return data.get() + head * per_head + row * kPanel<T, Isa>; }
};

}  // namespace mpma::cpu
