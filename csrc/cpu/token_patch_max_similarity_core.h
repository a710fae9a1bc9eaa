// The max form of token-patch similarity. Included by foreach_isa.h.

namespace mpma::MPMA_ISA::max_similarity {

template <typename T>
using Integers = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;

// A running maximum and where it stood. Of equal values the first one stays; a NaN is above all, and the first stays.
template <typename T>
struct Best {
  Vector<T> value;
  Vector<Integers<T>> index;

  void take(Vector<T> x, Vector<Integers<T>> i) {
    const auto better = ~(x <= value) & (value == value);
    value = better ? x : value;
    index = better ? i : index;
  }

  // The best of all lanes, in every lane.
  template <int kStep = kWidth<T> / 2>
  void fold() {
    const auto lanes = std::make_integer_sequence<int, kWidth<T>>();
    const Vector<T> x = swap_lanes<kStep, T>(value, lanes);
    const Vector<Integers<T>> i = swap_lanes<kStep, Integers<T>>(index, lanes);
    const auto same = (x == value) | ((x != x) & (value != value));
    const auto better = (~(x <= value) & (value == value)) | (same & (i < index));
    value = better ? x : value;
    index = better ? i : index;
    if constexpr (kStep > 1) fold<kStep / 2>();
  }
};

// Both maxima of the scores (T, P) of one pair, rows `stride` apart. -inf stands in the columns beyond the patches.
template <typename T>
void best_of(
    const T* scores, int64_t stride, int64_t tokens, int64_t patches, T* of_token, int32_t* patch, T* of_patch,
    Integers<T>* token) {
  using Index = Vector<Integers<T>>;
  Index lane = {};
  for (int i = 0; i < kWidth<T>; ++i) lane[i] = i;
  for (int64_t t = 0; t < tokens; ++t) {
    const Index row = Index{} + static_cast<Integers<T>>(t);
    Best<T> best{load(scores + t * stride), lane};
    for (int64_t p = 0; p < patches; p += kWidth<T>) {
      const Vector<T> x = load(scores + t * stride + p);
      Best<T> of_column{x, row};
      if (t > 0) {
        of_column = {load(of_patch + p), load(token + p)};
        of_column.take(x, row);
      }
      store(of_patch + p, of_column.value);
      store(token + p, of_column.index);
      best.take(x, lane + static_cast<Integers<T>>(p));
    }
    best.fold();
    of_token[t] = best.value[0];
    patch[t] = static_cast<int32_t>(best.index[0]);
  }
}

// Results (reports, images) and, for every real token and patch, the position of the nearest of the other side:
// patch_index (reports, images, length of a report), token_index (reports, images, patches of an image). Where masked
// it is 0.
template <typename T>
void forward(
    const cpu::RealRows<T>& tokens, const cpu::RealRows<T>& patches, T* tokens_to_patches, T* patches_to_tokens,
    int32_t* patch_index, int32_t* token_index) {
  const int64_t reports = tokens.items, images = patches.items, width = tokens.width;
  const int64_t most_tokens = tokens.largest_count(), stride = row_distance(patches.largest_count());
  const int64_t work = tokens.length * patches.length * width;
  torch::stable::parallel_for(0, images * reports, cpu::grain(work), [&](int64_t begin, int64_t end) {
    const cpu::Buffer<T> transposed(width * (stride + kPanel<T>)), scores(most_tokens * stride);
    const cpu::Buffer<T> of_token(most_tokens), of_patch(stride);
    const cpu::Buffer<int32_t> patch(most_tokens);
    const cpu::Buffer<Integers<T>> token(stride);
    int64_t transposed_image = -1;
    for (int64_t pair = begin; pair < end; ++pair) {
      const int64_t image = pair / reports, report = pair % reports, out = report * images + image;
      const int64_t t = tokens.count(report), p = patches.count(image);
      int32_t *patch_out = patch_index + out * tokens.length, *token_out = token_index + out * patches.length;
      std::fill_n(patch_out, tokens.length, 0);
      std::fill_n(token_out, patches.length, 0);
      tokens_to_patches[out] = patches_to_tokens[out] = 0;
      if (t == 0 || p == 0) continue;
      if (transposed_image != image) {
        pack_transposed<T>(patches.item(image), patches.stride, p, width, transposed.get());
        transposed_image = image;
      }
      matmul_panels_rounded<T>(t, p, width, tokens.item(report), tokens.stride, transposed.get(), scores.get(), stride);
      for (int64_t i = 0; i < t; ++i)
        std::fill(
            scores.get() + i * stride + p, scores.get() + i * stride + padded(p), -std::numeric_limits<T>::infinity());
      best_of(scores.get(), stride, t, p, of_token.get(), patch.get(), of_patch.get(), token.get());
      const int32_t *token_position = tokens.position.data() + tokens.start[report],
                    *patch_position = patches.position.data() + patches.start[image];
      T sum = 0;
      for (int64_t i = 0; i < t; ++i) {
        sum += of_token.get()[i];
        patch_out[token_position[i]] = patch_position[patch.get()[i]];
      }
      tokens_to_patches[out] = sum / t;
      sum = 0;
      for (int64_t i = 0; i < p; ++i) {
        sum += of_patch.get()[i];
        token_out[patch_position[i]] = token_position[token.get()[i]];
      }
      patches_to_tokens[out] = sum / p;
    }
  });
}

// A row of the other side and its weight in the gradient of a row.
template <typename T>
struct Term {
  int32_t row;
  T weight;
};

// The terms of every row of item i, in the order of the other side's items: what the row chose, and what chose it.
// Those of row r are terms[ends[r]] to terms[ends[r + 1]].
template <typename T>
void collect_terms(const MaxSide<T>& own, const MaxSide<T>& other, int64_t i, int64_t* ends, Term<T>* terms) {
  const cpu::RealRows<T>&mine = own.rows, &theirs = other.rows;
  const int64_t first = mine.start[i], count = mine.count(i);
  const auto each = [&](const auto& add) {
    for (int64_t j = 0; j < theirs.items; ++j) {
      if (theirs.count(j) == 0) continue;
      const int64_t pair = i * own.step + j * other.step;
      const int32_t *by_mine = own.index + pair * mine.length, *by_theirs = other.index + pair * theirs.length;
      const T to_mine = own.grad[pair] / count, to_theirs = other.grad[pair] / theirs.count(j);
      for (int64_t row = first; row < first + count; ++row)
        add(row - first, other.row_at(j, by_mine[mine.position[row]]), to_mine);
      for (int64_t row = theirs.start[j]; row < theirs.start[j + 1]; ++row)
        add(own.row_at(i, by_theirs[theirs.position[row]]) - first, row, to_theirs);
    }
  };
  std::fill_n(ends, count + 2, 0);
  if (count == 0) return;
  each([&](int64_t row, int64_t, T) { ++ends[row + 2]; });
  for (int64_t row = 0; row < count; ++row) ends[row + 2] += ends[row + 1];
  each([&](int64_t row, int64_t term, T weight) { terms[ends[row + 1]++] = {static_cast<int32_t>(term), weight}; });
}

// So many vectors of a row's gradient are summed in registers.
template <typename T, int kVectors>
void sum_terms(const Term<T>* begin, const Term<T>* end, const T* rows, int64_t stride, T* out) {
  Vector<T> sum[kVectors] = {};
  for (const Term<T>* term = begin; term < end; ++term) {
    const T* row = rows + term->row * stride;
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[v] += term->weight * load(row + v * kWidth<T>);
  }
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) store(out + v * kWidth<T>, sum[v]);
}

