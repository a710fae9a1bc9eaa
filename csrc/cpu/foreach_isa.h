// Includes MPMA_ISA_BODY once for every instruction set, each time in a namespace and under a target of its own, so
// that one source gives a portable, an AVX2 and an AVX-512 version of the same functions (the pattern of
// google/highway's foreach_target.h), and a second AVX-512 version for bfloat16 operands, whose float32 products may
// round theirs to it (matmul_rounded.h). A body writes `namespace mpma::MPMA_ISA { ... }` and has no include guard:
//
//   #define MPMA_ISA_BODY "cpu/masked_attention_core.h"
//   #include "cpu/foreach_isa.h"
//   ...
//   MPMA_FASTEST(forward<T>, operands_are_bfloat16)(arguments);
//
// Beside the body every namespace holds vector.h, matmul.h and matmul_rounded.h. What they and the body include must
// stand before the `#pragma GCC target`, hence the headers here: a library function compiled for AVX-512 could replace
// the portable one in the linked library.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "cpu/isa.h"

#define MPMA_BFLOAT16 0
#define MPMA_ISA portable
#define MPMA_VECTOR_BYTES 16  // SSE2, NEON
#include "cpu/vector.h"
#include "cpu/matmul.h"
#include "cpu/matmul_rounded.h"
#include MPMA_ISA_BODY
#undef MPMA_ISA
#undef MPMA_VECTOR_BYTES

#if MPMA_MULTIPLE_ISAS

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#define MPMA_ISA avx2
#define MPMA_VECTOR_BYTES 32
#include "cpu/vector.h"
#include "cpu/matmul.h"
#include "cpu/matmul_rounded.h"
#include MPMA_ISA_BODY
#undef MPMA_ISA
#undef MPMA_VECTOR_BYTES
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#define MPMA_ISA avx512
#define MPMA_VECTOR_BYTES 64
#include "cpu/vector.h"
#include "cpu/matmul.h"
#include "cpu/matmul_rounded.h"
#include MPMA_ISA_BODY
#undef MPMA_ISA
#undef MPMA_VECTOR_BYTES
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("amx-tile,amx-bf16,avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#undef MPMA_BFLOAT16
#define MPMA_BFLOAT16 1
#define MPMA_ISA avx512_bfloat16
#define MPMA_VECTOR_BYTES 64
#include "cpu/vector.h"
#include "cpu/matmul.h"
#include "cpu/matmul_rounded.h"
#include MPMA_ISA_BODY
#undef MPMA_ISA
#undef MPMA_VECTOR_BYTES
#pragma GCC pop_options

#define MPMA_FASTEST(function, bfloat16)                                                   \
  (mpma::fastest_isa() >= mpma::Isa::kAvx512Bfloat16 && (bfloat16)                         \
       ? &mpma::avx512_bfloat16::function                                                  \
       : mpma::fastest_isa() >= mpma::Isa::kAvx512 ? &mpma::avx512::function               \
       : mpma::fastest_isa() == mpma::Isa::kAvx2   ? &mpma::avx2::function                 \
                                                   : &mpma::portable::function)
#else
#define MPMA_FASTEST(function, bfloat16) (&mpma::portable::function)
#endif
