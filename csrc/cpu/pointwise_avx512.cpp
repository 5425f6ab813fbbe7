// Norm with rotary positions, and GELU, compiled for AVX-512; see pointwise_kernel.h.
#if defined(__x86_64__)
#define WORLDENV_TARGET "avx2,fma,avx512f,avx512bw,avx512vl,avx512dq"
#define WORLDENV_LANES 16
#include "target.h"

#include "pointwise_kernel.h"

WORLDENV_POINTWISE_KERNELS(pointwise_kernels_avx512)

#endif
