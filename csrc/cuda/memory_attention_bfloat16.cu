// The kernels of memory attention for bfloat16.
#include "cuda/memory_attention_launch.h"

namespace mpma::cuda {

MPMA_MEMORY_LAUNCHERS(, Bfloat16)

}  // namespace mpma::cuda
