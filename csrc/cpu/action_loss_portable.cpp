// Action loss and advantages compiled for any CPU; see action_loss_kernel.h and gae_kernel.h.
#define WORLDENV_LANES 4
#include "target.h"

#include "action_loss_kernel.h"
#include "gae_kernel.h"

WORLDENV_ACTION_KERNELS(action_kernels_portable)
