// Forward and backward of one attention head after another. Included by foreach_isa.h, after masked_attention.h.
//
// Keys that take part are gathered first, so that what follows knows no mask: a masked row is never read. The work then
// goes key tile by key tile and, in each, block by block of query rows. A thread holds the scores of a block and a
// tile, the operands of both, and one row of sums for every query of its head. The softmax is rescaled from tile to
// tile, as in FlashAttention (Dao et al., 2022). logsumexp is +inf for a row without keys.

#include "cpu/masked_attention_rows.h"
#include "cpu/philox_words.h"

namespace mpma::MPMA_ISA {

constexpr int64_t kKeyTile = 256;
constexpr int64_t kQueryBlock = 64;

// Rows of Scratch have row_distance(their columns).
template <typename A>
class Scratch {
 public:
  A* rows(int64_t count, int64_t columns) {
    const int64_t size = padded(std::max<int64_t>(count, 1) * row_distance(columns));
    blocks_.emplace_back(static_cast<A*>(::operator new(size * sizeof(A), kAlignment)));
    return blocks_.back().get();
  }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(A* p) const { ::operator delete(p, kAlignment); }
  };
  std::vector<std::unique_ptr<A, Free>> blocks_;
};

// The keys of one sequence that take part, ascending. Their dropout words come in groups of four consecutive keys:
// that of key `rows[c]` is in the group `groups[group_of[c]]`.
struct KeyList {
  std::vector<int64_t> rows, group_of;
  std::vector<uint32_t> groups;

  void fill(const AttentionBatch& batch, int64_t b) {
    rows.clear(), group_of.clear(), groups.clear();
    for (int64_t j = 0; j < batch.keys[b].length; ++j) {
      if (batch.mask && !*batch.mask.at(b, j, 0)) continue;
      const auto group = static_cast<uint32_t>(j / 4);
      if (groups.empty() || groups.back() != group) groups.push_back(group);
      rows.push_back(j);
      group_of.push_back(static_cast<int64_t>(groups.size()) - 1);
    }
  }
};

// What one thread works with: the operands of a key tile and of a query block in the accumulator's type.
template <typename A>
class Worker {
 public:
  Worker(const AttentionBatch& batch, bool backward) : batch_(batch), width_(batch.width) {
    int64_t queries = 0, keys = 0;
    for (const Span& s : batch.queries) queries = std::max(queries, s.length);
    for (const Span& s : batch.keys) keys = std::max(keys, s.length);
    const int64_t tile = std::min(keys, kKeyTile), block = std::min(queries, kQueryBlock);
    scores_ = scratch_.rows(block, tile);
    query_ = scratch_.rows(block, width_);
    key_transposed_ = scratch_.rows(padded(width_), tile);
    value_ = scratch_.rows(tile, width_);  // the forward's values, the backward's keys
    sum_ = scratch_.rows(queries, width_);  // the forward's output, the backward's query gradient
    maximum_ = scratch_.rows(1, queries);
    total_ = scratch_.rows(1, queries);
    staging_ = scratch_.rows(4, width_);
    if (batch.dropout.active()) {
      words_.resize(4 * (tile + kPhiloxGroups));
      word_of_.resize(tile);
      kept_ = scratch_.rows(1, tile);
    }
    if (!backward) return;
    grad_scores_ = scratch_.rows(block, tile);
    grad_output_ = scratch_.rows(block, width_);
    value_transposed_ = scratch_.rows(padded(width_), tile);
    grad_key_ = scratch_.rows(tile, width_);
    grad_value_ = scratch_.rows(tile, width_);
  }

