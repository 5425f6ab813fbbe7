// Action loss compiled for any CPU; see action_loss_kernel.h.
#define WORLDENV_LANES 4
#include "target.h"

#include "action_loss_kernel.h"

WORLDENV_ACTION_KERNELS(action_kernels_portable)
