// Rows of the operands to and from the type that the kernels compute in. Included by bodies of foreach_isa.h, after
// masked_attention.h.

namespace mpma::MPMA_ISA {

template <typename T>
inline void convert_from(const char* from, int64_t width, float* to) {
  const T* row = reinterpret_cast<const T*>(from);
  for (int64_t d = 0; d < width; ++d) to[d] = static_cast<float>(row[d]);
}

template <typename T>
inline void convert_to(const float* from, int64_t width, char* to) {
  T* row = reinterpret_cast<T*>(to);
  for (int64_t d = 0; d < width; ++d) row[d] = static_cast<T>(from[d]);
}

inline void load_row(Element element, const char* from, int64_t width, float* to) {
  if (element == Element::kFloat) std::memcpy(to, from, width * sizeof(float));
  if (element == Element::kBFloat16) convert_from<torch::headeronly::BFloat16>(from, width, to);
  if (element == Element::kHalf) convert_from<torch::headeronly::Half>(from, width, to);
}

inline void store_row(Element element, const float* from, int64_t width, char* to) {
  if (element == Element::kFloat) std::memcpy(to, from, width * sizeof(float));
  if (element == Element::kBFloat16) convert_to<torch::headeronly::BFloat16>(from, width, to);
  if (element == Element::kHalf) convert_to<torch::headeronly::Half>(from, width, to);
}

inline void load_row(Element, const char* from, int64_t width, double* to) {
  std::memcpy(to, from, width * sizeof(double));
}

inline void store_row(Element, const double* from, int64_t width, char* to) {
  std::memcpy(to, from, width * sizeof(double));
}

template <typename A>
inline void transpose_4x4(const A* from, int64_t from_row, A scale, A* to, int64_t to_row) {
  typedef A Four __attribute__((vector_size(4 * sizeof(A)), aligned(sizeof(A)), may_alias));
  const auto row = [&](int64_t i) { return reinterpret_cast<const Four*>(from + i * from_row); };
  const auto out = [&](int64_t i) { return reinterpret_cast<Four*>(to + i * to_row); };
  const Four low01 = __builtin_shufflevector(*row(0), *row(1), 0, 4, 1, 5);
  const Four high01 = __builtin_shufflevector(*row(0), *row(1), 2, 6, 3, 7);
  const Four low23 = __builtin_shufflevector(*row(2), *row(3), 0, 4, 1, 5);
  const Four high23 = __builtin_shufflevector(*row(2), *row(3), 2, 6, 3, 7);
  *out(0) = __builtin_shufflevector(low01, low23, 0, 1, 4, 5) * scale;
  *out(1) = __builtin_shufflevector(low01, low23, 2, 3, 6, 7) * scale;
  *out(2) = __builtin_shufflevector(high01, high23, 0, 1, 4, 5) * scale;
  *out(3) = __builtin_shufflevector(high01, high23, 2, 3, 6, 7) * scale;
}

}  // namespace mpma::MPMA_ISA
