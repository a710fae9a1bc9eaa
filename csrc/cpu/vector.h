// Vectors of one instruction set, by the compiler's vector extension. Included by foreach_isa.h.

namespace mpma::MPMA_ISA {

template <typename T>
struct VectorTypes {
  typedef T Plain __attribute__((vector_size(MPMA_VECTOR_BYTES)));
  typedef T Unaligned __attribute__((vector_size(MPMA_VECTOR_BYTES), aligned(sizeof(T)), may_alias));
};

template <typename T>
using Vector = typename VectorTypes<T>::Plain;

template <typename T>
constexpr int kWidth = MPMA_VECTOR_BYTES / sizeof(T);

template <typename T>
inline Vector<T> load(const T* p) {
  return *reinterpret_cast<const typename VectorTypes<T>::Unaligned*>(p);
}

template <typename T>
inline void store(T* p, Vector<T> v) {
  *reinterpret_cast<typename VectorTypes<T>::Unaligned*>(p) = v;
}

// A product that is rounded before anything is added to it: no fused multiply-add. Scores in the backward are to be the
// forward's to the last bit, or their difference to the log-sum-exp is as wrong as that bit is large.
template <typename T>
inline Vector<T> rounded(Vector<T> product) {
#if defined(__x86_64__)
  asm("" : "+v"(product));
#elif defined(__aarch64__)
  asm("" : "+w"(product));
#endif
  return product;
}

template <int kStep, typename T, int... kLanes>
inline Vector<T> swap_lanes(Vector<T> v, std::integer_sequence<int, kLanes...>) {
  return __builtin_shufflevector(v, v, (kLanes ^ kStep)...);
}

// All lanes combined, in every lane.
template <typename T, int kStep = kWidth<T> / 2, typename Combine>
inline Vector<T> fold_lanes(Vector<T> v, const Combine& combine) {
  v = combine(v, swap_lanes<kStep, T>(v, std::make_integer_sequence<int, kWidth<T>>()));
  if constexpr (kStep > 1) return fold_lanes<T, kStep / 2>(v, combine);
  return v;
}

// Structs, because GCC compiles a lambda inside a template for the portable target.
struct Sum {
  template <typename V>
  V operator()(V x, V y) const {
    return x + y;
  }
};

struct Larger {  // of x and y; a NaN in x is passed over
  template <typename V>
  V operator()(V x, V y) const {
    return x > y ? x : y;
  }
};

template <typename T>
inline T sum_lanes(Vector<T> v) {
  return fold_lanes<T>(v, Sum{})[0];
}

// A bit a lane of a comparison's result.
template <typename I>
inline uint32_t lane_bits(Vector<I> mask) {
#if !defined(__x86_64__)
  uint32_t bits = 0;
  for (int lane = 0; lane < kWidth<I>; ++lane) bits |= static_cast<uint32_t>(mask[lane] != 0) << lane;
  return bits;
#elif MPMA_VECTOR_BYTES == 16
  return sizeof(I) == 4 ? _mm_movemask_ps((__m128)mask) : _mm_movemask_pd((__m128d)mask);
#elif MPMA_VECTOR_BYTES == 32
  return sizeof(I) == 4 ? _mm256_movemask_ps((__m256)mask) : _mm256_movemask_pd((__m256d)mask);
#else
  return sizeof(I) == 4 ? _mm512_movepi32_mask((__m512i)mask) : _mm512_movepi64_mask((__m512i)mask);
#endif
}

// Products of the even 32-bit lanes with a factor, as 64-bit lanes.
inline Vector<uint64_t> multiply_even(Vector<uint32_t> x, uint32_t factor) {
#if !defined(__x86_64__)
  const Vector<uint64_t> low = (Vector<uint64_t>)x & 0xFFFFFFFF;
  return low * factor;
#elif MPMA_VECTOR_BYTES == 16
  return (Vector<uint64_t>)_mm_mul_epu32((__m128i)x, _mm_set1_epi64x(factor));
#elif MPMA_VECTOR_BYTES == 32
  return (Vector<uint64_t>)_mm256_mul_epu32((__m256i)x, _mm256_set1_epi64x(factor));
#else
  return (Vector<uint64_t>)_mm512_maskz_mul_epu32(0xFF, (__m512i)x, _mm512_set1_epi64(factor));
#endif
}

// e^x within 1.5 ulp: e^x = 2^n e^r with n = round(x / ln 2), and e^r = 1 + r + r^2 q(r) with the q of degree 4 that
// has the least relative error on |r| <= ln 2 / 2 (3e-9). NaN stays NaN, overflow gives inf, underflow is gradual.
inline Vector<float> exp(Vector<float> x) {
  typedef int32_t Integers __attribute__((vector_size(MPMA_VECTOR_BYTES)));
  const Vector<float> zero = {}, low = zero - 104.0f, high = zero + 89.0f;
  x = low > x ? low : x;  // in this order one instruction each, which keeps a NaN
  x = high < x ? high : x;
  // Adding 1.5 * 2^23 leaves the nearest integer in the low bits of the sum.
  const Vector<float> shifted = x * 1.44269504f + 12582912.0f;
  const Vector<float> n = shifted - 12582912.0f;
  const Integers exponent = (Integers)shifted - 0x4B400000;
  const Vector<float> r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts, n times the first exact
  Vector<float> q = r * 1.38138805e-3f + 8.36906303e-3f;
  q = q * r + 4.16684225e-2f;
  q = q * r + 0.166665182f;
  q = q * r + 0.49999994f;
  const Vector<float> e = q * (r * r) + r + 1.0f;
  // 2^n in two factors, since n reaches beyond the exponents of normal numbers.
  const Integers half = exponent >> 1;
  return e * (Vector<float>)((half + 127) << 23) * (Vector<float>)((exponent - half + 127) << 23);
}

inline Vector<double> exp(Vector<double> x) {
  for (int lane = 0; lane < kWidth<double>; ++lane) x[lane] = std::exp(x[lane]);
  return x;
}

// The same for x <= 0, where 2^n is never too large for one factor: half the instructions. Below 2^-126.5 it is 0.
inline Vector<float> exp_nonpositive(Vector<float> x) {
  typedef int32_t Integers __attribute__((vector_size(MPMA_VECTOR_BYTES)));
  const Vector<float> zero = {}, low = zero - 88.02969f;  // -127 ln 2, at which the factor below is 0
  x = low > x ? low : x;
  const Vector<float> shifted = x * 1.44269504f + 12583039.0f;  // 1.5 * 2^23 + 127, the exponent's bias
  const Vector<float> n = shifted - 12583039.0f;
  const Vector<float> r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vector<float> q = r * 1.38138805e-3f + 8.36906303e-3f;
  q = q * r + 4.16684225e-2f;
  q = q * r + 0.166665182f;
  q = q * r + 0.49999994f;
  return (q * (r * r) + r + 1.0f) * (Vector<float>)((Integers)shifted << 23);
}

inline Vector<double> exp_nonpositive(Vector<double> x) { return exp(x); }

}  // namespace mpma::MPMA_ISA
