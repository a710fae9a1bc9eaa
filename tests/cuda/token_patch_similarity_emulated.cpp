// The launchers of token-patch similarity, softmax form, as C functions.
#include "cuda/token_patch_similarity.h"
#include "emulation.h"

using namespace mpma::cuda;

namespace {

template <class T>
SimilarityProblem<T> problem_of(const void* const* pointers, const int64_t* sizes, double attention, double pooling) {
  const auto rows = [&](int side) {
    const int64_t* s = sizes + 8 * side;
    const RealMask real = {static_cast<const uint8_t*>(pointers[2 + side]), s[6], s[7]};
    return FeatureRows<T>{static_cast<const T*>(pointers[side]), s[0], s[1], s[2], s[3], s[4], s[5], real};
  };
  return {rows(0), rows(1), static_cast<float>(attention), static_cast<float>(pooling), sizes[16]};
}

}  // namespace

// pointers: tokens, patches, their masks. sizes: of each side items, length, width and the strides of rows and mask; the
// limit of the workspace.
#define MPMA_SIMILARITY(NAME, T)                                                                                      \
  extern "C" const char* workspace_##NAME(const void* const* pointers, const int64_t* sizes, int64_t* bytes) {        \
    return emulated([&] {                                                                                             \
      for (int backward = 0; backward < 2; ++backward)                                                                \
        bytes[backward] = similarity_workspace(problem_of<T>(pointers, sizes, 0., 0.), backward != 0);                \
    });                                                                                                               \
  }                                                                                                                   \
  extern "C" const char* forward_##NAME(                                                                              \
      const void* const* pointers, const int64_t* sizes, void* workspace, void* out, double attention,                \
      double pooling) {                                                                                               \
    return emulated([&] {                                                                                             \
      const auto problem = problem_of<T>(pointers, sizes, attention, pooling);                                        \
      launch_similarity_forward(problem, workspace, static_cast<float*>(out), nullptr);                               \
    });                                                                                                               \
  }                                                                                                                   \
  extern "C" const char* backward_##NAME(                                                                             \
      const void* const* pointers, const int64_t* sizes, void* workspace, const void* grad, int64_t grad_report,      \
      int64_t grad_image, void* of_tokens, void* of_patches, double attention, double pooling) {                      \
    return emulated([&] {                                                                                             \
      const auto problem = problem_of<T>(pointers, sizes, attention, pooling);                                        \
      launch_similarity_backward(                                                                                     \
          problem, workspace, static_cast<const float*>(grad), grad_report, grad_image, static_cast<T*>(of_tokens),   \
          static_cast<T*>(of_patches), nullptr);                                                                      \
    });                                                                                                               \
  }
MPMA_SIMILARITY(bfloat16, Bfloat16)
MPMA_SIMILARITY(float16, Half)
MPMA_SIMILARITY(float32, float)
