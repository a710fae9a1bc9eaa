// The kernels of memory attention for float32.
#include "cuda/memory_attention_launch.h"

namespace mpma::cuda {

MPMA_MEMORY_LAUNCHERS(, float)

}  // namespace mpma::cuda
