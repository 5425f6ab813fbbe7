// Launchers of the CUDA kernels: raw pointers and a stream, so that nvcc compiles them without torch's headers.
// Each returns cudaGetLastError() as an int, 0 when the launch succeeded.
#pragma once

#include <cstdint>

namespace worldenv {

struct CacheAppend {
  const void *k, *v;              // [B, S, H, D]; the last axis is contiguous
  void *cache_k, *cache_v;        // [B, H, slots, S, D]
  const int32_t *table, *cached;  // [B, slots], [B]
  int64_t k_stride[3], v_stride[3];
  int64_t batch, tokens, heads, dim, slots, element_size;
};
int launch_cache_append(const CacheAppend& a, void* stream);

struct Gae {
  const void *reward, *value;                 // [T, B], [T+1, B]
  const uint8_t *terminated, *truncated;      // [T, B]
  void *advantage, *target;                   // [T, B]
  double gamma, lam;
  int64_t steps, batch;
  bool wide;  // float64
};
int launch_gae(const Gae& a, void* stream);

}  // namespace worldenv
