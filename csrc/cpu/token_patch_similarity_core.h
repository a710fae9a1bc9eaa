// The softmax form of token-patch similarity. Included by foreach_isa.h.
//
// Forward and backward work on one report and one image at a time, whose scores stay in the second-level cache; the
// backward recomputes them. |c|^2 = b^T (V V^T) b needs one product over the patches instead of two over the features
// in the backward: cheaper up to P = 2 D, beyond that c = b V is formed. Neither b, the Gram matrix nor c is ever
// rounded to bfloat16: the result has float32's accuracy, and patches may cancel.

namespace mpma::MPMA_ISA::similarity {

template <typename T>
T dot(const T* x, const T* y, int64_t n) {
  Vector<T> sum = {};
  for (int64_t i = 0; i < n; i += kWidth<T>) sum += load(x + i) * load(y + i);
  return sum_lanes<T>(sum);
}

// Whether |c|^2 of an image with so many patches comes by its Gram matrix.
template <typename T>
bool goes_by_gram(const cpu::RealRows<T>& patches, int64_t count) {
  return count <= 2 * patches.width;
}

// Rows of the largest Gram matrix that is formed.
template <typename T>
int64_t gram_rows(const cpu::RealRows<T>& patches) {
  int64_t largest = 0;
  for (int64_t i = 0; i < patches.items; ++i)
    if (goes_by_gram(patches, patches.count(i))) largest = std::max(largest, patches.count(i));
  return largest;
}

// Scratch of one thread, and what it computed last. Rows of (tokens, patches) are `stride` apart; columns beyond the
// patches, up to a whole vector, count as patches of score 0 that no token attends to.
template <typename T>
class Pair {
 public:
  Pair(const SimilarityProblem<T>& problem, bool backward)
      : problem_(problem), tokens_(problem.tokens), patches_(problem.patches), backward_(backward),
        stride_(row_distance(patches_.largest_count())), most_tokens_(tokens_.largest_count()),
        transposed_(patches_.width * (stride_ + kPanel<T>)), gram_(gram_rows(patches_) * stride_), hidden_(stride_),
        scores_(most_tokens_ * stride_), a_(most_tokens_ * stride_), b_(most_tokens_ * stride_),
        product_(most_tokens_ * std::max(stride_, patches_.stride)), attended_(most_tokens_ * patches_.stride),
        column_(stride_), per_token_(kPerToken * padded(most_tokens_)) {}

  bool by_gram() const { return by_gram_; }

  // Takes the patches of one image: V^T, and V V^T, of which only the upper half is computed. A quadratic form needs no
  // more of a symmetric matrix: the forward counts that half twice, the backward mirrors it.
  void set_image(int64_t image) {
    v_ = patches_.item(image);
    p_ = patches_.count(image);
    by_gram_ = goes_by_gram(patches_, p_);
    const int64_t columns = padded(p_);
    for (int64_t p = 0; p < columns; ++p) hidden_.get()[p] = p < p_ ? T(0) : -std::numeric_limits<T>::infinity();
    pack_transposed<T>(patches_.item(image), patches_.stride, p_, patches_.width, transposed_.get());
    if (!by_gram_) return;
    for (int64_t p = 0; p < p_; p += kPanel<T>)
      matmul_rounded<T>(
          std::min(p_, p + kPanel<T>), std::min(kPanel<T>, p_ - p), patches_.width,
          {v_, patches_.stride, 1, transposed_.get() + p * patches_.width, kPanel<T>, gram_.get() + p, stride_},
          false);
    if (backward_) return mirror(gram_.get());
    for (int64_t k = 0; k < p_; ++k) {
      T* row = gram_.get() + k * stride_;
      std::fill(row, row + k, T(0));
      for (int64_t p = k + 1; p < p_; ++p) row[p] *= 2;
    }
  }

