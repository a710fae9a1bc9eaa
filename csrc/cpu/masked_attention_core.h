// Forward and backward of one attention head after another. Included by foreach_isa.h, after masked_attention.h.
//
// Keys that take part are listed first, so that what follows knows no mask: a masked row is never read. The work then
// goes key tile by key tile and, in each, block by block of query rows. Products read and write the tensors' own rows
// where these have the type of the sums and follow one another, and copies elsewhere. A thread holds the scores of a
// block and a tile, copies of the operands of both, and one row of sums for every query of its head. The softmax is
// rescaled from tile to tile, as in FlashAttention (Dao et al., 2022). logsumexp is +inf for a row without keys.

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
    blocks_.emplace_back(padded(std::max<int64_t>(count, 1) * row_distance(columns)));
    return blocks_.back().get();
  }

 private:
  std::vector<cpu::Buffer<A>> blocks_;
};

// Rows of one head, in a tensor or in a buffer.
template <typename A>
struct Rows {
  A* data;
  int64_t distance;

  A* operator[](int64_t i) const { return data + i * distance; }
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
      rows.push_back(batch.keys[b].start + j);
      group_of.push_back(static_cast<int64_t>(groups.size()) - 1);
    }
  }
};

// What one thread works with: the operands of a key tile and of a query block in the accumulator's type.
template <typename A>
class Worker {
 public:
  Worker(const AttentionBatch& batch, bool backward)
      : batch_(batch), width_(batch.width), own_rows_(is_element<A>(batch.element) && padded(width_) == width_) {
    int64_t queries = 0, keys = 0;
    for (const Span& s : batch.queries) queries = std::max(queries, s.length);
    for (const Span& s : batch.keys) keys = std::max(keys, s.length);
    const int64_t tile = std::min(keys, kKeyTile), block = std::min(queries, kQueryBlock);
    scores_ = scratch_.rows(block, tile);
    query_ = scratch_.rows(block, width_);
    key_ = scratch_.rows(tile, width_);  // and values
    key_panels_ = scratch_.rows(width_, tile + kPanel<A>);
    sum_ = scratch_.rows(queries, width_);  // the forward's output, the backward's query gradient
    maximum_ = scratch_.rows(1, queries);
    total_ = scratch_.rows(1, queries);
    if (batch.dropout.active()) {
      words_.resize(4 * (tile + kPhiloxGroups));
      word_of_.resize(tile);
      kept_ = scratch_.rows(1, tile);
    }
    if (!backward) return;
    grad_scores_ = scratch_.rows(block, tile);
    grad_output_ = scratch_.rows(block, width_);
    value_panels_ = scratch_.rows(width_, tile + kPanel<A>);
    grad_key_ = scratch_.rows(tile, width_);
    grad_value_ = scratch_.rows(tile, width_);
  }

  void forward(int64_t b, int64_t h, const Output& output, const Operand<A>& logsumexp) {
    start(b, h);
    const Rows<A> sum = to_write(output, queries_, sum_);
    for (int64_t c0 = 0; c0 < keys(); c0 += kKeyTile) {
      const Range tile = keys(c0);
      const int64_t n = tile.count, s_row = row_distance(n);
      start_tile(c0, n);
      pack(to_read(batch_.key, tile, key_), n, key_panels_);
      const Rows<const A> value = to_read(batch_.value, tile, key_);
      for_each_block([&](int64_t i0, const Range& block) {
        const Rows<const A> query = to_read(batch_.query, block, query_);
        matmul_panels_rounded<A>(block.count, n, width_, query.data, query.distance, key_panels_, scores_, s_row);
        for (int64_t i = 0; i < block.count; ++i) {
          softmax_row(scores_ + i * s_row, n, i0 + i, sum[i0 + i], c0 == 0);
          if (batch_.dropout.active()) drop_row(scores_ + i * s_row, n, i0 + i);
        }
        matmul_rounded<A>(
            block.count, width_, n, {scores_, s_row, 1, value.data, value.distance, sum[i0], sum.distance}, c0 > 0);
      });
    }
    for (int64_t i = 0; i < queries_.count; ++i) {
      A& statistic = *logsumexp.at(b, queries_.rows[i], h);
      if (keys() == 0) {
        std::fill_n(sum[i], width_, A(0));
        statistic = kInfinity;
      } else {
        scale_row(sum[i], width_, 1 / total_[i]);
        statistic = maximum_[i] + std::log(total_[i]);
      }
    }
    write(sum, output, queries_);
  }

