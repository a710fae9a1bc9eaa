// The real rows of an operand (items, length, width) with a mask (items, length), True = real, without the others: what
// is masked is never read, so it can have no effect, and costs nothing.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <vector>

#include "cpu/buffer.h"

namespace mpma::cpu {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline ScalarType compute_type(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline bool is_bfloat16(const Tensor& t) { return t.scalar_type() == ScalarType::BFloat16; }

inline Tensor in_type(const Tensor& t, ScalarType type) {
  return t.scalar_type() == type ? t : torch::stable::to(t, type);
}

// How many items of so many multiply-adds or copied numbers are worth a thread: about 10 microseconds' worth.
inline int64_t grain(int64_t work_of_item) { return (1 << 18) / std::max<int64_t>(1, work_of_item) + 1; }

template <class T>
struct RealRows {
  int64_t items, length, width, stride;  // stride: distance of rows, zeros beyond the width
  std::vector<int64_t> start;            // (items + 1): the rows of item i are start[i] to start[i + 1]
  std::vector<int32_t> position;         // where in its item each row stood
  const T* data;                         // the operand's own memory where its rows lie as they are wanted

  RealRows(const Tensor& operand, const std::optional<Tensor>& mask, int64_t stride)
      : RealRows(in_type(operand, compute_type(operand)), positions(operand, mask), stride) {}

  int64_t rows() const { return start[items]; }
  int64_t count(int64_t item) const { return start[item + 1] - start[item]; }
  const T* item(int64_t i) const { return data + start[i] * stride; }

  int64_t largest_count() const {
    int64_t largest = 0;
    for (int64_t i = 0; i < items; ++i) largest = std::max(largest, count(i));
    return largest;
  }

  // The number of the row that stood at each position of each item; where masked the item's first row, so that no index
  // given from outside leads out of the item.
  std::vector<int64_t> row_of_position() const {
    std::vector<int64_t> rows_of(items * length);
    for (int64_t i = 0; i < items; ++i) {
      std::fill_n(rows_of.begin() + i * length, length, start[i]);
      for (int64_t row = start[i]; row < start[i + 1]; ++row) rows_of[i * length + position[row]] = row;
    }
    return rows_of;
  }

  // A tensor laid out as these rows, for their gradient.
  Tensor empty(const Tensor& like) const {
    return torch::stable::new_empty(like, {rows(), stride}, compute_type(like));
  }

  Tensor zeros(const Tensor& like) const {
    const Tensor tensor = empty(like);
    T* out = tensor.template mutable_data_ptr<T>();
    torch::stable::parallel_for(
        0, rows() * stride, grain(1), [&](int64_t begin, int64_t end) { std::fill(out + begin, out + end, T(0)); });
    return tensor;
  }

  // Rows laid out as these in a tensor of the operand's shape and type: where they stood, with zeros elsewhere.
  Tensor scatter(const Tensor& laid_out, const Tensor& like) const {
    if (complete()) return in_type(torch::stable::view(laid_out, {items, length, width}), like.scalar_type());
    const T* values = laid_out.template const_data_ptr<T>();
    const Tensor tensor = torch::stable::new_empty(like, {items, length, width}, compute_type(like));
    T* out = tensor.template mutable_data_ptr<T>();
    torch::stable::parallel_for(0, items, grain(length * width), [&](int64_t begin, int64_t end) {
      std::fill(out + begin * length * width, out + end * length * width, T(0));
      for (int64_t i = begin; i < end; ++i)
        for (int64_t row = start[i]; row < start[i + 1]; ++row)
          std::copy_n(values + row * stride, width, out + (i * length + position[row]) * width);
    });
    return in_type(tensor, like.scalar_type());
  }

 private:
  struct Positions {
    std::vector<int64_t> start;
    std::vector<int32_t> position;
  };

  static Positions positions(const Tensor& tensor, const std::optional<Tensor>& mask) {
    const bool* real = mask ? mask->const_data_ptr<bool>() : nullptr;
    const int64_t by_item = mask ? mask->stride(0) : 0, by_row = mask ? mask->stride(1) : 0;
    const int64_t items = tensor.size(0), length = tensor.size(1);
    Positions p;
    p.start.push_back(0);
    for (int64_t i = 0; i < items; ++i) {
      for (int64_t j = 0; j < length; ++j)
        if (!real || real[i * by_item + j * by_row]) p.position.push_back(static_cast<int32_t>(j));
      p.start.push_back(static_cast<int64_t>(p.position.size()));
    }
    return p;
  }

  RealRows(const Tensor& tensor, Positions p, int64_t stride)
      : items(tensor.size(0)), length(tensor.size(1)), width(tensor.size(2)), stride(stride), start(std::move(p.start)),
        position(std::move(p.position)), operand_(tensor), copy_(lies_as_wanted() ? 0 : rows() * stride) {
    if (lies_as_wanted()) {
      data = tensor.template const_data_ptr<T>();
    } else {
      copy();
      data = copy_.get();
      operand_ = Tensor();
    }
  }

  // Whether no row is masked and none is padded.
  bool complete() const { return rows() == items * length && stride == width; }

  bool lies_as_wanted() const {
    return complete() && operand_.stride(2) == 1 && operand_.stride(1) == stride &&
           operand_.stride(0) == length * stride;
  }

  void copy() {
    const T* source = operand_.template const_data_ptr<T>();
    const int64_t by_item = operand_.stride(0), by_row = operand_.stride(1), by_column = operand_.stride(2);
    torch::stable::parallel_for(0, items, grain(length * width), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        for (int64_t row = start[i]; row < start[i + 1]; ++row) {
          const T* from = source + i * by_item + position[row] * by_row;
          T* to = copy_.get() + row * stride;
          if (by_column == 1)
            std::memcpy(to, from, width * sizeof(T));
          else
            for (int64_t d = 0; d < width; ++d) to[d] = from[d * by_column];
          std::fill(to + width, to + stride, T(0));
        }
    });
  }

  Tensor operand_;
  Buffer<T> copy_;
};

}  // namespace mpma::cpu
