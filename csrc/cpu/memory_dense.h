// Memory attention over every slot of the bank: a running softmax over tiles of the bank, as in FlashAttention (Dao et
// al., NeurIPS 2022). The backward walks the same tiles twice, once owned by rows for the gradient of the query and
// once owned by slots for those of the bank, so that no two threads write to one place.
#pragma once

#include <algorithm>

#include "cpu/memory_problem.h"

namespace mpma::cpu {

constexpr int64_t kDenseBlock = 48, kDenseTile = 256;  // both multiples of 4, for Philox, and of every panel

// What dropout makes of the weights of rows [row0, row0 + rows) on slots [slot0, slot0 + slots):
// out[row * row_step + slot * slot_step].
template <class T>
MPMA_INLINE void dropout_tile(
    const Dropout& dropout, int64_t head, int64_t row0, int64_t rows, int64_t slot0, int64_t slots,
    int64_t row_step, int64_t slot_step, T* out) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < slots; ++j) {
      // slot0 is a multiple of 4, so a group of four words never straddles two tiles.
      const auto words = dropout.memory_words((slot0 + j) / 4, head, row0 + i);
      for (const int64_t last = std::min(j + 4, slots); j < last; ++j)
        out[i * row_step + j * slot_step] = words.word[j % 4] < dropout.threshold ? T(0) : T(dropout.kept);
      --j;
    }
}

// output (R, H, D), logsumexp (R, H), contiguous.
template <class T, class Isa>
void dense_forward(const MemoryProblem<T>& m, T* output, T* logsumexp) {
  using S = Simd<T, Isa>;
  const TransposedPanels<T, Isa> keys(m.key, m.heads, m.slots, m.width);
  const ColumnPanels<T, Isa> values(m.value, m.heads, m.slots, m.width);
  const int64_t blocks = round_up(m.rows, kDenseBlock) / kDenseBlock, columns = round_up(m.width, kPanel<T, Isa>);
  constexpr int64_t kStride = kDenseTile + 16;
  parallel<Isa>(m.heads * blocks, [&](int64_t begin, int64_t end) __attribute__((always_inline)) {
    const Buffer<T> query(kDenseBlock * m.width), scores(kDenseBlock * kStride), sums(kDenseBlock * columns);
    const Buffer<T> kept(kDenseBlock * kStride);
    T top[kDenseBlock], total[kDenseBlock];
    for (int64_t item = begin; item < end; ++item) {
      const int64_t head = item / blocks, row0 = item % blocks * kDenseBlock;
      const int64_t rows = std::min(kDenseBlock, m.rows - row0), padded = round_up(rows, kMicroRows);
      copy_rows(m.query, head, row0, rows, padded, m.width, query.get());
      std::fill_n(sums.get(), padded * columns, T(0));
      std::fill_n(top, rows, -std::numeric_limits<T>::infinity());
      std::fill_n(total, rows, T(0));
      for (int64_t slot0 = 0; slot0 < m.slots; slot0 += kDenseTile) {
        const int64_t n = std::min(kDenseTile, m.slots - slot0);
        gemm<T, Isa, Store::kScaled>(
            padded, round_up(n, kPanel<T, Isa>), m.width, query.get(), m.width, keys.at(head, slot0), keys.stride(),
            m.scale, scores.get(), kStride);
        if (m.dropout.active())
          dropout_tile(m.dropout, head, row0, rows, slot0, n, kStride, 1, kept.get());
        for (int64_t i = 0; i < rows; ++i) {
          T* row = scores.get() + i * kStride;
          for (int64_t j = n; j % S::kWidth != 0; ++j) row[j] = -std::numeric_limits<T>::infinity();
          auto high = S::broadcast(top[i]);
          for (int64_t j = 0; j < n; j += S::kWidth) high = S::maximum(S::load(row + j), high);
          T now = high[0];
          for (int j = 1; j < S::kWidth; ++j) now = high[j] > now ? high[j] : now;
          // Nothing but -inf so far: any finite shift gives the weights 0 that they should have.
          const T shift = now == -std::numeric_limits<T>::infinity() ? T(0) : now;
          const T shrink = std::exp(top[i] - shift);
          typename S::Vec added = {};
          for (int64_t j = 0; j < n; j += S::kWidth) {
            const auto e = S::exp(S::load(row + j) - shift);
            S::store(row + j, m.dropout.active() ? e * S::load(kept.get() + i * kStride + j) : e);
            added += e;
          }
          total[i] = total[i] * shrink + S::sum(added);
          top[i] = now;
          T* sum = sums.get() + i * columns;
          for (int64_t d = 0; d < columns; d += S::kWidth) S::store(sum + d, S::load(sum + d) * shrink);
        }
        gemm<T, Isa, Store::kAdd>(
            padded, columns, n, scores.get(), kStride, values.at(head, slot0), values.stride(), T(1), sums.get(),
            columns);
      }
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t at = (row0 + i) * m.heads + head;
        for (int64_t d = 0; d < m.width; ++d) output[at * m.width + d] = sums.get()[i * columns + d] / total[i];
        logsumexp[at] = top[i] + std::log(total[i]);
      }
    }
  });
}

