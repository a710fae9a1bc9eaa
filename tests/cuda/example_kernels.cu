// What nvcc compiles of the example.
#include "example_kernels.h"

namespace mpma::cuda {
template void launch_gemm<Bfloat16, false>(GemmArguments<Bfloat16>, void*);
template void launch_gemm<Half, true>(GemmArguments<Half>, void*);
template void launch_gemm<float, false>(GemmArguments<float>, void*);
template void launch_gemm<float, true>(GemmArguments<float>, void*);
}  // namespace mpma::cuda
