// The kernels of masked attention for bfloat16.
#include "cuda/masked_attention_launch.h"

namespace mpma::cuda {

MPMA_ATTENTION_LAUNCHERS(, Bfloat16)

}  // namespace mpma::cuda