// One pass of the dense backward: blocks of `mine` (rows or slots) times tiles of `other` (slots or rows). The scores of
// a tile are <mine.score, other.score>, the gradients of its weights <mine.grad, other.grad>.
template <class T>
struct DensePass {
  View<T> mine_score, other_score, mine_grad, other_grad;
  int64_t mine, other;
  bool mine_is_slots;
  T* grad_of_score;   // for mine_score, from other_score; null where not needed
  T* grad_of_weight;  // for mine_grad, from other_grad (the value, owned by slots); null where not needed
};

template <class T, class Isa>
void dense_backward_pass(
    const MemoryProblem<T>& m, const DensePass<T>& pass, const T* logsumexp, const T* delta) {
  using S = Simd<T, Isa>;
  const TransposedPanels<T, Isa> scores_of(pass.other_score, m.heads, pass.other, m.width);
  const TransposedPanels<T, Isa> grads_of(pass.other_grad, m.heads, pass.grad_of_score ? pass.other : 0, m.width);
  const ColumnPanels<T, Isa> score_rows(pass.other_score, m.heads, pass.grad_of_score ? pass.other : 0, m.width);
  const ColumnPanels<T, Isa> grad_rows(pass.other_grad, m.heads, pass.grad_of_weight ? pass.other : 0, m.width);
  const int64_t blocks = round_up(pass.mine, kDenseBlock) / kDenseBlock, columns = round_up(m.width, kPanel<T, Isa>);
  constexpr int64_t kStride = kDenseTile + 16;
  parallel<Isa>(m.heads * blocks, [&](int64_t begin, int64_t end) __attribute__((always_inline)) {
    const Buffer<T> left(kDenseBlock * m.width), left_grad(kDenseBlock * m.width);
    const Buffer<T> weights(kDenseBlock * kStride), grads(kDenseBlock * kStride), kept(kDenseBlock * kStride);
    const Buffer<T> score_sums(kDenseBlock * columns), weight_sums(kDenseBlock * columns);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t head = item / blocks, mine0 = item % blocks * kDenseBlock;
      const int64_t mine = std::min(kDenseBlock, pass.mine - mine0), padded = round_up(mine, kMicroRows);
      copy_rows(pass.mine_score, head, mine0, mine, padded, m.width, left.get());
      copy_rows(pass.mine_grad, head, mine0, mine, padded, m.width, left_grad.get());
      std::fill_n(score_sums.get(), padded * columns, T(0));
      std::fill_n(weight_sums.get(), padded * columns, T(0));
      for (int64_t other0 = 0; other0 < pass.other; other0 += kDenseTile) {
        const int64_t n = std::min(kDenseTile, pass.other - other0), wide = round_up(n, kPanel<T, Isa>);
        gemm<T, Isa, Store::kScaled>(
            padded, wide, m.width, left.get(), m.width, scores_of.at(head, other0), scores_of.stride(), m.scale,
            weights.get(), kStride);
        if (pass.grad_of_score)
          gemm<T, Isa, Store::kScaled>(
              padded, wide, m.width, left_grad.get(), m.width, grads_of.at(head, other0), grads_of.stride(), T(1),
              grads.get(), kStride);
        if (m.dropout.active() && pass.mine_is_slots)
          dropout_tile(m.dropout, head, other0, n, mine0, mine, 1, kStride, kept.get());
        else if (m.dropout.active())
          dropout_tile(m.dropout, head, mine0, mine, other0, n, kStride, 1, kept.get());
        // logsumexp and delta belong to rows of the query: one a line, or one a column where lines are slots. Both
        // have a vector of padding at their end.
        const T *lse = logsumexp + head * m.rows, *dot = delta + head * m.rows;
        for (int64_t i = 0; i < mine; ++i)
          for (int64_t j = 0; j < n; j += S::kWidth) {
            const int64_t at = i * kStride + j, row = pass.mine_is_slots ? other0 + j : mine0 + i;
            const auto shift = pass.mine_is_slots ? S::load(lse + row) : S::broadcast(lse[row]);
            const auto p = S::exp(S::load(weights.get() + at) - shift);
            const auto keep = m.dropout.active() ? S::load(kept.get() + at) : S::broadcast(T(1));
            S::store(weights.get() + at, p * keep);
            if (!pass.grad_of_score) continue;
            const auto mean = pass.mine_is_slots ? S::load(dot + row) : S::broadcast(dot[row]);
            S::store(grads.get() + at, (keep * S::load(grads.get() + at) - mean) * p * m.scale);
          }
        if (pass.grad_of_score)
          gemm<T, Isa, Store::kAdd>(
              padded, columns, n, grads.get(), kStride, score_rows.at(head, other0), score_rows.stride(), T(1),
              score_sums.get(), columns);
        if (pass.grad_of_weight)
          gemm<T, Isa, Store::kAdd>(
              padded, columns, n, weights.get(), kStride, grad_rows.at(head, other0), grad_rows.stride(), T(1),
              weight_sums.get(), columns);
      }
      for (int64_t i = 0; i < mine; ++i) {
        const int64_t at = ((mine0 + i) * m.heads + head) * m.width;
        if (pass.grad_of_score)
          std::memcpy(pass.grad_of_score + at, score_sums.get() + i * columns, m.width * sizeof(T));
        if (pass.grad_of_weight)
          std::memcpy(pass.grad_of_weight + at, weight_sums.get() + i * columns, m.width * sizeof(T));
      }
    }
  });
}

