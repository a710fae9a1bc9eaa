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
    int first = 0;
    for (int i = 1; i < kWidth<T>; ++i) {
      const bool above = !(best.value[i] <= best.value[first]) && best.value[first] == best.value[first];
      const bool earlier = best.value[i] == best.value[first] && best.index[i] < best.index[first];
      if (above || earlier) first = i;
    }
    of_token[t] = best.value[first];
    patch[t] = static_cast<int32_t>(best.index[first]);
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
      matmul_panels<T>(t, p, width, tokens.item(report), tokens.stride, transposed.get(), scores.get(), stride);
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

template <typename T>
void add_row(T weight, const T* row, T* sum, int64_t width) {
  for (int64_t d = 0; d < width; d += kWidth<T>) store(sum + d, load(sum + d) + weight * load(row + d));
}

// What item j of the other side adds to the gradient of item i.
template <typename T>
void add_pair(const MaxSide<T>& own, const MaxSide<T>& other, int64_t i, int64_t j, T* grad) {
  const cpu::RealRows<T>&mine = own.rows, &theirs = other.rows;
  if (mine.count(i) == 0 || theirs.count(j) == 0) return;
  const int64_t pair = i * own.step + j * other.step;
  const int32_t* by_mine = own.index + pair * mine.length;
  const int32_t* by_theirs = other.index + pair * theirs.length;
  const T to_mine = own.grad[pair] / mine.count(i), to_theirs = other.grad[pair] / theirs.count(j);
  for (int64_t row = mine.start[i]; row < mine.start[i + 1]; ++row)
    add_row(
        to_mine, theirs.data + other.row_at(j, by_mine[mine.position[row]]) * theirs.stride,
        grad + row * mine.stride, mine.width);
  for (int64_t row = theirs.start[j]; row < theirs.start[j + 1]; ++row)
    add_row(
        to_theirs, theirs.data + row * theirs.stride,
        grad + own.row_at(i, by_theirs[theirs.position[row]]) * mine.stride, mine.width);
}

// The gradient of one side's rows, each item's summed by one thread in the order of the other side's items: what its
// own rows chose, and what chose them.
template <typename T>
void backward(const MaxSide<T>& own, const MaxSide<T>& other, T* grad) {
  const int64_t work = other.rows.items * (own.rows.length + other.rows.length) * own.rows.width;
  torch::stable::parallel_for(0, own.rows.items, cpu::grain(work), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t j = 0; j < other.rows.items; ++j) add_pair(own, other, i, j, grad);
  });
}

}  // namespace mpma::MPMA_ISA::max_similarity