  void backward(int64_t b, int64_t h, const AttentionGradients<A>& gradients) {
    const auto& [grad_output, output, logsumexp, grad_query, grad_key, grad_value] = gradients;
    start(b, h);
    A* const delta = maximum_;
    const Rows<A> to_query = to_write(grad_query, queries_, sum_);
    for (const Output& gradient : {grad_key, grad_value})
      if (gradient) clear_masked(gradient);
    for (int64_t c0 = 0; c0 < keys(); c0 += kKeyTile) {
      const Range tile = keys(c0);
      const int64_t n = tile.count, s_row = row_distance(n);
      const bool need_scores = grad_query || grad_key;  // their gradients, to be exact
      start_tile(c0, n);
      if (need_scores) pack(to_read(batch_.value, tile, key_), n, value_panels_);
      const Rows<const A> key = to_read(batch_.key, tile, key_);
      pack(key, n, key_panels_);
      const Rows<A> to_key = to_write(grad_key, tile, grad_key_), to_value = to_write(grad_value, tile, grad_value_);
      for_each_block([&](int64_t i0, const Range& block) {
        const int64_t rows = block.count;
        const Rows<const A> from = to_read(grad_output, block, grad_output_);
        if (c0 == 0) {
          const Rows<const A> out = to_read(output, block, query_);
          for (int64_t i = 0; i < rows; ++i) {
            delta[i0 + i] = dot(from[i], out[i]);
            total_[i0 + i] = *logsumexp.at(b, block.rows[i], h);
          }
        }
        const Rows<const A> query = to_read(batch_.query, block, query_);
        matmul_panels_rounded<A>(rows, n, width_, query.data, query.distance, key_panels_, scores_, s_row);
        if (need_scores)
          matmul_panels_rounded<A>(rows, n, width_, from.data, from.distance, value_panels_, grad_scores_, s_row);
        for (int64_t i = 0; i < rows; ++i) gradient_row(i * s_row, n, i0 + i, delta[i0 + i], total_[i0 + i]);
        if (grad_value)
          matmul_rounded<A>(
              n, width_, rows, {scores_, 1, s_row, from.data, from.distance, to_value.data, to_value.distance}, i0 > 0);
        if (grad_key)
          matmul_rounded<A>(
              n, width_, rows, {grad_scores_, 1, s_row, query.data, query.distance, to_key.data, to_key.distance},
              i0 > 0);
        if (grad_query)
          matmul_rounded<A>(
              rows, width_, n, {grad_scores_, s_row, 1, key.data, key.distance, to_query[i0], to_query.distance},
              c0 > 0);
      });
      write(to_key, grad_key, tile);
      write(to_value, grad_value, tile);
    }
    if (!grad_query) return;
    for (int64_t i = 0; keys() == 0 && i < queries_.count; ++i) std::fill_n(to_query[i], width_, A(0));
    write(to_query, grad_query, queries_);
  }

 private:
  static constexpr A kInfinity = std::numeric_limits<A>::infinity();
  static constexpr int kW = kWidth<A>;

  // Rows of the tensors, ascending.
  struct Range {
    const int64_t* rows;
    int64_t count;
  };

  int64_t keys() const { return static_cast<int64_t>(list_.rows.size()); }
  Range keys(int64_t c0) const { return {list_.rows.data() + c0, std::min(kKeyTile, keys() - c0)}; }

  void start(int64_t b, int64_t h) {
    if (b != sequence_) {
      list_.fill(batch_, b);
      query_rows_.resize(batch_.queries[b].length);
      std::iota(query_rows_.begin(), query_rows_.end(), batch_.queries[b].start);
    }
    sequence_ = b;
    head_ = h;
    queries_ = {query_rows_.data(), batch_.queries[b].length};
  }

  // Where the dropout words of the tile's keys will be.
  void start_tile(int64_t c0, int64_t n) {
    if (!batch_.dropout.active()) return;
    const int64_t start = batch_.keys[sequence_].start;
    first_group_ = list_.group_of[c0];
    groups_ = list_.group_of[c0 + n - 1] - first_group_ + 1;
    groups_ = (groups_ + kPhiloxGroups - 1) / kPhiloxGroups * kPhiloxGroups;
    // The last vectors of counters read beyond the tile's own groups.
    list_.groups.resize(std::max<size_t>(list_.groups.size(), first_group_ + groups_));
    for (int64_t c = 0; c < n; ++c)
      word_of_[c] =
          static_cast<int32_t>((list_.rows[c0 + c] - start) % 4 * groups_ + list_.group_of[c0 + c] - first_group_);
  }

