// Action loss and advantages compiled for AVX-512; see action_loss_kernel.h and gae_kernel.h.
#if defined(__x86_64__)
#define WORLDENV_TARGET "avx2,fma,avx512f,avx512bw,avx512vl,avx512dq"
#define WORLDENV_LANES 16
#include "target.h"

#include "action_loss_kernel.h"
#include "gae_kernel.h"

WORLDENV_ACTION_KERNELS(action_kernels_avx512)

#endif
