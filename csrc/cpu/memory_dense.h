// Memory attention over every slot of the bank: a running softmax over tiles of the bank, as in FlashAttention (Dao et
// al., NeurIPS 2022), forward and backward. Included by foreach_isa.h.

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
    const cpu::Buffer<T> query(kDenseBlock * m.width), sums(kDenseBlock * columns);
    const cpu::Buffer<T> scores(kDenseBlock * stride), kept(kDenseBlock * stride);
    T top[kDenseBlock], total[kDenseBlock];
    for (int64_t item = begin; item < end; ++item) {
      const int64_t head = item / blocks, row0 = item % blocks * kDenseBlock;
      const int64_t rows = std::min(kDenseBlock, m.rows - row0);
      copy_rows(m.query, head, row0, rows, m.width, query.get(), m.width);
      std::fill_n(top, rows, kNothing);
      std::fill_n(total, rows, T(0));
      for (int64_t slot0 = 0; slot0 < m.slots; slot0 += kDenseTile) {
        const int64_t n = std::min(kDenseTile, m.slots - slot0);
        keys.multiply(query.get(), m.width, rows, head, slot0, n, scores.get(), stride);
        if (m.dropout.active()) dropout_tile(m.dropout, head, row0, rows, slot0, n, stride, 1, kept.get());
        for (int64_t i = 0; i < rows; ++i) {
          T *row = scores.get() + i * stride, *const end = row + n, *const padded_end = row + round_up(n, kWidth<T>);
          std::fill(end, padded_end, row[0]);
          Vector<T> high = Vector<T>{} + top[i];
          for (int64_t j = 0; j < n; j += kWidth<T>) {
            const Vector<T> x = load(row + j) * m.scale;
            store(row + j, x);
            high = x > high ? x : high;
          }
          std::fill(end, padded_end, kNothing);
          const T now = fold_lanes<T>(high, Larger{})[0];
          // Nothing but -inf so far: any finite shift gives the weights 0 that they should have.
          const T shift = now == kNothing ? T(0) : now, shrink = std::exp(top[i] - shift);
          for (int64_t d = 0; d < columns && slot0 > 0 && shrink != T(1); ++d) sums.get()[i * columns + d] *= shrink;
          Vector<T> total_here = {};
          for (int64_t j = 0; j < n; j += kWidth<T>) {
            const Vector<T> e = exp_nonpositive(load(row + j) - shift);
            store(row + j, m.dropout.active() ? e * load(kept.get() + i * stride + j) : e);
            total_here += e;
          }
          total[i] = total[i] * shrink + sum_lanes<T>(total_here);
          top[i] = now;
        }
        values.multiply(scores.get(), stride, rows, head, slot0, n, sums.get(), slot0 > 0);
      }
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t at = (row0 + i) * m.heads + head;
        for (int64_t d = 0; d < m.width; ++d) output[at * m.width + d] = sums.get()[i * columns + d] / total[i];
        logsumexp[at] = top[i] + std::log(total[i]);
      }
    }
  });
}

// The backward's blocks of rows and tiles of slots: a tile's scores, their gradients and all that is multiplied with
// them, 400 KB in float32 at width 64, stay in a second-level cache of 512 KB.
constexpr int64_t kBackwardRows = 96, kBackwardTile = 128;

// The backward of dense attention. A task owns some slots of a head: it walks over all rows for each tile of them, sums
// the gradients of their keys and values, and what they add to the gradient of the query, which is summed over the
// tasks of a head afterwards. What a task owns depends on the sizes alone, and so does the order of every sum. Sums of
// products have no scale in them: the gradients of the query and the key get it at their end.
template <class T>
class DenseBackward {
 public:
  DenseBackward(const MemoryProblem<T>& m, const MemoryGradients<T>& g)
      : m_(m), g_(g), scored_(g.query || g.key), columns_(round_up(m.width, kPanel<T>)),
        tiles_of_task_(tiles_of_task(m)),
        tasks_((m.slots + tiles_of_task_ * kBackwardTile - 1) / (tiles_of_task_ * kBackwardTile)),
        queries_(m.query, m.heads, m.rows, m.width), grads_(g.grad_output, m.heads, m.rows, m.width),
        grad_query_(g.query ? tasks_ * m.heads * m.rows * columns_ : 0), mean_(scored_ ? m.heads * m.rows : 0) {}

