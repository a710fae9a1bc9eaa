// The launchers of the max form of token-patch similarity as C functions.
#include "cuda/token_patch_max_similarity_backward.h"
#include "cuda/token_patch_max_similarity_forward.h"
#include "emulation.h"

using namespace mpma::cuda;
using namespace mpma::cuda::max_similarity;

template <class T>
static Side<T> side(
    const void* rows, const void* mask, int64_t items, int64_t length, int64_t item_stride, int64_t row_stride,
    int64_t mask_item, int64_t mask_row) {
  return {static_cast<const T*>(rows), item_stride, row_stride, static_cast<const bool*>(mask), mask_item, mask_row,
          items, static_cast<int>(length)};
}

#define MPMA_SIDE(NAME)                                                                                           \
  const void *NAME, const void *NAME##_mask, int64_t NAME##_items, int64_t NAME##_length, int64_t NAME##_item,   \
      int64_t NAME##_row, int64_t NAME##_mask_item, int64_t NAME##_mask_row
#define MPMA_SIDE_OF(T, NAME) \
  side<T>(NAME, NAME##_mask, NAME##_items, NAME##_length, NAME##_item, NAME##_row, NAME##_mask_item, NAME##_mask_row)

#define MPMA_FORWARD(NAME, T)                                                                                     \
  extern "C" const char* NAME(                                                                                    \
      MPMA_SIDE(tokens), MPMA_SIDE(patches), int64_t width, void* to_patches, void* to_tokens, void* patch_index, \
      void* token_index, void* of_patch) {                                                                        \
    return emulated([&] {                                                                                         \
      launch_forward<T>(                                                                                          \
          {MPMA_SIDE_OF(T, tokens), MPMA_SIDE_OF(T, patches), static_cast<int>(width), false,                     \
           static_cast<float*>(to_patches), static_cast<float*>(to_tokens), static_cast<int32_t*>(patch_index),   \
           static_cast<int32_t*>(token_index), static_cast<float*>(of_patch), 0, 0},                              \
          nullptr);                                                                                               \
    });                                                                                                           \
  }
MPMA_FORWARD(forward_bfloat16, Bfloat16)
MPMA_FORWARD(forward_float16, Half)
MPMA_FORWARD(forward_float32, float)

#define MPMA_BACKWARD(NAME, T)                                                                                    \
  extern "C" const char* NAME(                                                                                    \
      MPMA_SIDE(tokens), MPMA_SIDE(patches), int64_t width, const void* grad_to_patches,                          \
      const void* grad_to_tokens, const void* patch_index, const void* token_index, void* workspace,              \
      void* grad_tokens, void* grad_patches) {                                                                    \
    return emulated([&] {                                                                                         \
      launch_backward<T>(                                                                                         \
          {MPMA_SIDE_OF(T, tokens), MPMA_SIDE_OF(T, patches), static_cast<int>(width),                            \
           static_cast<const float*>(grad_to_patches), static_cast<const float*>(grad_to_tokens),                 \
           static_cast<const int32_t*>(patch_index), static_cast<const int32_t*>(token_index),                    \
           static_cast<float*>(workspace), static_cast<T*>(grad_tokens), static_cast<T*>(grad_patches)},          \
          Device{}, nullptr);                                                                                     \
    });                                                                                                           \
  }
MPMA_BACKWARD(backward_bfloat16, Bfloat16)
MPMA_BACKWARD(backward_float16, Half)
MPMA_BACKWARD(backward_float32, float)

extern "C" int64_t backward_floats(int64_t reports, int64_t images) { return backward_workspace(reports, images); }