constexpr int kSumVectors = 4;
constexpr int64_t kTerms = 1 << 16;  // of so many items at once, if of more than one: 512 KB of float32

constexpr int64_t kCopied = 1 << 20;  // numbers that a thread copies at most: 4 MB of float32

// The gradient of one side's rows, each summed by one thread. Columns of all the other side's rows serve many items:
// where those are far apart they are copied beside one another for the second-level cache, if that is not too much.
template <typename T>
void backward(const MaxSide<T>& own, const MaxSide<T>& other, T* grad) {
  constexpr int64_t kColumns = kSumVectors * kWidth<T>;
  const cpu::RealRows<T>&mine = own.rows, &theirs = other.rows;
  const int64_t most = mine.largest_count(), width = padded(mine.width);
  const int64_t terms_of_item = most * theirs.items + theirs.rows();
  const int64_t at_once = std::max<int64_t>(1, kTerms / std::max<int64_t>(1, terms_of_item));
  const int64_t work = theirs.items * (mine.length + theirs.length) * width;
  torch::stable::parallel_for(0, mine.items, cpu::grain(work), [&](int64_t begin, int64_t end) {
    const cpu::Buffer<int64_t> ends(at_once * (most + 2));
    const cpu::Buffer<Term<T>> terms(at_once * terms_of_item);
    const bool copies = far_apart<T>(theirs.stride) && theirs.rows() <= kCopied / kColumns;
    const cpu::Buffer<T> copied(copies ? theirs.rows() * std::min(kColumns, width) : 0);
    for (int64_t first = begin; first < end; first += at_once) {
      const int64_t last = std::min(end, first + at_once);
      for (int64_t i = first; i < last; ++i)
        collect_terms(
            own, other, i, ends.get() + (i - first) * (most + 2), terms.get() + (i - first) * terms_of_item);
      for (int64_t column = 0; column < width; column += kColumns) {
        const int64_t columns = std::min(kColumns, width - column);
        for (int64_t row = 0; copies && row < theirs.rows(); ++row)
          for (int64_t d = 0; d < columns; d += kWidth<T>)
            store(copied.get() + row * columns + d, load(theirs.data + row * theirs.stride + column + d));
        const T* rows = copies ? copied.get() : theirs.data + column;
        const int64_t stride = copies ? columns : theirs.stride;
        for (int64_t i = first; i < last; ++i)
          for (int64_t row = 0; row < mine.count(i); ++row) {
            const int64_t* bounds = ends.get() + (i - first) * (most + 2) + row;
            const Term<T>* of_item = terms.get() + (i - first) * terms_of_item;
            T* out = grad + (mine.start[i] + row) * mine.stride + column;
            if (columns == kColumns)
              sum_terms<T, kSumVectors>(of_item + bounds[0], of_item + bounds[1], rows, stride, out);
            else
              for (int64_t d = 0; d < columns; d += kWidth<T>)
                sum_terms<T, 1>(of_item + bounds[0], of_item + bounds[1], rows + d, stride, out + d);
          }
      }
    }
  });
}

}  // namespace mpma::MPMA_ISA::max_similarity
