// Write the frame in progress of every row into its pending slot, keys and values in one launch.
//
// The slot comes from the device copy of the table, so the launch depends on nothing the host would have to read; it
// can be captured in a graph. Elements are moved as whole words, 16 bytes at a time where sizes and strides allow.

#include <cuda_runtime.h>

#include "kernels.h"

namespace worldenv {
namespace {

constexpr int kThreads = 256;

// `width` is D in words; strides are in words too.
template <class Word>
__global__ void cache_append_kernel(CacheAppend a, int64_t width) {
  const int64_t per_row = a.tokens * a.heads * width, total = a.batch * per_row;
  const bool values = blockIdx.y == 1;
  const Word* from = static_cast<const Word*>(values ? a.v : a.k);
  Word* to = static_cast<Word*>(values ? a.cache_v : a.cache_k);
  const int64_t* stride = values ? a.v_stride : a.k_stride;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < total;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int64_t b = i / per_row, rest = i % per_row;
    const int64_t h = rest / (a.tokens * width), s = rest / width % a.tokens, d = rest % width;
    const int64_t slot = a.table[b * a.slots + a.cached[b]];
    to[(((b * a.heads + h) * a.slots + slot) * a.tokens + s) * width + d] =
        from[b * stride[0] + s * stride[1] + h * stride[2] + d];
  }
}

template <class Word>
int launch(CacheAppend a, cudaStream_t stream) {
  const int64_t ratio = sizeof(Word) / a.element_size, width = a.dim / ratio;
  for (int i = 0; i < 3; ++i) {
    a.k_stride[i] /= ratio;
    a.v_stride[i] /= ratio;
  }
  const int64_t blocks = (a.batch * a.tokens * a.heads * width + kThreads - 1) / kThreads;
  const dim3 grid(static_cast<unsigned>(blocks < 65536 ? blocks : 65536), 2);
  cache_append_kernel<Word><<<grid, kThreads, 0, stream>>>(a, width);
  return static_cast<int>(cudaGetLastError());
}

bool divides(const CacheAppend& a, int64_t bytes) {
  const auto aligned = [bytes](const void* p) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; };
  bool ok = a.dim * a.element_size % bytes == 0 && aligned(a.k) && aligned(a.v) && aligned(a.cache_k) &&
            aligned(a.cache_v);
  for (int i = 0; i < 3; ++i)
    ok = ok && a.k_stride[i] * a.element_size % bytes == 0 && a.v_stride[i] * a.element_size % bytes == 0;
  return ok;
}

}  // namespace

int launch_cache_append(const CacheAppend& a, void* stream) {
  if (a.batch * a.tokens * a.heads * a.dim == 0) return 0;
  const auto s = static_cast<cudaStream_t>(stream);
  if (divides(a, 16)) return launch<uint4>(a, s);
  if (a.element_size == 2) return launch<uint16_t>(a, s);
  if (a.element_size == 4) return launch<uint32_t>(a, s);
  return launch<uint64_t>(a, s);
}

}  // namespace worldenv
