// The kernels of masked attention for float32.
#include "cuda/masked_attention_launch.h"

namespace mpma::cuda {

MPMA_ATTENTION_LAUNCHERS(, float)

}  // namespace mpma::cuda