  // Blocks of nearly equal size; one of no rows where there are none, so that sums over them are set to 0.
  template <typename Body>
  void for_each_block(const Body& body) const {
    const int64_t blocks = std::max<int64_t>(1, (queries_.count + kQueryBlock - 1) / kQueryBlock);
    int64_t i0 = 0;
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t rows = queries_.count / blocks + (block < queries_.count % blocks);
      body(i0, Range{queries_.rows + i0, rows});
      i0 += rows;
    }
  }

  // Whether products may use the tensor's own rows.
  template <typename C>
  bool in_place(const Operand<C>& operand, const Range& range) const {
    const auto [rows, n] = range;
    return own_rows_ && operand && n > 0 && rows[n - 1] - rows[0] == n - 1;
  }

  template <typename T, typename C>
  Rows<T> own_rows(const Operand<C>& operand, const Range& range) const {
    return {reinterpret_cast<T*>(operand.at(sequence_, range.rows[0], head_)), operand.row / int64_t{sizeof(A)}};
  }

  // Where a product finds the rows: the tensor itself or a copy in the buffer.
  Rows<const A> to_read(const Input& operand, const Range& range, A* buffer) const {
    if (in_place(operand, range)) return own_rows<const A>(operand, range);
    const Rows<A> copy{buffer, row_distance(width_)};
    for (int64_t i = 0; i < range.count; ++i)
      load_row(batch_.element, operand.at(sequence_, range.rows[i], head_), width_, copy[i]);
    return {copy.data, copy.distance};
  }

  // Where a product leaves the rows; `write` brings them into the tensor.
  Rows<A> to_write(const Output& operand, const Range& range, A* buffer) const {
    return in_place(operand, range) ? own_rows<A>(operand, range) : Rows<A>{buffer, row_distance(width_)};
  }

  void write(const Rows<A>& from, const Output& operand, const Range& range) const {
    if (!operand || in_place(operand, range)) return;
    for (int64_t i = 0; i < range.count; ++i)
      store_row(batch_.element, from[i], width_, operand.at(sequence_, range.rows[i], head_));
  }

  void pack(const Rows<const A>& rows, int64_t n, A* panels) const {
    pack_transposed(rows.data, rows.distance, n, width_, panels);
  }

  void clear_masked(const Output& gradient) const {
    if (!batch_.mask) return;
    const Span& span = batch_.keys[sequence_];
    const auto bytes = width_ * size_of(batch_.element);
    for (int64_t j = 0; j < span.length; ++j)
      if (!*batch_.mask.at(sequence_, j, 0)) std::memset(gradient.at(sequence_, span.start + j, head_), 0, bytes);
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
  void softmax_row(A* scores, int64_t n, int64_t i, A* sum, bool first) {
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
      scale_row(sum, width_, shrink);
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
        const Vector<A> weight = exp_nonpositive(rounded<A>(load(scores + c) * scale) - logsumexp);
        store(scores + c, weight);
        store(gradients + c, weight * (load(gradients + c) - delta) * scale);
      }
      return;
    }
    draw_kept(n, i);
    for (int64_t c = 0; c < n; c += kW) {
      const Vector<A> weight = exp_nonpositive(rounded<A>(load(scores + c) * scale) - logsumexp);
      const Vector<A> kept = load(kept_ + c);
      store(scores + c, weight * kept);
      store(gradients + c, weight * (load(gradients + c) * kept - delta) * scale);
    }
  }

  const AttentionBatch& batch_;
  const int64_t width_;
  const bool own_rows_;
  Scratch<A> scratch_;
  A *scores_, *query_, *key_, *key_panels_, *sum_, *maximum_, *total_;
  A *grad_scores_, *grad_output_, *value_panels_, *grad_key_, *grad_value_;
  A* kept_;
  std::vector<uint32_t> words_;
  std::vector<int32_t> word_of_;
  int64_t first_group_, groups_;
  KeyList list_;
  std::vector<int64_t> query_rows_;
  int64_t sequence_ = -1, head_ = 0;
  Range queries_{};
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
