// The kernels of memory attention for one instruction set. Included by foreach_isa.h, after memory_attention.h.

#include "cpu/memory_panels.h"
#include "cpu/memory_select.h"
#include "cpu/memory_gather.h"
#include "cpu/memory_topk.h"
#include "cpu/memory_dense.h"