  void forward(int64_t b, int64_t h, const Output& output, const Operand<A>& logsumexp) {
    start(b, h);
    const int64_t q_row = row_distance(width_);
    for (int64_t c0 = 0; c0 < keys(); c0 += kKeyTile) {
      const int64_t n = std::min(kKeyTile, keys() - c0), s_row = row_distance(n);
      start_tile(c0, n);
      gather_transposed(batch_.key, c0, n, key_transposed_);
      gather(batch_.value, c0, n, value_);
      for_each_block([&](int64_t i0, int64_t rows) {
        load_block(batch_.query, i0, rows, query_);
        matmul_rounded<A>(rows, n, width_, {query_, q_row, 1, key_transposed_, s_row, scores_, s_row}, false);
        for (int64_t i = 0; i < rows; ++i) {
          softmax_row(scores_ + i * s_row, n, i0 + i, c0 == 0);
          if (batch_.dropout.active()) drop_row(scores_ + i * s_row, n, i0 + i);
        }
        matmul_rounded<A>(rows, width_, n, {scores_, s_row, 1, value_, q_row, sum_ + i0 * q_row, q_row}, c0 > 0);
      });
    }
    for (int64_t i = 0; i < queries_.length; ++i) {
      A* sum = sum_ + i * q_row;
      if (keys() == 0) {
        std::fill_n(sum, width_, A(0));
        *logsumexp.at(b, queries_.start + i, h) = kInfinity;
      } else {
        scale_row(sum, width_, 1 / total_[i]);
        *logsumexp.at(b, queries_.start + i, h) = maximum_[i] + std::log(total_[i]);
      }
      write(sum, output.at(b, queries_.start + i, h));
    }
  }

  void backward(int64_t b, int64_t h, const AttentionGradients<A>& gradients) {
    const auto& [grad_output, output, logsumexp, grad_query, grad_key, grad_value] = gradients;
    start(b, h);
    const int64_t q_row = row_distance(width_);
    A* const delta = maximum_;
    for (int64_t i = 0; i < queries_.length; ++i) {
      read(grad_output.at(b, queries_.start + i, h), staging_);
      read(output.at(b, queries_.start + i, h), staging_ + q_row);
      delta[i] = dot(staging_, staging_ + q_row);
      total_[i] = *logsumexp.at(b, queries_.start + i, h);
    }
    for (const Output& gradient : {grad_key, grad_value})
      if (gradient) clear_masked(gradient);
    for (int64_t c0 = 0; c0 < keys(); c0 += kKeyTile) {
      const int64_t n = std::min(kKeyTile, keys() - c0), s_row = row_distance(n);
      const bool need_scores = grad_query || grad_key;  // their gradients, to be exact
      start_tile(c0, n);
      gather_transposed(batch_.key, c0, n, key_transposed_);
      if (need_scores) gather_transposed(batch_.value, c0, n, value_transposed_);
      if (grad_query) gather(batch_.key, c0, n, value_);
      if (grad_key) std::fill_n(grad_key_, n * q_row, A(0));
      if (grad_value) std::fill_n(grad_value_, n * q_row, A(0));
      for_each_block([&](int64_t i0, int64_t rows) {
        load_block(batch_.query, i0, rows, query_);
        load_block(grad_output, i0, rows, grad_output_);
        matmul_rounded<A>(rows, n, width_, {query_, q_row, 1, key_transposed_, s_row, scores_, s_row}, false);
        if (need_scores)
          matmul_rounded<A>(
              rows, n, width_, {grad_output_, q_row, 1, value_transposed_, s_row, grad_scores_, s_row}, false);
        for (int64_t i = 0; i < rows; ++i) gradient_row(i * s_row, n, i0 + i, delta[i0 + i], total_[i0 + i]);
        if (grad_value)
          matmul_rounded<A>(n, width_, rows, {scores_, 1, s_row, grad_output_, q_row, grad_value_, q_row}, true);
        if (grad_key)
          matmul_rounded<A>(n, width_, rows, {grad_scores_, 1, s_row, query_, q_row, grad_key_, q_row}, true);
        if (grad_query)
          matmul_rounded<A>(rows, width_, n, {grad_scores_, s_row, 1, value_, q_row, sum_ + i0 * q_row, q_row}, c0 > 0);
      });
      if (grad_key) scatter(grad_key_, c0, n, grad_key);
      if (grad_value) scatter(grad_value_, c0, n, grad_value);
    }
    if (!grad_query) return;
    if (keys() == 0) std::fill_n(sum_, queries_.length * q_row, A(0));
    for (int64_t i = 0; i < queries_.length; ++i)
      write(sum_ + i * q_row, grad_query.at(b, queries_.start + i, h));
  }

 private:
  static constexpr A kInfinity = std::numeric_limits<A>::infinity();
  static constexpr int kW = kWidth<A>;

  void read(const char* from, A* to) const { load_row(batch_.element, from, width_, to); }
  void write(const A* from, char* to) const { store_row(batch_.element, from, width_, to); }

  int64_t keys() const { return static_cast<int64_t>(list_.rows.size()); }

