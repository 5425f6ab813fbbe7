// Action loss and advantages compiled for AVX2; see action_loss_kernel.h and gae_kernel.h.
#if defined(__x86_64__)
#define WORLDENV_TARGET "avx2,fma"
#define WORLDENV_LANES 8
#include "target.h"

#include "action_loss_kernel.h"
#include "gae_kernel.h"

WORLDENV_ACTION_KERNELS(action_kernels_avx2)

#endif
