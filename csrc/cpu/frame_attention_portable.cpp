// Frame attention compiled for any CPU; see frame_attention_kernel.h.
#define WORLDENV_LANES 4
#define WORLDENV_MR 6
#if defined(__aarch64__)
#define WORLDENV_NV 4
#else
#define WORLDENV_NV 2
#endif
#include "target.h"

#include "frame_attention_kernel.h"

namespace worldenv {

void frame_attention_portable_f32(const FrameAttention& a, int64_t b, int64_t h, float* scratch) {
  attend<Single, float>(a, b, h, scratch);
}
void frame_attention_portable_bf16(const FrameAttention& a, int64_t b, int64_t h, float* scratch) {
  attend<Single, uint16_t>(a, b, h, scratch);
}

}  // namespace worldenv
