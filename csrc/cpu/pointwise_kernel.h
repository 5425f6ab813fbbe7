// RMS norm with rotary positions, and tanh-approximated GELU, compiled once per instruction set; f32 arithmetic.
//
// torch runs the first as five passes over memory and the second through a slow tanh; one pass each here.
#pragma once

#include "pointwise.h"
#include "vector.h"

namespace {

using worldenv::NormRotary;

// n (<= kLanes) numbers as floats, the rest zero; and the reverse.
WORLDENV_INLINE Vec read(const float* p, int64_t n) { return load_part(p, n); }
WORLDENV_INLINE Vec read(const uint16_t* p, int64_t n) {
  if (n >= kLanes) return widen(load_as<Half>(p));
  Half h = {};
  std::memcpy(&h, p, 2 * n);
  return widen(h);
}
WORLDENV_INLINE void write(float* p, Vec v, int64_t n) { store_part(p, v, n); }
WORLDENV_INLINE void write(uint16_t* p, Vec v, int64_t n) {
  const Half h = narrow(v);
  std::memcpy(p, &h, n >= kLanes ? sizeof(Half) : 2 * n);
}

#if defined(__clang__)
WORLDENV_INLINE Vec shuffle(Vec v, Int index) {
  Vec out;
  for (int i = 0; i < kLanes; ++i) out[i] = v[index[i]];
  return out;
}
#else
WORLDENV_INLINE Vec shuffle(Vec v, Int index) { return __builtin_shuffle(v, index); }
#endif
WORLDENV_INLINE Vec swap_pairs(Vec v) { return shuffle(v, lane_index() ^ 1); }

// (a, b) -> (a c - b s, b c + a s); direction -1 turns back.
WORLDENV_INLINE Vec rotate(Vec v, Vec rotary, float direction) {
  const Vec cosine = shuffle(rotary, lane_index() & ~1), sine = shuffle(rotary, lane_index() | 1);
  const Vec sign = pick((lane_index() & 1) != 0, splat(direction), splat(-direction));
  return v * cosine + swap_pairs(v) * (sine * sign);
}

template <class T>
WORLDENV_INLINE float inverse_rms(const T* x, int64_t width, float eps) {
  Vec squares = {};
  for (int64_t e = 0; e < width; e += kLanes) {
    const Vec v = read(x + e, width - e);
    squares += v * v;
  }
  return 1.0f / __builtin_sqrtf(sum(squares) / static_cast<float>(width) + eps);
}

template <class T>
void norm_rotary(const NormRotary<T>& a, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const T* x = a.x + r * a.stride;
    T* out = a.out + r * a.width;
    const float* turn = a.rotary + r % a.turns * a.dim;
    const float inverse = inverse_rms(x, a.width, a.eps);
    for (int64_t h = 0; h < a.width; h += a.dim)
      for (int64_t d = 0; d < a.dim; d += kLanes) {
        const int64_t n = a.dim - d;
        const Vec v = read(x + h + d, n) * inverse * load_part(a.weight + h + d, n);
        write(out + h + d, rotate(v, load_part(turn + d, n), 1.0f), n);
      }
  }
}

// With g = the gradient turned back: dx = i (w g - x i^2 mean(w g x)), dw = sum of g x i, i = 1 / rms.
template <class T>
void norm_rotary_bwd(const NormRotary<T>& a, int64_t begin, int64_t end, float* turned) {
  for (int64_t r = begin; r < end; ++r) {
    const T *x = a.x + r * a.stride, *grad = a.grad_out + r * a.width;
    T* out = a.out + r * a.width;
    const float* turn = a.rotary + r % a.turns * a.dim;
    const float inverse = inverse_rms(x, a.width, a.eps);
    Vec along = {};
    for (int64_t h = 0; h < a.width; h += a.dim)
      for (int64_t d = 0; d < a.dim; d += kLanes) {
        const int64_t n = a.dim - d;
        const Vec g = rotate(read(grad + h + d, n), load_part(turn + d, n), -1.0f);
        const Vec v = read(x + h + d, n), w = load_part(a.weight + h + d, n);
        store_part(a.grad_weight + h + d, load_part(a.grad_weight + h + d, n) + g * v * inverse, n);
        along += g * w * v;
        store_part(turned + h + d, g * w, n);
      }
    const float back = sum(along) / static_cast<float>(a.width) * inverse * inverse;
    for (int64_t e = 0; e < a.width; e += kLanes) {
      const int64_t n = a.width - e;
      write(out + e, (load_part(turned + e, n) - read(x + e, n) * back) * inverse, n);
    }
  }
}

constexpr float kSlope = 1.5957691216057308f, kCubic = 0.044715f, kLog2e = 1.4426950408889634f;  // 2 sqrt(2 / pi)

// 0.5 x (1 + tanh(u)) = x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3); 0 where 2^(-2 u log2(e)) would exceed 2^126.
WORLDENV_INLINE Vec sigmoid_of(Vec x) {
  const Vec power = x * (-kSlope * kLog2e - kSlope * kLog2e * kCubic * (x * x));
  const Vec least = splat(-126.0f), most = splat(126.0f);
  const Vec bounded = vmin(vmax(power, least), most);
  return pick(power > most, Vec{}, reciprocal(1.0f + exp2_unclamped(bounded)));
}

template <class T>
void gelu(const T* x, T* out, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vec v = read(x + i, n - i);
    write(out + i, v * sigmoid_of(v), n - i);
  }
}

template <class T>
void gelu_bwd(const T* grad, const T* x, T* out, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vec v = read(x + i, n - i), s = sigmoid_of(v);
    const Vec slope = kSlope * (1.0f + 3.0f * kCubic * v * v);
    write(out + i, read(grad + i, n - i) * (s + v * s * (1.0f - s) * slope), n - i);
  }
}

}  // namespace

#define WORLDENV_POINTWISE_KERNELS(name)                                                                         \
  worldenv::PointwiseTables worldenv::name() {                                                                   \
    return {{norm_rotary<float>, norm_rotary_bwd<float>, gelu<float>, gelu_bwd<float>},                          \
            {norm_rotary<uint16_t>, norm_rotary_bwd<uint16_t>, gelu<uint16_t>, gelu_bwd<uint16_t>}};             \
  }
