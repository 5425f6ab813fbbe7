// Frame attention compiled for AVX-512; see frame_attention_kernel.h.
#if defined(__x86_64__)
#define WORLDENV_TARGET "avx2,fma,avx512f,avx512bw,avx512vl,avx512dq"
#define WORLDENV_LANES 16
#define WORLDENV_MR 4
#define WORLDENV_NV 4
#include "target.h"

#include "frame_attention_kernel.h"

namespace worldenv {

void frame_attention_avx512_f32(const FrameAttention& a, int64_t b, int64_t h, float* scratch) {
  attend<Single, float>(a, b, h, scratch);
}
void frame_attention_avx512_bf16(const FrameAttention& a, int64_t b, int64_t h, float* scratch) {
  attend<Single, uint16_t>(a, b, h, scratch);
}
namespace {

// 16 x 16 numbers of 32 bits: first 4 x 4 within each 128-bit lane, then the lanes.
WORLDENV_INLINE void transpose(__m512i (&x)[16]) {
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 2) {
    const __m512i a = x[i], b = x[i + 1];
    x[i] = _mm512_unpacklo_epi32(a, b);
    x[i + 1] = _mm512_unpackhi_epi32(a, b);
  }
  __m512i y[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {  // y[i] in lane l: column 4 l + i % 4 of the rows from i / 4 * 4 on
    const int top = i / 4 * 4 + i % 4 / 2;
    y[i] = i % 2 ? _mm512_unpackhi_epi64(x[top], x[top + 2]) : _mm512_unpacklo_epi64(x[top], x[top + 2]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512i a = _mm512_shuffle_i32x4(y[i], y[i + 4], 0x88), b = _mm512_shuffle_i32x4(y[i], y[i + 4], 0xdd);
    const __m512i c = _mm512_shuffle_i32x4(y[i + 8], y[i + 12], 0x88), d = _mm512_shuffle_i32x4(y[i + 8], y[i + 12], 0xdd);
    x[i] = _mm512_shuffle_i32x4(a, c, 0x88);
    x[i + 8] = _mm512_shuffle_i32x4(a, c, 0xdd);
    x[i + 4] = _mm512_shuffle_i32x4(b, d, 0x88);
    x[i + 12] = _mm512_shuffle_i32x4(b, d, 0xdd);
  }
}

}  // namespace

void pack_keys_avx512(const uint32_t* from, int64_t stride, int64_t tokens, int64_t dim, uint32_t* tile) {
  for (int64_t s = 0; s < tokens; s += 16)
    for (int64_t d = 0; d < dim; d += 16) {
      __m512i x[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) x[i] = _mm512_loadu_si512(from + (s + i) * stride + d);
      transpose(x);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) _mm512_storeu_si512(tile + (d + i) * tokens + s, x[i]);
    }
}

void pack_values_avx512(const uint16_t* from, int64_t stride, int64_t tokens, int64_t dim, uint16_t* tile) {
  const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5,
                                       36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  for (int64_t s = 0; s < tokens; s += 2)
    for (int64_t d = 0; d < dim; d += 32) {
      const __m512i even = _mm512_loadu_si512(from + s * stride + d), odd = _mm512_loadu_si512(from + (s + 1) * stride + d);
      _mm512_storeu_si512(tile + s * dim + 2 * d, _mm512_permutex2var_epi16(even, low, odd));
      _mm512_storeu_si512(tile + s * dim + 2 * d + 32, _mm512_permutex2var_epi16(even, high, odd));
    }
}

void frame_attention_avx512_pairs_emulated(const FrameAttention& a, int64_t b, int64_t h, float* scratch) {
  attend<EmulatedPair, uint16_t>(a, b, h, scratch);
}

}  // namespace worldenv

#endif
