// The example's launchers as C functions.
#include "emulation.h"
#include "example_kernels.h"

using namespace mpma::cuda;

#define MPMA_GEMM(NAME, T, TRANSPOSED)                                                                               \
  extern "C" const char* NAME(const void* a, const void* b, void* c, int64_t m, int64_t n, int64_t k) {             \
    return emulated([&] {                                                                                            \
      launch_gemm<T, TRANSPOSED>(                                                                                    \
          {static_cast<const T*>(a), static_cast<const T*>(b), static_cast<float*>(c), m, n, k, false}, nullptr);    \
    });                                                                                                              \
  }
MPMA_GEMM(gemm_bfloat16, Bfloat16, false)
MPMA_GEMM(gemm_bfloat16_transposed, Bfloat16, true)
MPMA_GEMM(gemm_float16, Half, false)
MPMA_GEMM(gemm_float16_transposed, Half, true)
MPMA_GEMM(gemm_float32, float, false)
MPMA_GEMM(gemm_float32_transposed, float, true)
