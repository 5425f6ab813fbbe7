// Norm with rotary positions, and GELU, compiled for any CPU; see pointwise_kernel.h.
#define WORLDENV_LANES 4
#include "target.h"

#include "pointwise_kernel.h"

WORLDENV_POINTWISE_KERNELS(pointwise_kernels_portable)
