// The launchers of memory attention as C functions.
#include "cuda/memory_attention_dense.h"
#include "cuda/memory_attention_dense_backward.h"
#include "cuda/memory_attention_topk.h"
#include "cuda/memory_attention_topk_backward.h"
#include "emulation.h"

using namespace mpma;
using namespace mpma::cuda;

namespace {

// An operand and its strides of rows and heads.
template <class T>
MemoryRows<T> rows_of(const void* data, int64_t row_stride, int64_t head_stride, int64_t width) {
  return memory_rows(static_cast<const T*>(data), row_stride, head_stride, width);
}

}  // namespace

// The problem's operands, each with its strides of rows and heads.
#define MPMA_PROBLEM                                                                                                \
  const void *query, int64_t query_row, int64_t query_head, const void *key, int64_t key_row, int64_t key_head,     \
      const void *value, int64_t value_row, int64_t value_head, int64_t rows, int64_t heads, int64_t slots,         \
      int64_t width, double scale, double dropout_p, const void *seed
#define MPMA_MAKE_PROBLEM(T)                                                                                        \
  const MemoryProblem<T> m {                                                                                        \
    rows_of<T>(query, query_row, query_head, width), rows_of<T>(key, key_row, key_head, width),                     \
        rows_of<T>(value, value_row, value_head, width), rows, static_cast<int>(heads), static_cast<int>(slots),    \
        static_cast<int>(width), static_cast<float>(scale), Dropout(dropout_p, 0),                                  \
        static_cast<const int64_t*>(seed)                                                                           \
  }

#define MPMA_FORWARD(NAME, T)                                                                                       \
  extern "C" const char* NAME(MPMA_PROBLEM, int64_t topk, void* output, void* logsumexp, void* indices) {           \
    return emulated([&] {                                                                                           \
      MPMA_MAKE_PROBLEM(T);                                                                                         \
      auto* out = static_cast<T*>(output);                                                                          \
      auto* statistic = static_cast<float*>(logsumexp);                                                             \
      if (topk == 0)                                                                                                \
        launch_memory_dense<T>(m, out, statistic, nullptr);                                                         \
      else                                                                                                          \
        launch_memory_topk<T>(m, topk, out, statistic, static_cast<int32_t*>(indices), nullptr);                    \
    });                                                                                                             \
  }
MPMA_FORWARD(forward_bfloat16, Bfloat16)
MPMA_FORWARD(forward_float16, Half)
MPMA_FORWARD(forward_float32, float)

// The most shared memory of a block of any kernel that takes much of it.
extern "C" int64_t most_shared_bytes() {
  int most = shared_bytes<TopkLayout>();
  for (const int bytes :
       {shared_bytes<DenseLayout<Bfloat16, 64, 2>>(), shared_bytes<DenseLayout<Bfloat16, 128, 2>>(),
        shared_bytes<DenseLayout<float, 64, 2>>(), shared_bytes<DenseLayout<float, 128, 2>>(),
        shared_bytes<SlotRangeLayout>(1 << 30)})
    most = most > bytes ? most : bytes;
  return most;
}

extern "C" int64_t topk_segment(int64_t slots, int64_t topk) {
  return slot_segment(static_cast<int>(slots), static_cast<int>(topk));
}

// grad_output with its strides, then the gradients.
#define MPMA_GRADIENTS                                                                                              \
  const void *grad_output, int64_t grad_output_row, int64_t grad_output_head, void *grad_query, void *grad_key,     \
      void *grad_value
#define MPMA_MAKE_GRADIENTS(T)                                                                                      \
  const MemoryGradients<T> g {                                                                                      \
    rows_of<T>(grad_output, grad_output_row, grad_output_head, width), static_cast<T*>(grad_query),                 \
        static_cast<T*>(grad_key), static_cast<T*>(grad_value)                                                      \
  }

#define MPMA_TOPK_BACKWARD(NAME, T)                                                                                 \
  extern "C" const char* NAME(                                                                                      \
      MPMA_PROBLEM, MPMA_GRADIENTS, int64_t topk, const void* indices, void* counts, void* starts, void* places,    \
      void* entries) {                                                                                              \
    return emulated([&] {                                                                                           \
      MPMA_MAKE_PROBLEM(T);                                                                                         \
      MPMA_MAKE_GRADIENTS(T);                                                                                       \
      const BySlot order{                                                                                           \
          static_cast<const int32_t*>(indices), rows, m.heads, m.slots, static_cast<int>(topk),                     \
          topk_segment(slots, topk), static_cast<int32_t*>(counts), static_cast<int32_t*>(starts),                  \
          static_cast<int32_t*>(places)};                                                                           \
      launch_memory_topk_backward<T>(m, g, order, static_cast<Bytes16*>(entries), nullptr);                         \
    });                                                                                                             \
  }
MPMA_TOPK_BACKWARD(topk_backward_bfloat16, Bfloat16)
MPMA_TOPK_BACKWARD(topk_backward_float16, Half)
MPMA_TOPK_BACKWARD(topk_backward_float32, float)

#define MPMA_DENSE_BACKWARD(NAME, T)                                                                                \
  extern "C" const char* NAME(                                                                                      \
      MPMA_PROBLEM, MPMA_GRADIENTS, const void* output, int64_t output_row, int64_t output_head,                    \
      const void* logsumexp, void* delta, int64_t splits, void* key_parts, void* value_parts) {                     \
    return emulated([&] {                                                                                           \
      MPMA_MAKE_PROBLEM(T);                                                                                         \
      MPMA_MAKE_GRADIENTS(T);                                                                                       \
      const DenseGradients<T> dense{                                                                                \
          g, rows_of<T>(output, output_row, output_head, width), static_cast<const float*>(logsumexp),              \
          static_cast<float*>(delta), static_cast<int>(splits), static_cast<float*>(key_parts),                     \
          static_cast<float*>(value_parts)};                                                                        \
      launch_memory_dense_backward<T>(m, dense, nullptr);                                                           \
    });                                                                                                             \
  }
MPMA_DENSE_BACKWARD(dense_backward_bfloat16, Bfloat16)
MPMA_DENSE_BACKWARD(dense_backward_float16, Half)
MPMA_DENSE_BACKWARD(dense_backward_float32, float)
