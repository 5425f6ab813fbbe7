// Vectors of WORLDENV_LANES floats in the compiler's own vector extension: one source for AVX-512, AVX2, SSE and
// NEON. Included after WORLDENV_LANES is set and the target switched; everything is internal to the including file.
#pragma once

#include <cstdint>
#include <cstring>

namespace {

constexpr int kLanes = WORLDENV_LANES;

typedef float Vec __attribute__((vector_size(4 * WORLDENV_LANES)));
typedef int32_t Int __attribute__((vector_size(4 * WORLDENV_LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * WORLDENV_LANES)));
typedef uint16_t Half __attribute__((vector_size(2 * WORLDENV_LANES)));

#define WORLDENV_INLINE inline __attribute__((always_inline))
#define WORLDENV_LAMBDA __attribute__((always_inline))

template <class V, class T>
WORLDENV_INLINE V load_as(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}
WORLDENV_INLINE Vec load(const float* p) { return load_as<Vec>(p); }
template <class V, class T>
WORLDENV_INLINE void store(T* p, V v) { std::memcpy(p, &v, sizeof(V)); }

WORLDENV_INLINE Vec splat(float x) { return x - Vec{}; }
WORLDENV_INLINE Vec pick(Int condition, Vec yes, Vec no) { return condition ? yes : no; }
WORLDENV_INLINE Vec absolute(Vec x) { return (Vec)((Bits)x & 0x7fffffffu); }
// Comparisons with NaN are false: vmax(a, b) ignores a NaN in b and keeps one in a.
WORLDENV_INLINE Vec vmax(Vec a, Vec b) { return pick(b > a, b, a); }
WORLDENV_INLINE Vec vmin(Vec a, Vec b) { return pick(b < a, b, a); }

// The larger of |a| and |b|; ignores a NaN in b.
WORLDENV_INLINE Vec largest_magnitude(Vec a, Vec b) {
#if WORLDENV_LANES == 16 && defined(__x86_64__)
  return (Vec)_mm512_range_ps((__m512)a, (__m512)b, 0b1011);
#else
  return vmax(a, absolute(b));
#endif
}

// 1 / x to 1e-7 relative for 1 <= x <= 2^126; a division of 16 lanes takes as long as twenty multiplications.
WORLDENV_INLINE Vec reciprocal(Vec x) {
#if WORLDENV_LANES == 16 && defined(__x86_64__)
  const Vec r = (Vec)_mm512_rcp14_ps((__m512)x);
  return r * (2.0f - x * r);
#else
  return 1.0f / x;
#endif
}

WORLDENV_INLINE float sum(Vec v) {
  float s = 0;
  for (int i = 0; i < kLanes; ++i) s += v[i];
  return s;
}
WORLDENV_INLINE float largest(Vec v) {
  float s = v[0];
  for (int i = 1; i < kLanes; ++i) s = v[i] > s ? v[i] : s;
  return s;
}
WORLDENV_INLINE Int lane_index() {
  Int v;
  for (int i = 0; i < kLanes; ++i) v[i] = i;
  return v;
}

// 2^f to 1e-7 relative on [-1/2, 1/2], a minimax polynomial.
WORLDENV_INLINE Vec exp2_near(Vec f) {
  Vec p = splat(1.3276471874e-03f);
  p = p * f + 9.6755413335e-03f;
  p = p * f + 5.5507132739e-02f;
  p = p * f + 2.4022119724e-01f;
  p = p * f + 6.9314696706e-01f;
  return p * f + 1.0f;
}
// 2^x to 1e-7 relative for |x| <= 126; `exp2v` clamps what lies outside, NaN stays NaN.
WORLDENV_INLINE Vec exp2_unclamped(Vec x) {
  const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to the nearest integer
  const Vec shifted = x + magic;
  const Vec p = exp2_near(x - (shifted - magic));
  return (Vec)((Bits)p + ((Bits)shifted << 23));
}
WORLDENV_INLINE Vec exp2v(Vec x) {
  const Vec low = splat(-126.0f), high = splat(126.0f);
  Vec y = pick(x < low, low, x);
  y = pick(y > high, high, y);
  return pick(x == x, exp2_unclamped(y), x);
}
// e^x to 2e-7 relative; overflows to infinity, underflows to 0, NaN stays NaN.
#if WORLDENV_LANES == 16 && defined(__x86_64__)
WORLDENV_INLINE Vec expv(Vec x) {
  const __m512 low = _mm512_set1_ps(-104.0f), high = _mm512_set1_ps(89.0f);  // of NaN and a bound, NaN: it comes second
  const Vec y = (Vec)_mm512_min_ps(high, _mm512_max_ps(low, (__m512)x));
  const Vec n = (Vec)_mm512_roundscale_ps((__m512)(y * 1.44269504088896341f), 0x08);
  const Vec r = (y - n * 0.693145751953125f) - n * 1.428606765330187e-06f;
  return (Vec)_mm512_scalef_ps((__m512)exp2_near(r * 1.44269504088896341f), (__m512)n);
}
#else
WORLDENV_INLINE Vec expv(Vec x) {
  const Vec n = x * 1.44269504088896341f + 12582912.0f - 12582912.0f;
  const Vec r = (x - n * 0.693145751953125f) - n * 1.428606765330187e-06f;
  const Vec y = exp2_unclamped(r * 1.44269504088896341f);
  const Vec half = (Vec)(((Bits)(n * 0.5f + 12582912.0f) - 0x4b400000u + 127u) << 23);  // 2^(n/2), in two steps
  const Vec rest = n - ((n * 0.5f + 12582912.0f) - 12582912.0f);
  const Vec other = (Vec)(((Bits)(rest + 12582912.0f) - 0x4b400000u + 127u) << 23);
  Vec e = y * half * other;
  e = pick(x > 88.72283f, splat(__builtin_inff()), e);
  e = pick(x < -87.3f, Vec{}, e);
  return pick(x == x, e, x);
}
#endif

// The first n (< kLanes allowed) floats of p, the rest zero; and the reverse.
WORLDENV_INLINE Vec load_part(const float* p, int64_t n) {
  if (n >= kLanes) return load(p);
  Vec v = {};
  std::memcpy(&v, p, 4 * n);
  return v;
}
WORLDENV_INLINE void store_part(float* p, Vec v, int64_t n) {
  if (n >= kLanes) store(p, v);
  else std::memcpy(p, &v, 4 * n);
}

WORLDENV_INLINE Vec widen(Half h) { return (Vec)(__builtin_convertvector(h, Bits) << 16); }
WORLDENV_INLINE Half narrow(Vec x) {  // round to nearest even; NaN stays NaN
  const Bits bits = (Bits)x;
  const Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Bits nan = (bits >> 16) | 0x40u;
  return __builtin_convertvector((Bits)(x == x ? (Int)rounded : (Int)nan), Half);
}

}  // namespace
