// Frame attention compiled for AVX2; see frame_attention_kernel.h.
#if defined(__x86_64__)
#define WORLDENV_TARGET "avx2,fma"
#define WORLDENV_LANES 8
#define WORLDENV_MR 6
#define WORLDENV_NV 2
#include "target.h"

#include "frame_attention_kernel.h"

namespace worldenv {

void frame_attention_avx2_f32(const FrameAttention& a, int64_t b, int64_t h, float* scratch) {
  attend<Single, float>(a, b, h, scratch);
}
void frame_attention_avx2_bf16(const FrameAttention& a, int64_t b, int64_t h, float* scratch) {
  attend<Single, uint16_t>(a, b, h, scratch);
}

}  // namespace worldenv

#endif
