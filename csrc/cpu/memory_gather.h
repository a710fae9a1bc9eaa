// Sums over rows that are picked by number: the sparse halves of top-k attention and of its gradients. Included by
// foreach_isa.h.

namespace mpma::MPMA_ISA::memory {

// Rows wanted shortly: a bank is larger than the second-level cache, and their addresses follow no pattern.
template <class T>
inline void prefetch_rows(const T* base, int64_t stride, const int32_t* numbers, int64_t count, int64_t width) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t j = 0; j < count; ++j)
    for (int64_t d = 0; d < width; d += kLine) __builtin_prefetch(base + numbers[j] * stride + d);
}

// out[j] = alpha * <x, row numbers[j] of base>
template <class T>
inline void dot_rows(
    const T* x, const T* base, int64_t stride, const int32_t* numbers, int64_t count, int64_t width, T alpha, T* out) {
  const int64_t whole = width - width % kWidth<T>;
  for (int64_t j = 0; j < count; ++j) {
    const T* row = base + numbers[j] * stride;
    Vector<T> sum = {};
    for (int64_t d = 0; d < whole; d += kWidth<T>) sum += load(x + d) * load(row + d);
    T total = sum_lanes<T>(sum);
    for (int64_t d = whole; d < width; ++d) total += x[d] * row[d];
    out[j] = alpha * total;
  }
}

constexpr int64_t kRun = 128;  // terms that are summed one after another: the error of a long sum grows with its runs

template <class T, int kVectors>
inline void add_rows_chunk(
    const T* weights, const T* base, int64_t stride, const int32_t* numbers, int64_t count, T* out) {
  Vector<T> total[kVectors] = {};
  for (int64_t start = 0; start < count; start += kRun) {
    Vector<T> sum[kVectors] = {};
    for (int64_t j = start, end = std::min(count, start + kRun); j < end; ++j) {
      const T* row = base + numbers[j] * stride;
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sum[v] += weights[j] * load(row + v * kWidth<T>);
    }
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) total[v] += sum[v];
  }
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) store(out + v * kWidth<T>, total[v]);
}

// out = sum_j weights[j] * row numbers[j] of base, in an order that depends on count alone.
template <class T>
inline void add_rows(
    const T* weights, const T* base, int64_t stride, const int32_t* numbers, int64_t count, int64_t width, T* out) {
  constexpr int kMany = 8;
  int64_t d = 0;
  for (; d + kMany * kWidth<T> <= width; d += kMany * kWidth<T>)
    add_rows_chunk<T, kMany>(weights, base + d, stride, numbers, count, out + d);
  for (; d + kWidth<T> <= width; d += kWidth<T>)
    add_rows_chunk<T, 1>(weights, base + d, stride, numbers, count, out + d);
  for (; d < width; ++d) {
    T total = 0;
    for (int64_t start = 0; start < count; start += kRun) {
      T sum = 0;
      for (int64_t j = start, end = std::min(count, start + kRun); j < end; ++j)
        sum += weights[j] * base[numbers[j] * stride + d];
      total += sum;
    }
    out[d] = total;
  }
}

}  // namespace mpma::MPMA_ISA::memory