  // The logarithm of the sum over the tokens of exp(pooling_temperature * cosine).
  T similarity(int64_t report) {
    w_ = tokens_.item(report);
    t_ = tokens_.count(report);
    score();
    for (int64_t t = 0; t < t_; ++t) softmax_over_patches(t);
    if (by_gram_) {
      for (int64_t p = 0; p < p_; p += kPanel<T>) {
        const int64_t depth = backward_ ? p_ : std::min(p_, p + kPanel<T>);
        matmul<T>(
            t_, std::min(kPanel<T>, p_ - p), depth,
            {b_.get(), stride_, 1, gram_.get() + p, stride_, product_.get() + p, stride_}, false);
      }
    } else {
      matmul<T>(
          t_, patches_.width, p_, {b_.get(), stride_, 1, v_, patches_.stride, attended_.get(), patches_.stride}, false);
    }
    for (int64_t t = 0; t < t_; ++t) {
      const T *b = b_.get() + t * stride_, *c = attended_.get() + t * patches_.stride;
      const T w2 = token_square(report)[t];
      square()[t] = by_gram_ ? dot(b, product_.get() + t * stride_, p_) : dot(c, c, patches_.width);
      // Where patches cancel, rounding could leave the Gram form below what Cauchy and Schwarz allow, even negative.
      if (!clamped(w2)) square()[t] = std::max(square()[t], inner()[t] * inner()[t] / w2);
      cosine()[t] = inner()[t] / (norm(w2) * norm(square()[t]));
    }
    return log_sum_exp();
  }

  // After similarity(): the gradient of the scores, rows `stride` apart, and for every token what its gradient holds
  // of itself. `grad` is the gradient of the result.
  void backward(int64_t report, T grad, T* grad_scores, T* of_itself) {
    if (!by_gram_) times_transposed(attended_.get(), product_.get());
    std::fill_n(column_.get(), padded(p_), T(0));
    for (int64_t t = 0; t < t_; ++t) {
      const T w2 = token_square(report)[t], c2 = square()[t];
      const T grad_cosine = grad * problem_.pooling_temperature * share()[t];
      const T through_cosine = grad_cosine * cosine()[t];
      const T of_inner = grad_cosine / (norm(w2) * norm(c2)), of_square = clamped(c2) ? T(0) : -through_cosine / c2;
      of_itself[t] = clamped(w2) ? T(0) : -through_cosine / w2;
      grad_inner()[t] = of_inner;
      twice_grad_square()[t] = of_square;
      through_softmax_over_patches(t, of_inner, of_square);
    }
    for (int64_t t = 0; t < t_; ++t) through_softmax_over_tokens(t, grad_scores + t * stride_);
  }

  // After backward(): adds what comes through |c|^2 to the gradients of the patches (P, stride of the patches) or,
  // where it came by the Gram matrix, to twice that matrix's gradient (P, stride), of which the upper half is right.
  void add_square(T* grad_patches, T* grad_gram) {
    T* scaled = by_gram_ ? product_.get() : attended_.get();
    const T* factor = by_gram_ ? b_.get() : attended_.get();
    const int64_t distance = by_gram_ ? stride_ : patches_.stride, columns = by_gram_ ? p_ : patches_.width;
    for (int64_t t = 0; t < t_; ++t)
      for (int64_t i = 0; i < columns; i += kWidth<T>)
        store(scaled + t * distance + i, load(factor + t * distance + i) * twice_grad_square()[t]);
    if (by_gram_) {
      for (int64_t p = 0; p < p_; p += kPanel<T>)
        matmul<T>(
            std::min(p_, p + kPanel<T>), std::min(kPanel<T>, p_ - p), t_,
            {b_.get(), 1, stride_, scaled + p, stride_, grad_gram + p, stride_}, true);
    } else {
      matmul<T>(
          p_, patches_.width, t_, {b_.get(), 1, stride_, scaled, distance, grad_patches, patches_.stride}, true);
    }
  }

  // The rest of the gradient of the patches, once all reports are in `twice_grad_gram`.
  void finish_patches(T* twice_grad_gram, T* grad_patches) const {
    if (!by_gram_) return;
    mirror(twice_grad_gram);
    matmul<T>(
        p_, patches_.width, p_,
        {twice_grad_gram, stride_, 1, v_, patches_.stride, grad_patches, patches_.stride}, true);
  }

 private:
  static constexpr T kEpsilon = T(1e-8);
  static constexpr T kSafeTemperature = T(8);  // below -8 an exponent's own rounding would show in the result
  static constexpr int64_t kPerToken = 6;

