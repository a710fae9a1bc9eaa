// Memory attention over the K best slots of a row. Included by foreach_isa.h.
//
// Forward: blocks of rows times tiles of the bank into a bounded buffer of scores, selection, softmax, gather.
// Backward: weights are rebuilt from the kept indices. The gradient of the query is summed by its row; those of the
// bank by their slot, through a reverse index, so that no two threads write to one place and the order of every
// sum is fixed.

namespace mpma::MPMA_ISA::memory {

// 24 rows of 2048 float32 scores are 192 KB, which stays in a second-level cache of 512 KB.
constexpr int64_t kTopkRows = 24, kTopkTile = 2048;

// weights[j] is multiplied with what dropout makes of slot slots[j].
template <class T>
inline void drop_weights(
    const Dropout& dropout, int64_t head, int64_t row, const int32_t* slots, int64_t count, T* weights) {
  for (int64_t j = 0; j < count; ++j) {
    const uint32_t word = dropout.memory_words(slots[j] / 4, head, row).word[slots[j] % 4];
    weights[j] = word < dropout.threshold ? T(0) : weights[j] * T(dropout.kept);
  }
}

// Scores to softmax weights in place, the log-sum-exp returned; weights is writable up to the next whole vector.
template <class T>
inline T softmax(T* weights, int64_t count) {
  T top = weights[0];
  for (int64_t j = 1; j < count; ++j) top = weights[j] > top ? weights[j] : top;
  for (int64_t j = count; j % kWidth<T> != 0; ++j) weights[j] = -std::numeric_limits<T>::infinity();
  T sum = 0;
  for (int64_t start = 0; start < count; start += kRun) {
    Vector<T> sums = {};
    for (int64_t j = start, end = std::min(count, start + kRun); j < end; j += kWidth<T>) {
      const Vector<T> e = exp(load(weights + j) - top);
      store(weights + j, e);
      sums += e;
    }
    sum += sum_lanes<T>(sums);
  }
  for (int64_t j = 0; j < count; j += kWidth<T>) store(weights + j, load(weights + j) / sum);
  return top + std::log(sum);
}

// output (R, H, D), logsumexp (R, H), indices (R, H, K), all contiguous.
template <class T>
void topk_forward(const MemoryProblem<T>& m, int64_t k, T* output, T* logsumexp, int32_t* indices) {
  const RowPanels<T> panels(m.key, m.heads, m.slots, m.width);
  const int64_t blocks = round_up(m.rows, kTopkRows) / kTopkRows, tile = std::min(m.slots, kTopkTile);
  const int64_t stride = row_distance(round_up(tile, kPanel<T>));
  torch::stable::parallel_for(0, m.heads * blocks, 1, [&](int64_t begin, int64_t end) {
    const cpu::Buffer<T> query(kTopkRows * m.width), scores(kTopkRows * stride), weights(k + kWidth<T>);
    const cpu::Buffer<Integer<T>> keys(kTopkRows * k);
    const SelectScratch<T> scratch(tile, k);
    Kept<T> kept[kTopkRows];
    for (int64_t item = begin; item < end; ++item) {
      const int64_t head = item / blocks, row0 = item % blocks * kTopkRows;
      const int64_t rows = std::min(kTopkRows, m.rows - row0);
      copy_rows(m.query, head, row0, rows, m.width, query.get(), m.width);
      for (int64_t i = 0; i < rows; ++i)
        kept[i] = {keys.get() + i * k, indices + ((row0 + i) * m.heads + head) * k, 0, 0};
      for (int64_t slot0 = 0; slot0 < m.slots; slot0 += tile) {
        const int64_t n = std::min(tile, m.slots - slot0);
        panels.multiply(query.get(), m.width, rows, head, slot0, n, scores.get(), stride);
        for (int64_t i = 0; i < rows; ++i)
          select_tile<T>(scores.get() + i * stride, n, slot0, k, m.scale, scratch, kept[i]);
      }
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t at = (row0 + i) * m.heads + head;
        if (i + 1 < rows) prefetch_rows(m.value.at(0, head), m.value.row_stride, kept[i + 1].slots, k, m.width);
        for (int64_t j = 0; j < k; ++j) weights.get()[j] = score_of<T>(kept[i].keys[j]);
        logsumexp[at] = softmax(weights.get(), k);
        if (m.dropout.active()) drop_weights(m.dropout, head, row0 + i, kept[i].slots, k, weights.get());
        add_rows<T>(
            weights.get(), m.value.at(0, head), m.value.row_stride, kept[i].slots, k, m.width, output + at * m.width);
      }
    }
  });
}

// Which rows chose a slot: the entries of slot n of head h are [offset[h * N + n], offset[h * N + n + 1]), by row.
template <class T>
struct ReverseIndex {
  cpu::Buffer<int64_t> offset;
  cpu::Buffer<int32_t> row;
  cpu::Buffer<T> weight, grad_score;

