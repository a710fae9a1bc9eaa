// Memory attention over the K best slots of a row.
//
// Forward: blocks of rows times tiles of the bank into a bounded buffer of scores, selection, softmax, gather.
// Backward: weights are rebuilt from the kept indices. The gradient of the query is summed by its row; those of the
// bank by their slot, through a reverse index, so that no two threads write to one place and the order of every
// sum is fixed.
#pragma once

#include <algorithm>

#include "cpu/gather.h"
#include "cpu/memory_problem.h"
#include "cpu/topk.h"

namespace mpma::cpu {

// 24 rows of 2048 float32 scores are 192 KB, which stays in a second-level cache of 512 KB.
constexpr int64_t kTopkRows = 24, kTopkTile = 2048;

// weights[j] is multiplied with what dropout makes of slot slots[j].
template <class T>
MPMA_INLINE void drop_weights(
    const Dropout& dropout, int64_t head, int64_t row, const int32_t* slots, int64_t count, T* weights) {
  for (int64_t j = 0; j < count; ++j) {
    const uint32_t word = dropout.memory_words(slots[j] / 4, head, row).word[slots[j] % 4];
    weights[j] = word < dropout.threshold ? T(0) : weights[j] * T(dropout.kept);
  }
}

// Scores to softmax weights in place, the log-sum-exp returned; weights is writable up to the next whole vector.
template <class T, class Isa>
MPMA_INLINE T softmax(T* weights, int64_t count) {
  using S = Simd<T, Isa>;
  T top = weights[0];
  for (int64_t j = 1; j < count; ++j) top = weights[j] > top ? weights[j] : top;
  for (int64_t j = count; j % S::kWidth != 0; ++j) weights[j] = -std::numeric_limits<T>::infinity();
  typename S::Vec sums = {};
  for (int64_t j = 0; j < count; j += S::kWidth) {
    const auto e = S::exp(S::load(weights + j) - top);
    S::store(weights + j, e);
    sums += e;
  }
  const T sum = S::sum(sums);
  for (int64_t j = 0; j < count; j += S::kWidth) S::store(weights + j, S::load(weights + j) / sum);
  return top + std::log(sum);
}

// output (R, H, D), logsumexp (R, H), indices (R, H, K), all contiguous.
template <class T, class Isa>
void topk_forward(const MemoryProblem<T>& m, int64_t k, T* output, T* logsumexp, int32_t* indices) {
  using Int = typename Simd<T, Isa>::Int;
  const TransposedPanels<T, Isa> panels(m.key, m.heads, m.slots, m.width);
  const int64_t blocks = round_up(m.rows, kTopkRows) / kTopkRows, tile = std::min(m.slots, kTopkTile);
  // The padding keeps equal columns of neighbouring rows off the same cache set.
  const int64_t stride = round_up(tile, 16) + 16, vector = Simd<T, Isa>::kWidth;
  parallel<Isa>(m.heads * blocks, [&](int64_t begin, int64_t end) __attribute__((always_inline)) {
    const Buffer<T> query(kTopkRows * m.width), scores(kTopkRows * stride), weights(k + vector);
    const Buffer<Int> keys(kTopkRows * k), pool_keys(tile + k + vector);
    const Buffer<int32_t> pool_slots(tile + k + 1), block_list(tile / SelectScratch<T, Isa>::kBlock + 2);
    const SelectScratch<T, Isa> scratch{pool_keys.get(), pool_slots.get(), block_list.get()};
    Kept<T, Isa> kept[kTopkRows];
    for (int64_t item = begin; item < end; ++item) {
      const int64_t head = item / blocks, row0 = item % blocks * kTopkRows;
      const int64_t rows = std::min(kTopkRows, m.rows - row0), padded = round_up(rows, kMicroRows);
      copy_rows(m.query, head, row0, rows, padded, m.width, query.get());
      for (int64_t i = 0; i < rows; ++i)
        kept[i] = {keys.get() + i * k, indices + ((row0 + i) * m.heads + head) * k, 0, 0};
      for (int64_t slot0 = 0; slot0 < m.slots; slot0 += tile) {
        const int64_t n = std::min(tile, m.slots - slot0);
        gemm<T, Isa, Store::kScaled>(
            padded, round_up(n, kPanel<T, Isa>), m.width, query.get(), m.width, panels.at(head, slot0),
            panels.stride(), m.scale, scores.get(), stride);
        for (int64_t i = 0; i < rows; ++i)
          select_tile<T, Isa>(scores.get() + i * stride, n, slot0, k, scratch, kept[i]);
      }
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t at = (row0 + i) * m.heads + head;
        for (int64_t j = 0; j < k; ++j) weights.get()[j] = ScoreKey<T, Isa>::score(kept[i].keys[j]);
        logsumexp[at] = softmax<T, Isa>(weights.get(), k);
        if (m.dropout.active()) drop_weights(m.dropout, head, row0 + i, kept[i].slots, k, weights.get());
        add_rows<T, Isa>(
            weights.get(), m.value.at(0, head), m.value.row_stride, kept[i].slots, k, m.width,
            output + at * m.width);
      }
    }
  });
}

// Which rows chose a slot: the entries of slot n of head h are [offset[h * N + n], offset[h * N + n + 1]), by row.
template <class T>
struct ReverseIndex {
  Buffer<int64_t> offset;
  Buffer<int32_t> row;
  Buffer<T> weight, grad_score;

  ReverseIndex(int64_t slots, int64_t entries)
      : offset(slots + 1), row(entries), weight(entries), grad_score(entries) {}
};