  void run() {
    if (scored_) torch::stable::parallel_for(0, m_.rows, 1, [&](int64_t begin, int64_t end) { means(begin, end); });
    torch::stable::parallel_for(0, m_.heads * tasks_, 1, [&](int64_t begin, int64_t end) {
      const Scratch scratch(m_.width, columns_);
      for (int64_t i = begin; i < end; ++i) task(i / tasks_, i % tasks_, scratch);
    });
    if (g_.query)
      torch::stable::parallel_for(0, m_.rows, 1, [&](int64_t begin, int64_t end) { sum_query(begin, end); });
  }

 private:
  struct Scratch {
    cpu::Buffer<T> weights, grads, kept, key_sums, value_sums;
    // Of the tile: its keys and values in panels, for products over the width, and its keys, for the sum over slots.
    cpu::Buffer<T> keys, values, key_rows;

    Scratch(int64_t width, int64_t columns)
        : weights(kBackwardRows * kStride), grads(kBackwardRows * kStride), kept(kBackwardRows * kStride),
          key_sums(kBackwardTile * columns), value_sums(kBackwardTile * columns), keys(kBackwardTile * width),
          values(kBackwardTile * width), key_rows(kBackwardTile * row_distance(width)) {}
  };

  static constexpr int64_t kStride = row_distance(kBackwardTile);

  // About 32 tasks in all, at most 8 a head. Each keeps a gradient of the query: all of them at most a quarter of what
  // all scores would take, or a single one. A single head and few slots leave threads without work.
  static int64_t tiles_of_task(const MemoryProblem<T>& m) {
    const int64_t tiles = (m.slots + kBackwardTile - 1) / kBackwardTile;
    const int64_t most = std::clamp<int64_t>(m.slots / (4 * round_up(m.width, kPanel<T>)), 1, 8);
    const int64_t tasks = std::clamp<int64_t>(32 / std::max<int64_t>(1, m.heads), 1, most);
    return (tiles + tasks - 1) / tasks;
  }

  T* grad_query(int64_t head, int64_t task, int64_t row) const {
    return grad_query_.get() + ((head * tasks_ + task) * m_.rows + row) * columns_;
  }

  // <grad_output, output> of every row, by head.
  void means(int64_t begin, int64_t end) const {
    for (int64_t row = begin; row < end; ++row)
      for (int64_t head = 0; head < m_.heads; ++head) {
        const T *grad = g_.grad_output.at(row, head), *output = g_.output.at(row, head);
        const int64_t whole = m_.width / kWidth<T> * kWidth<T>;
        Vector<T> sums = {};
        for (int64_t d = 0; d < whole; d += kWidth<T>) sums += load(grad + d) * load(output + d);
        T sum = sum_lanes<T>(sums);
        for (int64_t d = whole; d < m_.width; ++d) sum += grad[d] * output[d];
        mean_.get()[head * m_.rows + row] = sum;
      }
  }

  void task(int64_t head, int64_t number, const Scratch& s) const {
    const int64_t first = number * tiles_of_task_ * kBackwardTile;
    const int64_t last = std::min(m_.slots, first + tiles_of_task_ * kBackwardTile);
    for (int64_t slot0 = first; slot0 < last; slot0 += kBackwardTile) {
      const int64_t slots = std::min(kBackwardTile, last - slot0);
      pack_tile(head, slot0, slots, s);
      int64_t row0 = 0;
      do {  // once even without rows, which sets the sums to 0
        const int64_t rows = std::min(kBackwardRows, m_.rows - row0);
        weights_and_gradients(head, row0, rows, slot0, slots, s);
        const bool add = row0 > 0;
        const T* grads = s.grads.get();
        if (g_.value) add_product(s.weights.get(), slots, grads_.at(head, row0), rows, s.value_sums.get(), add);
        if (g_.key) add_product(grads, slots, queries_.at(head, row0), rows, s.key_sums.get(), add);
        if (g_.query)
          matmul_rounded<T>(
              rows, m_.width, slots,
              {grads, kStride, 1, s.key_rows.get(), row_distance(m_.width), grad_query(head, number, row0), columns_},
              slot0 > first);
        row0 += kBackwardRows;
      } while (row0 < m_.rows);
      for (int64_t i = 0; i < slots; ++i) {
        const int64_t at = ((slot0 + i) * m_.heads + head) * m_.width;
        for (int64_t d = 0; g_.key && d < m_.width; ++d) g_.key[at + d] = s.key_sums.get()[i * columns_ + d] * m_.scale;
        if (g_.value) std::memcpy(g_.value + at, s.value_sums.get() + i * columns_, m_.width * sizeof(T));
      }
    }
  }

