// Frame attention compiled for AVX-512 with bf16 dot products (vdpbf16ps); see frame_attention_kernel.h.
#if defined(__x86_64__)
#define WORLDENV_TARGET "avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16"
#define WORLDENV_LANES 16
#define WORLDENV_MR 6
#define WORLDENV_NV 4
#include "target.h"

#include "frame_attention_kernel.h"

namespace {

struct HardwarePair {
  using Element = uint32_t;
  using Probability = uint16_t;
  static WORLDENV_INLINE Vec multiply_add(Vec sum, uint32_t a, Vec b) {
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32((int)a), (__m512bh)b);
  }
  static WORLDENV_INLINE Vec put(uint16_t* p, Vec x) {
    const Half half = (Half)_mm512_cvtneps_pbh((__m512)x);
    store(p, half);
    return widen(half);
  }
};

}  // namespace

namespace worldenv {

void frame_attention_avx512_pairs(const FrameAttention& a, int64_t b, int64_t h, float* scratch) {
  attend<HardwarePair, uint16_t>(a, b, h, scratch);
}

}  // namespace worldenv

#endif