  static bool clamped(T square) { return square < kEpsilon * kEpsilon; }
  static T norm(T square) { return clamped(square) ? kEpsilon : std::sqrt(square); }

  // Numbers of the tokens of the report: |c|^2, <w, c>, cosine, its softmax, and gradients of <w, c> and |c|^2.
  T* square() { return per_token_.get(); }
  T* inner() { return per_token_.get() + padded(most_tokens_); }
  T* cosine() { return per_token_.get() + 2 * padded(most_tokens_); }
  T* share() { return per_token_.get() + 3 * padded(most_tokens_); }
  T* grad_inner() { return per_token_.get() + 4 * padded(most_tokens_); }
  T* twice_grad_square() { return per_token_.get() + 5 * padded(most_tokens_); }
  const T* token_square(int64_t report) const { return problem_.token_square.data() + tokens_.start[report]; }

  // The upper half of a (P, P) matrix to the lower.
  void mirror(T* matrix) const {
    const int64_t blocks = p_ / 4 * 4;
    for (int64_t p = 0; p < blocks; p += 4)
      for (int64_t k = 0; k < p; k += 4)
        transpose_4x4(matrix + k * stride_ + p, stride_, matrix + p * stride_ + k, stride_);
    for (int64_t p = 0; p < p_; ++p)
      for (int64_t k = p < blocks ? p / 4 * 4 : 0; k < p; ++k) matrix[p * stride_ + k] = matrix[k * stride_ + p];
  }

  // rows (T, D) times V^T
  void times_transposed(const T* rows, T* out) const {
    matmul_panels<T>(t_, p_, patches_.width, rows, patches_.stride, transposed_.get(), out, stride_);
  }

  // The scores, panel by panel, and a, the softmax over the tokens, of each while it is in the first-level cache. A
  // product that packs the tokens for itself is better done at once.
  void score() {
    const int64_t columns = MPMA_BFLOAT16 ? p_ : kPanel<T>;
    for (int64_t p = 0; p < p_; p += columns) {
      const int64_t real = std::min(columns, p_ - p);
      const T* panels = transposed_.get() + p * patches_.width;
      matmul_panels_rounded<T>(t_, real, patches_.width, w_, patches_.stride, panels, scores_.get() + p, stride_);
      for (int64_t q = p; q < p + real; q += kWidth<T>) softmax_over_tokens(q);
    }
  }

  void softmax_over_tokens(int64_t p) {
    const T* scores = scores_.get() + p;
    T* a = a_.get() + p;
    Vector<T> top = load(scores), sum = {};
    for (int64_t t = 1; t < t_; ++t) {
      const Vector<T> x = load(scores + t * stride_);
      top = x > top ? x : top;
    }
    for (int64_t t = 0; t < t_; ++t) {
      const Vector<T> e = exp_nonpositive(load(scores + t * stride_) - top);
      store(a + t * stride_, e);
      sum += e;
    }
    const Vector<T> inverse = T(1) / sum;
    for (int64_t t = 0; t < t_; ++t) store(a + t * stride_, load(a + t * stride_) * inverse);
  }

  // b, and <w, c> = sum over the patches of b times the scores. a lies in [0, 1], so that a shift by the temperature
  // does for the largest exponent: none is below minus the temperature's size.
  void softmax_over_patches(int64_t t) {
    const T *a = a_.get() + t * stride_, *scores = scores_.get() + t * stride_;
    T* b = b_.get() + t * stride_;
    const T temperature = problem_.attention_temperature;
    const T top = std::abs(temperature) <= kSafeTemperature ? std::max(temperature, T(0)) : largest_exponent(a);
    Vector<T> sums = {}, product = {};
    for (int64_t p = 0; p < p_; p += kWidth<T>) {
      const Vector<T> e = exp_nonpositive(load(a + p) * temperature - top + load(hidden_.get() + p));
      store(b + p, e);
      sums += e;
      product += e * load(scores + p);
    }
    const T inverse = T(1) / sum_lanes<T>(sums);
    for (int64_t p = 0; p < p_; p += kWidth<T>) store(b + p, load(b + p) * inverse);
    inner()[t] = sum_lanes<T>(product) * inverse;
  }

