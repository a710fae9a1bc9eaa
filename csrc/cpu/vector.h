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

template <typename T>
inline T sum_lanes(Vector<T> v) {
  T sum = v[0];
  for (int lane = 1; lane < kWidth<T>; ++lane) sum += v[lane];
  return sum;
}

// e^x within 1.5 ulp: e^x = 2^n e^r with n = round(x / ln 2), and e^r = 1 + r + r^2 q(r) with the q of degree 4 that
// has the least relative error on |r| <= ln 2 / 2 (3e-9). NaN stays NaN, overflow gives inf, underflow is gradual.
inline Vector<float> exp(Vector<float> x) {
  typedef int32_t Integers __attribute__((vector_size(MPMA_VECTOR_BYTES)));
  const Vector<float> zero = {}, low = zero - 104.0f, high = zero + 89.0f;
  x = x < low ? low : x;
  x = x > high ? high : x;
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

}  // namespace mpma::MPMA_ISA
