// What memory attention hands to its kernels.
#pragma once

#include <cstdint>

#include "philox.h"

namespace mpma {

// A (rows, heads, width) operand whose last dimension is contiguous.
template <class T>
struct MemoryView {
  const T* data;
  int64_t row_stride, head_stride;

  const T* at(int64_t row, int64_t head) const { return data + row * row_stride + head * head_stride; }
};

// One call: query (R, H, D), key and value (N, H, D).
template <class T>
struct MemoryProblem {
  MemoryView<T> query, key, value;
  int64_t rows, heads, slots, width;
  T scale;
  Dropout dropout;
};

// What the backward reads beside the problem: grad_output and output (R, H, D), logsumexp (R, H); and what it writes:
// the gradients of query, key and value, contiguous, null where nobody needs them.
template <class T>
struct MemoryGradients {
  MemoryView<T> grad_output, output;
  const T* logsumexp;
  T *query, *key, *value;
};

}  // namespace mpma