  ReverseIndex(int64_t slots, int64_t entries)
      : offset(slots + 1), row(entries), weight(entries), grad_score(entries) {}
};

// A counting sort of every head's (R, K) entries by slot. weight and grad_score (or null) are [head][row][K].
template <class T>
void fill_reverse_index(
    const MemoryProblem<T>& m, int64_t k, const int32_t* indices, const T* weight, const T* grad_score,
    const ReverseIndex<T>& index) {
  index.offset.get()[m.heads * m.slots] = m.heads * m.rows * k;
  torch::stable::parallel_for(0, m.heads, 1, [&](int64_t begin, int64_t end) {
    const cpu::Buffer<int64_t> next(m.slots);
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
template <class T>
void topk_backward_rows(
    const MemoryProblem<T>& m, int64_t k, const MemoryGradients<T>& g, const int32_t* indices, T* weight,
    T* grad_score) {
  const bool need_scores = g.query || g.key;
  torch::stable::parallel_for(0, m.heads * m.rows, 1, [&](int64_t begin, int64_t end) {
    const cpu::Buffer<T> p(k + kWidth<T>), kept(k), grad(k);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t head = item / m.rows, row = item % m.rows, at = row * m.heads + head;
      const int32_t* slots = indices + at * k;
      if (row + 1 < m.rows) {
        prefetch_rows(m.key.at(0, head), m.key.row_stride, slots + m.heads * k, k, m.width);
        if (need_scores) prefetch_rows(m.value.at(0, head), m.value.row_stride, slots + m.heads * k, k, m.width);
      }
      // The softmax anew, not exp(score - logsumexp): products summed in another order than the forward's would
      // leave weights that do not quite add up to 1, and the difference below is small against its terms.
      dot_rows<T>(
          m.query.at(row, head), m.key.at(0, head), m.key.row_stride, slots, k, m.width, m.scale, p.get());
      softmax(p.get(), k);
      std::fill_n(kept.get(), k, T(1));
      if (m.dropout.active()) drop_weights(m.dropout, head, row, slots, k, kept.get());
      for (int64_t j = 0; j < k; ++j) weight[item * k + j] = p.get()[j] * kept.get()[j];
      if (!need_scores) continue;
      dot_rows<T>(
          g.grad_output.at(row, head), m.value.at(0, head), m.value.row_stride, slots, k, m.width, T(1), grad.get());
      T mean = 0;
      for (int64_t j = 0; j < k; ++j) {
        grad.get()[j] *= kept.get()[j];
        mean += p.get()[j] * grad.get()[j];
      }
      for (int64_t j = 0; j < k; ++j) grad_score[item * k + j] = m.scale * p.get()[j] * (grad.get()[j] - mean);
      if (g.query)
        add_rows<T>(
            grad_score + item * k, m.key.at(0, head), m.key.row_stride, slots, k, m.width,
            g.query + at * m.width);
    }
  });
}

// The slot-owned half. Slices hold the same number of entries, since a few slots may be chosen by most rows.
template <class T>
void topk_backward_slots(
    const MemoryProblem<T>& m, int64_t k, const MemoryGradients<T>& g, const ReverseIndex<T>& index) {
  constexpr int64_t kSlices = 256;
  const int64_t entries = m.heads * m.rows * k, slots = m.heads * m.slots;
  const int64_t* offset = index.offset.get();
  const auto first_slot = [&](int64_t slice) {
    return slice == kSlices ? slots : std::lower_bound(offset, offset + slots, slice * entries / kSlices) - offset;
  };
  torch::stable::parallel_for(0, kSlices, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = first_slot(begin), last = first_slot(end); i < last; ++i) {
      const int64_t head = i / m.slots, at = (i % m.slots * m.heads + head) * m.width;
      const int64_t from = offset[i], count = offset[i + 1] - from;
      const int32_t* rows = index.row.get() + from;
      if (g.key)
        add_rows<T>(
            index.grad_score.get() + from, m.query.at(0, head), m.query.row_stride, rows, count, m.width, g.key + at);
      if (g.value)
        add_rows<T>(
            index.weight.get() + from, g.grad_output.at(0, head), g.grad_output.row_stride, rows, count, m.width,
            g.value + at);
    }
  });
}

template <class T>
void topk_backward(
    const MemoryProblem<T>& m, int64_t k, const MemoryGradients<T>& g, const int32_t* indices) {
  const int64_t entries = m.heads * m.rows * k;
  const cpu::Buffer<T> weight(entries), grad_score(g.query || g.key ? entries : 0);
  topk_backward_rows<T>(m, k, g, indices, weight.get(), grad_score.get());
  if (!g.key && !g.value) return;
  const ReverseIndex<T> index(m.heads * m.slots, entries);
  fill_reverse_index<T>(m, k, indices, weight.get(), g.key ? grad_score.get() : nullptr, index);
  topk_backward_slots<T>(m, k, g, index);
}

}  // namespace mpma::MPMA_ISA::memory