  T largest_exponent(const T* a) const {
    Vector<T> top = Vector<T>{} - std::numeric_limits<T>::infinity();
    for (int64_t p = 0; p < p_; p += kWidth<T>) {
      const Vector<T> x = load(a + p) * problem_.attention_temperature + load(hidden_.get() + p);
      top = x > top ? x : top;
    }
    return fold_lanes<T>(top, Larger{})[0];
  }

  T log_sum_exp() {
    T top = -std::numeric_limits<T>::infinity(), sum = 0;
    for (int64_t t = 0; t < t_; ++t) top = std::max(top, problem_.pooling_temperature * cosine()[t]);
    for (int64_t t = 0; t < t_; ++t) share()[t] = problem_.pooling_temperature * cosine()[t] - top;
    std::fill(share() + t_, share() + padded(t_), -std::numeric_limits<T>::infinity());
    for (int64_t t = 0; t < t_; t += kWidth<T>) store(share() + t, exp_nonpositive(load(share() + t)));
    for (int64_t t = 0; t < t_; ++t) sum += share()[t];
    for (int64_t t = 0; t < t_; ++t) share()[t] /= sum;
    return top + std::log(sum);
  }

  // From the gradient of b to that of the scores through a, before the softmax over tokens:
  // e = attention_temperature * b (db - sum b db), and adds a e to the columns' sums.
  void through_softmax_over_patches(int64_t t, T of_inner, T of_square) {
    const int64_t row = t * stride_;
    const T mean = of_inner * inner()[t] + of_square * square()[t];
    for (int64_t p = 0; p < p_; p += kWidth<T>) {
      const Vector<T> of_b = of_inner * load(scores_.get() + row + p) + of_square * load(product_.get() + row + p);
      const Vector<T> e = problem_.attention_temperature * load(b_.get() + row + p) * (of_b - mean);
      store(product_.get() + row + p, e);
      store(column_.get() + p, load(column_.get() + p) + load(a_.get() + row + p) * e);
    }
  }

  void through_softmax_over_tokens(int64_t t, T* grad_scores) {
    const int64_t row = t * stride_;
    for (int64_t p = 0; p < p_; p += kWidth<T>) {
      const Vector<T> a = load(a_.get() + row + p);
      const Vector<T> through_a = a * (load(product_.get() + row + p) - load(column_.get() + p));
      store(grad_scores + p, grad_inner()[t] * load(b_.get() + row + p) + through_a);
    }
  }

  const SimilarityProblem<T>& problem_;
  const cpu::RealRows<T>&tokens_, &patches_;
  bool backward_, by_gram_ = true;
  int64_t stride_, most_tokens_, p_ = 0, t_ = 0;
  const T *v_ = nullptr, *w_ = nullptr;
  cpu::Buffer<T> transposed_, gram_, hidden_, scores_, a_, b_, product_, attended_;
  cpu::Buffer<T> column_, per_token_;
};

template <typename T>
void forward(const SimilarityProblem<T>& problem, T* out) {
  const int64_t reports = problem.tokens.items, images = problem.patches.items;
  const int64_t work = problem.tokens.length * problem.patches.length * problem.tokens.width;
  torch::stable::parallel_for(0, reports * images, cpu::grain(work), [&](int64_t begin, int64_t end) {
    Pair<T> pair(problem, false);
    int64_t image = -1;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t report = i % reports;
      const bool something = problem.tokens.count(report) > 0 && problem.patches.count(i / reports) > 0;
      if (something && image != i / reports) pair.set_image(image = i / reports);
      out[report * images + i / reports] = something ? pair.similarity(report) : T(0);
    }
  });
}

// Scores of one image whose gradients are held between the two halves of the backward: 4 MB of float32.
constexpr int64_t kHeldScores = 1 << 20;