  void pack_tile(int64_t head, int64_t slot0, int64_t slots, const Scratch& s) const {
    const auto pack = [&](const MemoryView<T>& bank, T* panels) {
      copy_rows(bank, head, slot0, slots, m_.width, s.key_rows.get(), row_distance(m_.width));
      pack_transposed<T>(s.key_rows.get(), row_distance(m_.width), slots, m_.width, panels);
    };
    if (scored_) pack(m_.value, s.values.get());
    pack(m_.key, s.keys.get());
  }

  // sums (slots, columns) = the transpose of weights (rows, slots) times operand (rows, width), or += with `add`.
  void add_product(const T* weights, int64_t slots, const T* operand, int64_t rows, T* sums, bool add) const {
    matmul_rounded<T>(slots, m_.width, rows, {weights, 1, kStride, operand, queries_.stride, sums, columns_}, add);
  }

  // Of a block of rows and a tile of slots: the weights after dropout, and the gradients of the scores.
  void weights_and_gradients(
      int64_t head, int64_t row0, int64_t rows, int64_t slot0, int64_t slots, const Scratch& s) const {
    const auto multiply = [&](const HeadRows<T>& left, const T* panels, T* out) {
      matmul_panels_rounded<T>(
          rows, round_up(slots, kPanel<T>), m_.width, left.at(head, row0), left.stride, panels, out, kStride);
    };
    multiply(queries_, s.keys.get(), s.weights.get());
    if (scored_) multiply(grads_, s.values.get(), s.grads.get());
    const bool dropping = m_.dropout.active();
    if (dropping) dropout_tile(m_.dropout, head, row0, rows, slot0, slots, kStride, 1, s.kept.get());
    for (int64_t i = 0; i < rows; ++i) {
      const T lse = g_.logsumexp[(row0 + i) * m_.heads + head];
      const T mean = scored_ ? mean_.get()[head * m_.rows + row0 + i] : T(0);
      for (int64_t at = i * kStride; at < i * kStride + slots; at += kWidth<T>) {
        const Vector<T> p = exp_nonpositive(rounded<T>(load(s.weights.get() + at) * m_.scale) - lse);
        const Vector<T> keep = dropping ? load(s.kept.get() + at) : Vector<T>{} + T(1);
        store(s.weights.get() + at, p * keep);
        if (scored_) store(s.grads.get() + at, (keep * load(s.grads.get() + at) - mean) * p);
      }
    }
  }

  void sum_query(int64_t begin, int64_t end) const {
    for (int64_t row = begin; row < end; ++row)
      for (int64_t head = 0; head < m_.heads; ++head) {
        T *sum = grad_query(head, 0, row), *out = g_.query + (row * m_.heads + head) * m_.width;
        for (int64_t task = 1; task < tasks_; ++task) {
          const T* of_task = grad_query(head, task, row);
          for (int64_t d = 0; d < columns_; d += kWidth<T>) store(sum + d, load(sum + d) + load(of_task + d));
        }
        for (int64_t d = 0; d < m_.width; ++d) out[d] = sum[d] * m_.scale;
      }
  }

  const MemoryProblem<T>& m_;
  const MemoryGradients<T>& g_;
  bool scored_;  // somebody needs the gradients of the scores
  int64_t columns_, tiles_of_task_, tasks_;
  HeadRows<T> queries_, grads_;
  cpu::Buffer<T> grad_query_, mean_;  // [head][task][row][column], [head][row]
};

template <class T>
void dense_backward(const MemoryProblem<T>& m, const MemoryGradients<T>& g) {
  DenseBackward<T>(m, g).run();
}

}  // namespace mpma::MPMA_ISA::memory
