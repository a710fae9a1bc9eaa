// Columns of a matrix beside one another in memory. Included by the kernels that copy them.

namespace mpma::MPMA_ISA {

// The columns of a matrix (k, n) in panels [n / kColumns][k][kColumns], with zeros for those that the last panel lacks:
// what a product reads of either operand is then one stream of memory.
template <typename T, int64_t kColumns>
void pack_columns(const T* matrix, int64_t stride, int64_t k, int64_t n, T* panels) {
  for (int64_t row0 = 0; row0 < k; row0 += kColumnGroup)
    for (int64_t first = 0; first < n; first += kColumns)
      for (int64_t row = row0; row < std::min(k, row0 + kColumnGroup); ++row) {
        const T* from = matrix + row * stride + first;
        T* to = panels + first * k + row * kColumns;
        if (n - first >= kColumns)
          std::memcpy(to, from, kColumns * sizeof(T));
        else
          for (int64_t j = 0; j < kColumns; ++j) to[j] = j < n - first ? from[j] : T(0);
      }
}

// Numbers of such panels of n columns, by their row.
template <int64_t kColumns>
constexpr int64_t packed_width(int64_t n) {
  return (n + kColumns - 1) / kColumns * kColumns;
}

}  // namespace mpma::MPMA_ISA
