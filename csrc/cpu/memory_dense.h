// Memory attention over every slot of the bank: a running softmax over tiles of the bank, as in FlashAttention (Dao et
// al., NeurIPS 2022). The backward walks the tiles twice, once owned by rows for the gradient of the query and once
// owned by slots for those of the bank, so that no two threads write to one place. Included by foreach_isa.h.

namespace mpma::MPMA_ISA::memory {

constexpr int64_t kDenseBlock = 48, kDenseTile = 256;  // both multiples of 4, for Philox, and of every panel

// What dropout makes of the weights of rows [row0, row0 + rows) on slots [slot0, slot0 + slots):
// out[row * row_step + slot * slot_step].
template <class T>
inline void dropout_tile(
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
template <class T>
void dense_forward(const MemoryProblem<T>& m, T* output, T* logsumexp) {
  constexpr T kNothing = -std::numeric_limits<T>::infinity();
  const RowPanels<T> keys(m.key, m.heads, m.slots, m.width);
  const ColumnPanels<T> values(m.value, m.heads, m.slots, m.width);
  const int64_t blocks = round_up(m.rows, kDenseBlock) / kDenseBlock, columns = values.columns;
  const int64_t stride = row_distance(kDenseTile);
  torch::stable::parallel_for(0, m.heads * blocks, 1, [&](int64_t begin, int64_t end) {
    const cpu::Buffer<T> query(kDenseBlock * m.width), sums(kDenseBlock * columns), added(kDenseBlock * columns);
    const cpu::Buffer<T> scores(kDenseBlock * stride), kept(kDenseBlock * stride);
    T top[kDenseBlock], total[kDenseBlock], shrink[kDenseBlock];
    for (int64_t item = begin; item < end; ++item) {
      const int64_t head = item / blocks, row0 = item % blocks * kDenseBlock;
      const int64_t rows = std::min(kDenseBlock, m.rows - row0);
      copy_rows(m.query, head, row0, rows, m.width, query.get());
      std::fill_n(sums.get(), rows * columns, T(0));
      std::fill_n(top, rows, kNothing);
      std::fill_n(total, rows, T(0));
      for (int64_t slot0 = 0; slot0 < m.slots; slot0 += kDenseTile) {
        const int64_t n = std::min(kDenseTile, m.slots - slot0);
        keys.multiply(query.get(), rows, head, slot0, n, scores.get(), stride);
        if (m.dropout.active()) dropout_tile(m.dropout, head, row0, rows, slot0, n, stride, 1, kept.get());
        for (int64_t i = 0; i < rows; ++i) {
          T* row = scores.get() + i * stride;
          Vector<T> high = Vector<T>{} + top[i];
          for (int64_t j = 0; j < n; j += kWidth<T>) {
            store(row + j, load(row + j) * m.scale);
            for (int64_t beyond = n; beyond < j + kWidth<T>; ++beyond) row[beyond] = kNothing;
            const Vector<T> x = load(row + j);
            high = x > high ? x : high;
          }
          T now = high[0];
          for (int j = 1; j < kWidth<T>; ++j) now = high[j] > now ? high[j] : now;
          // Nothing but -inf so far: any finite shift gives the weights 0 that they should have.
          const T shift = now == kNothing ? T(0) : now;
          shrink[i] = std::exp(top[i] - shift);
          Vector<T> total_here = {};
          for (int64_t j = 0; j < n; j += kWidth<T>) {
            const Vector<T> e = exp(load(row + j) - shift);
            store(row + j, m.dropout.active() ? e * load(kept.get() + i * stride + j) : e);
            total_here += e;
          }
          total[i] = total[i] * shrink[i] + sum_lanes<T>(total_here);
          top[i] = now;
        }
        values.multiply(scores.get(), stride, rows, head, slot0, n, added.get());
        for (int64_t i = 0; i < rows; ++i)
          add_tile(sums.get() + i * columns, added.get() + i * columns, columns, shrink[i]);
      }
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t at = (row0 + i) * m.heads + head;
        for (int64_t d = 0; d < m.width; ++d) output[at * m.width + d] = sums.get()[i * columns + d] / total[i];
        logsumexp[at] = top[i] + std::log(total[i]);
      }
    }
  });
}

// One pass of the dense backward: blocks of "mine" (rows or slots) times tiles of "other" (slots or rows). Scores are
// <mine.score, other.score>, gradients of the weights <mine.grad, other.grad>.
template <class T>
struct DensePass {
  MemoryView<T> mine_score, mine_grad, other_score, other_grad;
  int64_t mine, other;
  bool by_slot;       // mine are the slots
  T* grad_of_score;   // the gradient of mine.score (query or key), null where nobody needs it
  T* grad_of_weight;  // the gradient of mine.grad (value), null where nobody needs it
};

// logsumexp and mean, <grad_output, output>, are [head][row] and readable for a vector more.
template <class T>
void dense_backward_pass(const MemoryProblem<T>& m, const DensePass<T>& pass, const T* logsumexp, const T* mean) {
  const int64_t scored = pass.grad_of_score ? pass.other : 0, weighted = pass.grad_of_weight ? pass.other : 0;
  const RowPanels<T> scores_of(pass.other_score, m.heads, pass.other, m.width);
  const RowPanels<T> grads_of(pass.other_grad, m.heads, scored, m.width);
  const ColumnPanels<T> score_rows(pass.other_score, m.heads, scored, m.width);
  const ColumnPanels<T> grad_rows(pass.other_grad, m.heads, weighted, m.width);
  const int64_t blocks = round_up(pass.mine, kDenseBlock) / kDenseBlock, columns = round_up(m.width, kPanel<T>);
  const int64_t stride = row_distance(kDenseTile);
  torch::stable::parallel_for(0, m.heads * blocks, 1, [&](int64_t begin, int64_t end) {
    const cpu::Buffer<T> left(kDenseBlock * m.width), left_grad(kDenseBlock * m.width);
    const cpu::Buffer<T> weights(kDenseBlock * stride), grads(kDenseBlock * stride), kept(kDenseBlock * stride);
    const cpu::Buffer<T> score_sums(kDenseBlock * columns), weight_sums(kDenseBlock * columns);
    const cpu::Buffer<T> added(kDenseBlock * columns);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t head = item / blocks, mine0 = item % blocks * kDenseBlock;
      const int64_t mine = std::min(kDenseBlock, pass.mine - mine0);
      const T *lse = logsumexp + head * m.rows, *head_mean = mean + head * m.rows;
      copy_rows(pass.mine_score, head, mine0, mine, m.width, left.get());
      copy_rows(pass.mine_grad, head, mine0, mine, m.width, left_grad.get());
      std::fill_n(score_sums.get(), mine * columns, T(0));
      std::fill_n(weight_sums.get(), mine * columns, T(0));
      for (int64_t other0 = 0; other0 < pass.other; other0 += kDenseTile) {
        const int64_t n = std::min(kDenseTile, pass.other - other0);
        scores_of.multiply(left.get(), mine, head, other0, n, weights.get(), stride);
        if (scored) grads_of.multiply(left_grad.get(), mine, head, other0, n, grads.get(), stride);
        if (m.dropout.active() && pass.by_slot)
          dropout_tile(m.dropout, head, other0, n, mine0, mine, 1, stride, kept.get());
        else if (m.dropout.active())
          dropout_tile(m.dropout, head, mine0, mine, other0, n, stride, 1, kept.get());
        for (int64_t i = 0; i < mine; ++i)
          for (int64_t j = 0; j < n; j += kWidth<T>) {
            // Statistics belong to rows of the query: a line of the tile has one, or each of its columns.
            const int64_t at = i * stride + j, row = pass.by_slot ? other0 + j : mine0 + i;
            const Vector<T> shift = pass.by_slot ? load(lse + row) : Vector<T>{} + lse[row];
            const Vector<T> p = exp(load(weights.get() + at) * m.scale - shift);
            const Vector<T> keep = m.dropout.active() ? load(kept.get() + at) : Vector<T>{} + T(1);
            store(weights.get() + at, p * keep);
            if (!scored) continue;
            const Vector<T> less = pass.by_slot ? load(head_mean + row) : Vector<T>{} + head_mean[row];
            store(grads.get() + at, (keep * load(grads.get() + at) - less) * p * m.scale);
          }
        if (scored) {
          score_rows.multiply(grads.get(), stride, mine, head, other0, n, added.get());
          add_tile(score_sums.get(), added.get(), mine * columns, T(1));
        }
        if (weighted) {
          grad_rows.multiply(weights.get(), stride, mine, head, other0, n, added.get());
          add_tile(weight_sums.get(), added.get(), mine * columns, T(1));
        }
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

template <class T>
void dense_backward(const MemoryProblem<T>& m, const MemoryGradients<T>& g) {
  const int64_t statistics = m.heads * m.rows;
  const cpu::Buffer<T> logsumexp(statistics + kWidth<T>), mean(statistics + kWidth<T>);
  for (int64_t i = 0; i < statistics; ++i) {
    const int64_t head = i / m.rows, row = i % m.rows;
    const T *grad = g.grad_output.at(row, head), *output = g.output.at(row, head);
    T sum = 0;
    for (int64_t d = 0; d < m.width; ++d) sum += grad[d] * output[d];
    mean.get()[i] = sum;
    logsumexp.get()[i] = g.logsumexp[row * m.heads + head];
  }
  if (g.query)
    dense_backward_pass<T>(
        m, {m.query, g.grad_output, m.key, m.value, m.rows, m.slots, false, g.query, nullptr}, logsumexp.get(),
        mean.get());
  if (g.key || g.value)
    dense_backward_pass<T>(
        m, {m.key, m.value, m.query, g.grad_output, m.slots, m.rows, true, g.key, g.value}, logsumexp.get(),
        mean.get());
}

}  // namespace mpma::MPMA_ISA::memory
