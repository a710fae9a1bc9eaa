// The launchers of memory attention, compiled once for each element type.
#pragma once

#include "cuda/memory_attention_dense.h"
#include "cuda/memory_attention_dense_backward.h"
#include "cuda/memory_attention_topk.h"
#include "cuda/memory_attention_topk_backward.h"

// KIND: nothing where they are compiled, extern where they are called.
#define MPMA_MEMORY_LAUNCHERS(KIND, T)                                                                                \
  KIND template void launch_memory_topk<T>(const MemoryProblem<T>&, int, T*, float*, int32_t*, void*);                \
  KIND template void launch_memory_dense<T>(const MemoryProblem<T>&, T*, float*, void*);                              \
  KIND template void launch_memory_topk_backward<T>(                                                                  \
      const MemoryProblem<T>&, const MemoryGradients<T>&, const BySlot&, Bytes16*, void*);                            \
  KIND template void launch_memory_dense_backward<T>(const MemoryProblem<T>&, const DenseGradients<T>&, void*);
