// Generalised advantage estimation as a parallel scan over T.
//
// A_t = delta_t + c_t A_{t+1} is a chain of affine maps x -> delta + c x, whose composition is associative: a warp takes
// one environment, each lane 1/32 of its steps. Lanes fold their steps, combine by shuffles from the far end, and
// replay their steps with the carry. Two passes over the data, log2(32) steps of latency instead of T.

#include <cuda_runtime.h>

#include "kernels.h"

namespace worldenv {
namespace {

constexpr int kWarps = 4;

template <class T>
__device__ void step(const T* reward, const T* value, const uint8_t* terminated, const uint8_t* truncated, T gamma,
                     T lam, int64_t at, int64_t batch, T& delta, T& carry) {
  const bool over = terminated[at], cut = over || truncated[at];
  // Selected, not multiplied: what follows an episode's end may hold NaN.
  delta = reward[at] + (over ? T(0) : gamma * value[at + batch]) - value[at];
  carry = cut ? T(0) : gamma * lam;
}

template <class T>
__global__ void gae_kernel(const T* reward, const T* value, const uint8_t* terminated, const uint8_t* truncated,
                           T gamma, T lam, int64_t steps, int64_t batch, T* advantage, T* target) {
  const int lane = threadIdx.x;
  const int64_t b = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.y;
  if (b >= batch) return;  // whole warps leave together
  const int64_t share = (steps + 31) / 32;
  const int64_t first = lane * share < steps ? lane * share : steps;
  const int64_t last = first + share < steps ? first + share : steps;
  T sum = T(0), factor = T(1), delta, carry;  // this lane's steps as x -> sum + factor x
  for (int64_t t = last - 1; t >= first; --t) {
    step(reward, value, terminated, truncated, gamma, lam, t * batch + b, batch, delta, carry);
    sum = carry == T(0) ? delta : delta + carry * sum;
    factor = carry * factor;
  }
  for (int offset = 1; offset < 32; offset *= 2) {
    const T far_sum = __shfl_down_sync(0xffffffffu, sum, offset);
    const T far_factor = __shfl_down_sync(0xffffffffu, factor, offset);
    if (lane + offset < 32) {
      if (factor != T(0)) sum += factor * far_sum;
      factor *= far_factor;
    }
  }
  T a = __shfl_down_sync(0xffffffffu, sum, 1);  // advantage at this lane's end
  if (lane == 31) a = T(0);
  for (int64_t t = last - 1; t >= first; --t) {
    const int64_t at = t * batch + b;
    step(reward, value, terminated, truncated, gamma, lam, at, batch, delta, carry);
    a = carry == T(0) ? delta : delta + carry * a;
    advantage[at] = a;
    target[at] = a + value[at];
  }
}

template <class T>
void launch(const Gae& a, cudaStream_t stream) {
  const dim3 block(32, kWarps), grid(static_cast<unsigned>((a.batch + kWarps - 1) / kWarps));
  gae_kernel<T><<<grid, block, 0, stream>>>(
      static_cast<const T*>(a.reward), static_cast<const T*>(a.value), a.terminated, a.truncated,
      static_cast<T>(a.gamma), static_cast<T>(a.lam), a.steps, a.batch, static_cast<T*>(a.advantage),
      static_cast<T*>(a.target));
}

}  // namespace

int launch_gae(const Gae& a, void* stream) {
  if (a.batch == 0 || a.steps == 0) return 0;
  if (a.wide) launch<double>(a, static_cast<cudaStream_t>(stream));
  else launch<float>(a, static_cast<cudaStream_t>(stream));
  return static_cast<int>(cudaGetLastError());
}

}  // namespace worldenv
