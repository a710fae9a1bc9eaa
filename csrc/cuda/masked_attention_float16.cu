// The kernels of masked attention for float16.
#include "cuda/masked_attention_launch.h"

namespace mpma::cuda {

MPMA_ATTENTION_LAUNCHERS(, Half)

}  // namespace mpma::cuda
