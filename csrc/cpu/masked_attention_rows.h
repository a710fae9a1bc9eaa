// Rows of the operands to and from the type that the kernels compute in. Included by bodies of foreach_isa.h, after
// masked_attention.h.

namespace mpma::MPMA_ISA {

template <typename T>
inline void convert(const T* from, int64_t width, float* to) {
  for (int64_t d = 0; d < width; ++d) to[d] = static_cast<float>(from[d]);
}

template <typename T>
inline void convert(const float* from, int64_t width, T* to) {
  for (int64_t d = 0; d < width; ++d) to[d] = static_cast<T>(from[d]);
}

#if MPMA_VECTOR_BYTES > 16
// Half converts in software; F16C converts eight at a time.
inline void convert(const torch::headeronly::Half* from, int64_t width, float* to) {
  int64_t d = 0;
  for (; d + 8 <= width; d += 8)
    _mm256_storeu_ps(to + d, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + d))));
  convert<torch::headeronly::Half>(from + d, width - d, to + d);
}

inline void convert(const float* from, int64_t width, torch::headeronly::Half* to) {
  int64_t d = 0;
  for (; d + 8 <= width; d += 8)
    _mm_storeu_si128(
        reinterpret_cast<__m128i*>(to + d), _mm256_cvtps_ph(_mm256_loadu_ps(from + d), _MM_FROUND_TO_NEAREST_INT));
  convert<torch::headeronly::Half>(from + d, width - d, to + d);
}
#endif

#if MPMA_BFLOAT16
inline void convert(const float* from, int64_t width, torch::headeronly::BFloat16* to) {
  int64_t d = 0;
  for (; d + 16 <= width; d += 16)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + d), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(from + d)));
  convert<torch::headeronly::BFloat16>(from + d, width - d, to + d);
}
#endif

// Whether rows of these elements are computed with as they are.
template <typename A>
constexpr bool is_element(Element element) {
  return element == (std::is_same_v<A, double> ? Element::kDouble : Element::kFloat);
}

inline int64_t size_of(Element element) {
  return element == Element::kDouble ? 8 : element == Element::kFloat ? 4 : 2;
}

inline void load_row(Element element, const char* from, int64_t width, float* to) {
  using namespace torch::headeronly;
  if (element == Element::kFloat) std::memcpy(to, from, width * sizeof(float));
  if (element == Element::kBFloat16) convert(reinterpret_cast<const BFloat16*>(from), width, to);
  if (element == Element::kHalf) convert(reinterpret_cast<const Half*>(from), width, to);
}

inline void store_row(Element element, const float* from, int64_t width, char* to) {
  using namespace torch::headeronly;
  if (element == Element::kFloat) std::memcpy(to, from, width * sizeof(float));
  if (element == Element::kBFloat16) convert(from, width, reinterpret_cast<BFloat16*>(to));
  if (element == Element::kHalf) convert(from, width, reinterpret_cast<Half*>(to));
}

inline void load_row(Element, const char* from, int64_t width, double* to) {
  std::memcpy(to, from, width * sizeof(double));
}

inline void store_row(Element, const double* from, int64_t width, char* to) {
  std::memcpy(to, from, width * sizeof(double));
}

}  // namespace mpma::MPMA_ISA