// Counting sort of every head's (R, K) entries by slot. weight and grad_score (or null) are [head][row][K].
template <class T, class Isa>
void fill_reverse_index(
    const MemoryProblem<T>& m, int64_t k, const int32_t* indices, const T* weight, const T* grad_score,
    const ReverseIndex<T>& index) {
  index.offset.get()[m.heads * m.slots] = m.heads * m.rows * k;
  parallel<Isa>(m.heads, [&](int64_t begin, int64_t end) __attribute__((always_inline)) {
    const Buffer<int64_t> next(m.slots);
    for (int64_t head = begin; head < end; ++head) {
      std::fill_n(next.get(), m.slots, 0);
      for (int64_t row = 0; row < m.rows; ++row)
        for (int64_t j = 0; j < k; ++j) ++next.get()[indices[(row * m.heads + head) * k + j]];
      int64_t total = head * m.rows * k;
      for (int64_t slot = 0; slot < m.slots; ++slot) {
        const int64_t count = next.get()[slot];
        index.offset.get()[head * m.slots + slot] = next.get()[slot] = total;
        total += count;
      }
      for (int64_t row = 0; row < m.rows; ++row)
        for (int64_t j = 0; j < k; ++j) {
          const int64_t to = next.get()[indices[(row * m.heads + head) * k + j]]++;
          const int64_t from = (head * m.rows + row) * k + j;
          index.row.get()[to] = static_cast<int32_t>(row);
          index.weight.get()[to] = weight[from];
          if (grad_score) index.grad_score.get()[to] = grad_score[from];
        }
    }
  });
}

// The row-owned half: the gradient of the query, and what the slots need: weight (after dropout) and grad_score (with
// the scale in it), both [head][row][K].
template <class T, class Isa>
void topk_backward_rows(
    const MemoryProblem<T>& m, int64_t k, const MemoryGradients<T>& g, const int32_t* indices, T* weight,
    T* grad_score) {
  using S = Simd<T, Isa>;
  const bool need_scores = g.query || g.key;
  parallel<Isa>(m.heads * m.rows, [&](int64_t begin, int64_t end) __attribute__((always_inline)) {
    const Buffer<T> p(k + S::kWidth), kept(k), grad(k);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t head = item / m.rows, row = item % m.rows, at = row * m.heads + head;
      const int32_t* slots = indices + at * k;
      // The softmax anew, not exp(score - logsumexp): products summed in another order than the forward's would
      // leave weights that do not quite add up to 1, and the difference below is small against its terms.
      dot_rows<T, Isa>(
          m.query.at(row, head), m.key.at(0, head), m.key.row_stride, slots, k, m.width, m.scale, p.get());
      softmax<T, Isa>(p.get(), k);
      std::fill_n(kept.get(), k, T(1));
      if (m.dropout.active()) drop_weights(m.dropout, head, row, slots, k, kept.get());
      for (int64_t j = 0; j < k; ++j) weight[item * k + j] = p.get()[j] * kept.get()[j];
      if (!need_scores) continue;
      dot_rows<T, Isa>(
          g.grad_output.at(row, head), m.value.at(0, head), m.value.row_stride, slots, k, m.width, T(1), grad.get());
      T mean = 0;
      for (int64_t j = 0; j < k; ++j) {
        grad.get()[j] *= kept.get()[j];
        mean += p.get()[j] * grad.get()[j];
      }
      for (int64_t j = 0; j < k; ++j) grad_score[item * k + j] = m.scale * p.get()[j] * (grad.get()[j] - mean);
      if (g.query)
        add_rows<T, Isa>(
            grad_score + item * k, m.key.at(0, head), m.key.row_stride, slots, k, m.width,
            g.query + at * m.width);
    }
  });
}

// The slot-owned half. Slices hold the same number of entries, since a few slots may be chosen by most rows.
template <class T, class Isa>
void topk_backward_slots(
    const MemoryProblem<T>& m, int64_t k, const MemoryGradients<T>& g, const ReverseIndex<T>& index) {
  constexpr int64_t kSlices = 256;
  const int64_t entries = m.heads * m.rows * k, slots = m.heads * m.slots;
  const int64_t* offset = index.offset.get();
  const auto first_slot = [&](int64_t slice) {
    return slice == kSlices ? slots : std::lower_bound(offset, offset + slots, slice * entries / kSlices) - offset;
  };
  parallel<Isa>(kSlices, [&](int64_t begin, int64_t end) __attribute__((always_inline)) {
    for (int64_t i = first_slot(begin), last = first_slot(end); i < last; ++i) {
      const int64_t head = i / m.slots, at = (i % m.slots * m.heads + head) * m.width;
      const int64_t from = offset[i], count = offset[i + 1] - from;
      const int32_t* rows = index.row.get() + from;
      if (g.key)
        add_rows<T, Isa>(
            index.grad_score.get() + from, m.query.at(0, head), m.query.row_stride, rows, count, m.width, g.key + at);
      if (g.value)
        add_rows<T, Isa>(
            index.weight.get() + from, g.grad_output.at(0, head), g.grad_output.row_stride, rows, count, m.width,
            g.value + at);
    }
  });
}

template <class T, class Isa>
void topk_backward(
    const MemoryProblem<T>& m, int64_t k, const MemoryGradients<T>& g, const int32_t* indices) {
  const int64_t entries = m.heads * m.rows * k;
  const Buffer<T> weight(entries), grad_score(g.query || g.key ? entries : 0);
  topk_backward_rows<T, Isa>(m, k, g, indices, weight.get(), grad_score.get());
  if (!g.key && !g.value) return;
  const ReverseIndex<T> index(m.heads * m.slots, entries);
  fill_reverse_index<T, Isa>(m, k, indices, weight.get(), g.key ? grad_score.get() : nullptr, index);
  topk_backward_slots<T, Isa>(m, k, g, index);
}

}  // namespace mpma::cpu
