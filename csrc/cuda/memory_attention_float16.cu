// The kernels of memory attention for float16.
#include "cuda/memory_attention_launch.h"

namespace mpma::cuda {

MPMA_MEMORY_LAUNCHERS(, Half)

}  // namespace mpma::cuda
