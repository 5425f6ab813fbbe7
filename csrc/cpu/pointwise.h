// Arguments of the denoiser's pointwise kernels: RMS norm with rotary positions, and GELU; each with its gradient.
#pragma once

#include <cstdint>

namespace worldenv {

// Rows are tokens: R of them, E = heads * D numbers each. T is float, or uint16_t holding bf16.
template <class T>
struct NormRotary {
  const T* x;           // [R, E], rows `stride` apart
  const T* grad_out;    // [R, E], backward only
  const float* weight;  // [E]
  const float* rotary;  // [turns, D]: cosine and sine of each pair of channels; row r takes r % turns
  T* out;               // [R, E]; backward: gradient of x
  float* grad_weight;   // [E], backward only: added to
  int64_t stride, width, dim, turns;
  float eps;
};

template <class T>
struct PointwiseKernels {
  // Rows [begin, end); `scratch` holds E floats (backward).
  void (*norm_rotary)(const NormRotary<T>&, int64_t begin, int64_t end);
  void (*norm_rotary_bwd)(const NormRotary<T>&, int64_t begin, int64_t end, float* scratch);
  // Elements [0, n).
  void (*gelu)(const T* x, T* out, int64_t n);
  void (*gelu_bwd)(const T* grad, const T* x, T* out, int64_t n);
};

struct PointwiseTables {
  PointwiseKernels<float> f32;
  PointwiseKernels<uint16_t> bf16;
};

PointwiseTables pointwise_kernels_portable();
PointwiseTables pointwise_kernels_avx2();
PointwiseTables pointwise_kernels_avx512();

}  // namespace worldenv