// The backward goes through blocks of images and, within, blocks of reports. Threads first share out the images, each
// adding to the gradient of its own and keeping the gradients of the scores; then the tokens, each getting its own.
// Every sum runs over reports or images in their order, whatever the blocks and the number of threads.
// grad (reports, images); gradients laid out as the real rows, starting at 0, or null where not needed.
template <typename T>
void backward(const SimilarityProblem<T>& problem, const T* grad, T* grad_tokens, T* grad_patches) {
  const auto &tokens = problem.tokens, &patches = problem.patches;
  const int64_t stride = row_distance(patches.largest_count()), threads = torch::stable::get_num_threads();
  const int64_t images_held = std::min<int64_t>(patches.items, 4 * threads);
  const int64_t rows_held = std::min(tokens.rows(), std::max(kHeldScores / stride, tokens.largest_count()));
  const cpu::Buffer<T> held(images_held * rows_held * stride), of_itself(images_held * rows_held);
  const int64_t gram_size = grad_patches ? gram_rows(patches) * stride : 0;
  const cpu::Buffer<T> gram(images_held * gram_size);
  std::vector<T> sum_of_itself(tokens.rows());

  const auto image_half = [&](int64_t image0, int64_t begin, int64_t end, int64_t report0, int64_t report1) {
    Pair<T> pair(problem, true);
    for (int64_t image = begin; image < end; ++image) {
      const int64_t p = patches.count(image), slot = image - image0;
      if (p == 0) continue;
      pair.set_image(image);
      T* grad_image = grad_patches + (grad_patches ? patches.start[image] * patches.stride : 0);
      T* grad_gram = gram.get() + slot * gram_size;
      if (grad_patches && report0 == 0 && pair.by_gram()) std::fill_n(grad_gram, p * stride, T(0));
      for (int64_t report = report0; report < report1; ++report) {
        if (tokens.count(report) == 0) continue;
        const int64_t row = slot * rows_held + tokens.start[report] - tokens.start[report0];
        T* grad_scores = held.get() + row * stride;
        pair.similarity(report);
        pair.backward(report, grad[report * patches.items + image], grad_scores, of_itself.get() + row);
        if (grad_patches) pair.add_square(grad_image, grad_gram);
      }
      if (grad_patches && report1 == tokens.items) pair.finish_patches(grad_gram, grad_image);
      if (grad_patches)
        matmul_rounded<T>(
            p, patches.width, tokens.start[report1] - tokens.start[report0],
            {held.get() + slot * rows_held * stride, 1, stride, tokens.item(report0), tokens.stride, grad_image,
             patches.stride},
            true);
    }
  };
  const auto token_half = [&](int64_t image0, int64_t image1, int64_t report0, int64_t begin, int64_t end) {
    for (int64_t image = image0; image < image1; ++image) {
      if (patches.count(image) == 0) continue;
      const int64_t row = (image - image0) * rows_held + begin - tokens.start[report0];
      matmul_rounded<T>(
          end - begin, tokens.width, patches.count(image),
          {held.get() + row * stride, stride, 1, patches.item(image), patches.stride,
           grad_tokens + begin * tokens.stride, tokens.stride},
          true);
      for (int64_t i = 0; i < end - begin; ++i) sum_of_itself[begin + i] += of_itself.get()[row + i];
    }
  };

  for (int64_t image0 = 0; image0 < patches.items; image0 += images_held) {
    const int64_t image1 = std::min(patches.items, image0 + images_held);
    for (int64_t report0 = 0; report0 < tokens.items;) {
      int64_t report1 = report0 + 1;
      while (report1 < tokens.items && tokens.start[report1 + 1] - tokens.start[report0] <= rows_held) ++report1;
      const int64_t first = tokens.start[report0], last = tokens.start[report1];
      const int64_t work_of_image = (last - first) * patches.length * tokens.width;
      const int64_t work_of_token = (image1 - image0) * patches.length * tokens.width;
      torch::stable::parallel_for(image0, image1, cpu::grain(work_of_image), [&](int64_t begin, int64_t end) {
        image_half(image0, begin, end, report0, report1);
      });
      if (grad_tokens)
        torch::stable::parallel_for(first, last, cpu::grain(work_of_token), [&](int64_t begin, int64_t end) {
          token_half(image0, image1, report0, begin, end);
        });
      report0 = report1;
    }
  }
  if (!grad_tokens) return;
  torch::stable::parallel_for(0, tokens.rows(), cpu::grain(tokens.width), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      for (int64_t d = 0; d < tokens.width && sum_of_itself[row] != 0; ++d)  // a NaN by itself gives no gradient
        grad_tokens[row * tokens.stride + d] += sum_of_itself[row] * tokens.data[row * tokens.stride + d];
  });
}

}  // namespace mpma::MPMA_ISA::similarity