// output is the forward's (R, H, D): <grad_output, output> is the mean of the weights' gradients.
template <class T, class Isa>
void dense_backward(const MemoryProblem<T>& m, const MemoryGradients<T>& g, const View<T>& output) {
  const int64_t padding = Simd<T, Isa>::kWidth;
  const Buffer<T> logsumexp(m.heads * m.rows + padding), delta(m.heads * m.rows + padding);
  std::fill_n(logsumexp.get() + m.heads * m.rows, padding, T(0));
  std::fill_n(delta.get() + m.heads * m.rows, padding, T(0));
  parallel<Isa>(m.heads * m.rows, [&](int64_t begin, int64_t end) __attribute__((always_inline)) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t head = i / m.rows, row = i % m.rows;
      const T *grad = g.grad_output.at(row, head), *out = output.at(row, head);
      logsumexp.get()[i] = g.logsumexp[row * m.heads + head];
      T sum = 0;
      for (int64_t d = 0; d < m.width; ++d) sum += grad[d] * out[d];
      delta.get()[i] = sum;
    }
  });
  if (g.query)
    dense_backward_pass<T, Isa>(
        m, {m.query, m.key, g.grad_output, m.value, m.rows, m.slots, false, g.query, nullptr}, logsumexp.get(),
        delta.get());
  if (g.key || g.value)
    dense_backward_pass<T, Isa>(
        m, {m.key, m.query, m.value, g.grad_output, m.slots, m.rows, true, g.key, g.value}, logsumexp.get(),
        delta.get());
}

}  // namespace mpma::cpu
