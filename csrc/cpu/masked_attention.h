// What the operators of masked attention hand to their kernels.
#pragma once

#include <cstdint>
#include <vector>

#include "philox.h"

namespace mpma {

enum class Element { kFloat, kDouble, kBFloat16, kHalf };

// Row i of head h of sequence b starts at data + b * batch + i * row + h * head; its elements are contiguous.
template <typename T>
struct Operand {
  T* data = nullptr;  // null: a mask that lets everything through, a gradient that nobody needs
  int64_t batch = 0, row = 0, head = 0;

  T* at(int64_t b, int64_t i, int64_t h) const { return data + b * batch + i * row + h * head; }
  explicit operator bool() const { return data != nullptr; }
};

// Operands of any element type, their strides in bytes.
using Input = Operand<const char>;
using Output = Operand<char>;

struct Span {
  int64_t start, length;
};

// One batch of sequences. Padded ones all start at row 0 of their own batch entry; packed ones have no batch stride
// and start at different rows. The kernels know only this one form.
struct AttentionBatch {
  Input query, key, value;
  std::vector<Span> queries, keys;  // rows of each sequence
  Operand<const bool> mask;         // of the keys, true = attend
  int64_t heads, width;
  Element element;
  double scale;
  Dropout dropout;
};

// What the backward reads beside the batch, and what it writes. A is the type of sums and statistics.
template <typename A>
struct AttentionGradients {
  Input grad_output, output;
  Operand<const A> logsumexp;
  Output query, key, value;
};

}  // namespace mpma
