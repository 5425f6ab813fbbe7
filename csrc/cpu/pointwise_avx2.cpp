// Norm with rotary positions, and GELU, compiled for AVX2; see pointwise_kernel.h.
#if defined(__x86_64__)
#define WORLDENV_TARGET "avx2,fma"
#define WORLDENV_LANES 8
#include "target.h"

#include "pointwise_kernel.h"

WORLDENV_POINTWISE_KERNELS(pointwise_kernels_avx2)

#endif
