// The right sides of memory attention's products, packed once a call: panels of as many columns as a product sums in
// registers, each contiguous. Included by foreach_isa.h.

namespace mpma::MPMA_ISA::memory {

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Panels of rows, transposed, for products over the width: [head][row / kPanel][width][row % kPanel], with zeros for
// the rows that the last panel lacks.
template <class T>
struct RowPanels {
  int64_t width, per_head;
  cpu::Buffer<T> data;

  RowPanels(const MemoryView<T>& source, int64_t heads, int64_t rows, int64_t width)
      : width(width), per_head(round_up(rows, kPanel<T>) * width), data(heads * per_head) {
    const int64_t panels = round_up(rows, kPanel<T>) / kPanel<T>;
    torch::stable::parallel_for(0, heads * panels, 1, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        const int64_t head = item / panels, row0 = item % panels * kPanel<T>;
        const int64_t real = std::min(kPanel<T>, rows - row0);
        T* panel = data.get() + item * width * kPanel<T>;
        pack_transposed<T>(source.at(row0, head), source.row_stride, real, width, panel);
      }
    });
  }

  // c (m, columns up to a whole panel) = a (m, width) times the rows row0 ... row0 + columns - 1; row0 starts a panel.
  void multiply(
      const T* a, int64_t a_row, int64_t m, int64_t head, int64_t row0, int64_t columns, T* c, int64_t c_row) const {
    const T* panels = data.get() + head * per_head + row0 * width;
    matmul_panels_rounded<T>(m, round_up(columns, kPanel<T>), width, a, a_row, panels, c, c_row);
  }
};

// Panels of columns, for products over the rows: [head][d / kPanel][row][d % kPanel], with zeros beyond the width.
template <class T>
struct ColumnPanels {
  int64_t rows, columns;
  cpu::Buffer<T> data;

  ColumnPanels(const MemoryView<T>& source, int64_t heads, int64_t rows, int64_t width)
      : rows(rows), columns(round_up(width, kPanel<T>)), data(heads * columns * rows) {
    const int64_t panels = columns / kPanel<T>;
    torch::stable::parallel_for(0, heads * panels, 1, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        const int64_t head = item / panels, d0 = item % panels * kPanel<T>;
        T* panel = data.get() + item * rows * kPanel<T>;
        const int64_t real = std::min(kPanel<T>, width - d0);
        for (int64_t row = 0; row < rows; ++row, panel += kPanel<T>) {
          std::memcpy(panel, source.at(row, head) + d0, real * sizeof(T));
          std::fill(panel + real, panel + kPanel<T>, T(0));
        }
      }
    });
  }

  // c (m, columns) = a (m, n) times the rows row0 ... row0 + n - 1, or c += with `add`.
  void multiply(
      const T* a, int64_t a_row, int64_t m, int64_t head, int64_t row0, int64_t n, T* c, bool add) const {
    const T* panel = data.get() + head * columns * rows + row0 * kPanel<T>;
    for (int64_t j = 0; j < columns; j += kPanel<T>, panel += rows * kPanel<T>)
      matmul_rounded<T>(m, kPanel<T>, n, {a, a_row, 1, panel, kPanel<T>, c + j, columns}, add);
  }
};

// Rows by head, [head][row][width], for products that read a block of them many times, as their left or right side.
template <class T>
struct HeadRows {
  int64_t rows, stride;
  cpu::Buffer<T> data;

  HeadRows(const MemoryView<T>& source, int64_t heads, int64_t rows, int64_t width)
      : rows(rows), stride(row_distance(width)), data(heads * rows * stride) {
    torch::stable::parallel_for(0, heads * rows, 64, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        std::memcpy(data.get() + i * stride, source.at(i % rows, i / rows), width * sizeof(T));
    });
  }

  const T* at(int64_t head, int64_t row) const { return data.get() + (head * rows + row) * stride; }
};

// Rows row0 ... row0 + count - 1 of one head, near each other.
template <class T>
inline void copy_rows(
    const MemoryView<T>& from, int64_t head, int64_t row0, int64_t count, int64_t width, T* to, int64_t to_row) {
  for (int64_t i = 0; i < count; ++i) std::memcpy(to + i * to_row, from.at(row0 + i, head), width * sizeof(T));
}

}  // namespace mpma::MPMA_ISA::memory
