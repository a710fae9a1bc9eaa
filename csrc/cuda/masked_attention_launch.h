// The launchers of masked attention by element type; each type is compiled in a file of its own.
#pragma once

#include "cuda/masked_attention_backward.h"
#include "cuda/masked_attention_forward.h"

namespace mpma::cuda {

#define MPMA_ATTENTION_LAUNCHERS(EXTERN, T)                                                              \
  EXTERN template void launch_attention_forward<T>(const Attention<T>&, const AttentionOutputs<T>&, void*); \
  EXTERN template void launch_attention_backward<T>(                                                     \
      const Attention<T>&, const AttentionGradients<T>&, const Device&, void*);

}  // namespace mpma::cuda