  void start(int64_t b, int64_t h) {
    if (b != sequence_) list_.fill(batch_, b);
    sequence_ = b;
    head_ = h;
    queries_ = batch_.queries[b];
  }

  // Where the dropout words of the tile's keys will be.
  void start_tile(int64_t c0, int64_t n) {
    if (!batch_.dropout.active()) return;
    first_group_ = list_.group_of[c0];
    groups_ = list_.group_of[c0 + n - 1] - first_group_ + 1;
    groups_ = (groups_ + kPhiloxGroups - 1) / kPhiloxGroups * kPhiloxGroups;
    // The last vectors of counters read beyond the tile's own groups.
    list_.groups.resize(std::max<size_t>(list_.groups.size(), first_group_ + groups_));
    for (int64_t c = 0; c < n; ++c)
      word_of_[c] = static_cast<int32_t>(list_.rows[c0 + c] % 4 * groups_ + list_.group_of[c0 + c] - first_group_);
  }

  // Blocks of nearly equal size.
  template <typename Body>
  void for_each_block(const Body& body) const {
    const int64_t blocks = (queries_.length + kQueryBlock - 1) / kQueryBlock;
    int64_t i0 = 0;
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t rows = queries_.length / blocks + (block < queries_.length % blocks);
      body(i0, rows);
      i0 += rows;
    }
  }

  const char* key_row(const Input& operand, int64_t c) const {
    return operand.at(sequence_, batch_.keys[sequence_].start + list_.rows[c], head_);
  }

  // to[c][d] = row c0 + c; the padding columns of a product's right side may hold anything.
  void gather(const Input& operand, int64_t c0, int64_t n, A* to) const {
    for (int64_t c = 0; c < n; ++c) read(key_row(operand, c0 + c), to + c * row_distance(width_));
  }

  // to[d][c] = row c0 + c, padded with columns of zeros.
  void gather_transposed(const Input& operand, int64_t c0, int64_t n, A* to) const {
    const int64_t from_row = row_distance(width_), to_row = row_distance(n);
    for (int64_t c = 0; c < padded(n); c += 4) {
      for (int64_t i = 0; i < 4; ++i) {
        if (c + i < n) {
          read(key_row(operand, c0 + c + i), staging_ + i * from_row);
        } else {
          std::fill_n(staging_ + i * from_row, width_, A(0));
        }
      }
      for (int64_t d = 0; d < width_; d += 4)
        transpose_4x4(staging_ + d, from_row, to + d * to_row + c, to_row);
    }
  }

  void load_block(const Input& operand, int64_t i0, int64_t rows, A* to) const {
    for (int64_t i = 0; i < rows; ++i)
      read(operand.at(sequence_, queries_.start + i0 + i, head_), to + i * row_distance(width_));
  }

  void scatter(const A* from, int64_t c0, int64_t n, const Output& to) const {
    const int64_t start = batch_.keys[sequence_].start;
    for (int64_t c = 0; c < n; ++c)
      write(from + c * row_distance(width_), to.at(sequence_, start + list_.rows[c0 + c], head_));
  }

  void clear_masked(const Output& gradient) const {
    if (!batch_.mask) return;
    const Span& span = batch_.keys[sequence_];
    std::fill_n(staging_, width_, A(0));
    for (int64_t j = 0; j < span.length; ++j)
      if (!*batch_.mask.at(sequence_, j, 0))
        write(staging_, gradient.at(sequence_, span.start + j, head_));
  }

  static void scale_row(A* row, int64_t n, A factor) {
    for (int64_t i = 0; i < n; ++i) row[i] *= factor;
  }

  A dot(const A* x, const A* y) const {
    Vector<A> sum = {};
    int64_t d = 0;
    for (; d + kW <= width_; d += kW) sum += load(x + d) * load(y + d);
    A tail = 0;
    for (; d < width_; ++d) tail += x[d] * y[d];
    return sum_lanes<A>(sum) + tail;
  }

  // Products become scores and e^(score - maximum so far), and earlier sums of the row are rescaled to that maximum.
  void softmax_row(A* scores, int64_t n, int64_t i, bool first) {
    scale_row(scores, n, static_cast<A>(batch_.scale));
    std::fill(scores + n, scores + padded(n), -kInfinity);
    const Larger larger;
    Vector<A> top = Vector<A>{} + (first ? -kInfinity : maximum_[i]);
    for (int64_t c = 0; c < padded(n); c += kW) top = larger(load(scores + c), top);
    const A maximum = fold_lanes<A>(top, larger)[0];
    const A base = maximum == -kInfinity ? A(0) : maximum;  // a tile of -inf alone adds nothing
    Vector<A> total = {};
    for (int64_t c = 0; c < padded(n); c += kW) {
      const Vector<A> weight = exp_nonpositive(load(scores + c) - base);
      store(scores + c, weight);
      total += weight;
    }
    if (first) {
      total_[i] = sum_lanes<A>(total);
    } else {
      const A shrink = std::exp(maximum_[i] - base);
      total_[i] = total_[i] * shrink + sum_lanes<A>(total);
      scale_row(sum_ + i * row_distance(width_), width_, shrink);
    }
    maximum_[i] = maximum;
  }

  // kept_[c] is what the weight of query i on key c of the tile is multiplied with: 0 or 1 / (1 - p).
  void draw_kept(int64_t n, int64_t i) {
    philox_words(
        list_.groups.data() + first_group_, groups_, static_cast<uint32_t>(i), static_cast<uint32_t>(head_),
        static_cast<uint32_t>(sequence_), batch_.dropout.seed, words_.data());
    const auto kept = static_cast<A>(batch_.dropout.kept);
    const uint32_t threshold = batch_.dropout.threshold;
    for (int64_t c = 0; c < n; ++c) kept_[c] = words_[word_of_[c]] < threshold ? A(0) : kept;
  }

  void drop_row(A* weights, int64_t n, int64_t i) {
    draw_kept(n, i);
    for (int64_t c = 0; c < n; ++c) weights[c] *= kept_[c];
  }

  // Products become the weights that multiplied the values; gradients of the scores become gradients of the products.
  void gradient_row(int64_t offset, int64_t n, int64_t i, A delta, A logsumexp) {
    A *scores = scores_ + offset, *gradients = grad_scores_ + offset;
    const auto scale = static_cast<A>(batch_.scale);
    if (!batch_.dropout.active()) {
      for (int64_t c = 0; c < n; c += kW) {
        const Vector<A> weight = exp_nonpositive(load(scores + c) * scale - logsumexp);
        store(scores + c, weight);
        store(gradients + c, weight * (load(gradients + c) - delta) * scale);
      }
      return;
    }
    draw_kept(n, i);
    for (int64_t c = 0; c < n; c += kW) {
      const Vector<A> weight = exp_nonpositive(load(scores + c) * scale - logsumexp), kept = load(kept_ + c);
      store(scores + c, weight * kept);
      store(gradients + c, weight * (load(gradients + c) * kept - delta) * scale);
    }
  }

  const AttentionBatch& batch_;
  const int64_t width_;
  Scratch<A> scratch_;
  A *scores_, *query_, *key_transposed_, *value_, *sum_, *maximum_, *total_, *staging_;
  A *grad_scores_, *grad_output_, *value_transposed_, *grad_key_, *grad_value_;
  A* kept_;
  std::vector<uint32_t> words_;
  std::vector<int32_t> word_of_;
  int64_t first_group_, groups_;
  KeyList list_;
  int64_t sequence_ = -1, head_ = 0;
  Span queries_{};
};

// Calls body(worker, sequence, head) for every head of every sequence. Threads take the next one when they are done
// with the last, since lengths differ; each result depends on its own problem alone.
template <typename A, typename Body>
void for_each_problem(const AttentionBatch& batch, bool backward, const Body& body) {
  const int64_t problems = static_cast<int64_t>(batch.queries.size()) * batch.heads;
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), problems);
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    Worker<A> worker(batch, backward);
    for (int64_t p = next++; p < problems; p = next++) body(worker, p / batch.heads, p % batch.heads);
  });
}

template <typename A>
void attention_forward(const AttentionBatch& batch, const Output& output, const Operand<A>& logsumexp) {
  for_each_problem<A>(batch, false, [&](Worker<A>& worker, int64_t b, int64_t h) {
    worker.forward(b, h, output, logsumexp);
  });
}

template <typename A>
void attention_backward(const AttentionBatch& batch, const AttentionGradients<A>& gradients) {
  for_each_problem<A>(batch, true, [&](Worker<A>& worker, int64_t b, int64_t h) {
    worker.backward(b, h, gradients);
  });
}

}  // namespace mpma::MPMA_ISA
