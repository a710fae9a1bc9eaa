// The launchers of masked attention as C functions. What is not a pointer to the machine's memory comes in one array of
// integers on the host, in the order in which Reader takes it.
#include "cuda/masked_attention_backward.h"
#include "cuda/masked_attention_forward.h"
#include "cuda/masked_attention_offsets.h"
#include "emulation.h"

using namespace mpma::cuda;

namespace {

class Reader {
 public:
  explicit Reader(const int64_t* numbers) : next_(numbers) {}

  int64_t number() { return *next_++; }
  template <class T>
  T* pointer() {
    return reinterpret_cast<T*>(number());
  }
  // Data, and the steps of an item, a row and a head.
  template <class T>
  Rows<T> rows() {
    Rows<T> r;
    r.data = pointer<T>();
    r.item = number(), r.row = number(), r.head = number();
    return r;
  }
  template <class T>
  Attention<T> attention(double scale, double kept) {
    Attention<T> a;
    a.query = rows<const T>(), a.key = rows<const T>(), a.value = rows<const T>();
    a.mask = rows<const uint8_t>();
    a.offsets_q = pointer<const int32_t>(), a.offsets_k = pointer<const int32_t>();
    a.sizes.items = static_cast<int>(number()), a.sizes.heads = static_cast<int>(number());
    a.sizes.queries = static_cast<int>(number()), a.sizes.keys = static_cast<int>(number());
    a.sizes.query_rows = number(), a.sizes.key_rows = number();
    a.sizes.width = static_cast<int>(number());
    a.scale = static_cast<float>(scale);
    a.dropout.seed = pointer<const int64_t>();
    a.dropout.threshold = static_cast<uint32_t>(number());
    a.dropout.kept = static_cast<float>(kept);
    a.aligned =
        aligned_rows(a.query) && aligned_rows(a.key) && aligned_rows(a.value) && a.sizes.width % kVector<T> == 0;
    return a;
  }

 private:
  const int64_t* next_;
};

template <class T>
void forward(Reader reader, double scale, double kept) {
  const auto a = reader.attention<T>(scale, kept);
  AttentionOutputs<T> to;
  to.output = reader.rows<T>(), to.logsumexp = reader.rows<float>();
  launch_attention_forward(a, to, nullptr);
}

template <class T>
void backward(Reader reader, double scale, double kept) {
  const auto a = reader.attention<T>(scale, kept);
  AttentionGradients<T> g;
  g.grad_output = reader.rows<const T>(), g.output = reader.rows<const T>();
  g.logsumexp = reader.rows<const float>();
  g.query = reader.rows<T>(), g.key = reader.rows<T>(), g.value = reader.rows<T>();
  g.aligned = aligned_rows(g.grad_output) && aligned_rows(g.output) && a.sizes.width % kVector<T> == 0;
  launch_attention_backward(a, g, Device{}, nullptr);
}

}  // namespace

extern "C" const char* clean_offsets(
    const void* from_q, const void* from_k, void* to_q, void* to_k, int64_t count, int64_t step_q, int64_t step_k,
    int64_t rows_q, int64_t rows_k) {
  return emulated([&] {
    launch_clean_offsets(
        {{static_cast<const int32_t*>(from_q), static_cast<const int32_t*>(from_k)},
         {step_q, step_k},
         {rows_q, rows_k},
         {static_cast<int32_t*>(to_q), static_cast<int32_t*>(to_k)},
         count},
        nullptr);
  });
}

#define MPMA_ATTENTION(NAME, T)                                                                                    \
  extern "C" const char* forward_##NAME(const void* numbers, double scale, double kept) {                         \
    return emulated([&] { forward<T>(Reader(static_cast<const int64_t*>(numbers)), scale, kept); });              \
  }                                                                                                                \
  extern "C" const char* backward_##NAME(const void* numbers, double scale, double kept) {                        \
    return emulated([&] { backward<T>(Reader(static_cast<const int64_t*>(numbers)), scale, kept); });             \
  }
MPMA_ATTENTION(bfloat16, Bfloat16)
MPMA_ATTENTION(float16, Half)
MPMA_ATTENTION(float32, float)
