// Qualifiers of functions that host and device code share.
#pragma once

#if defined(__CUDACC__)
#define MPMA_HOST_DEVICE __host__ __device__
#else
#define MPMA_HOST_DEVICE
#endif
