// Frame attention over the packed ring cache: host checks, packing of frames, choice of kernel. CPU, f32 and bf16.

#include "frame_attention.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdlib>
#include <cstring>

#include "allocate.h"
#include "isa.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace worldenv {
namespace {

// Transpose [S][D] to [D][S16] in tiles small enough that both sides stay in the nearest cache.
template <class T>
void transpose(const T* from, int64_t stride, int64_t tokens, int64_t dim, int64_t tokens16, T* to) {
#if defined(__x86_64__)
  if (tokens % 16 == 0 && dim % 16 == 0 && best_isa() >= kAvx512)
    return pack_keys_avx512(reinterpret_cast<const uint32_t*>(from), stride, tokens, dim,
                            reinterpret_cast<uint32_t*>(to));
#endif
  constexpr int64_t kTile = 16;
  for (int64_t s0 = 0; s0 < tokens; s0 += kTile)
    for (int64_t d0 = 0; d0 < dim; d0 += kTile) {
      const int64_t s1 = s0 + kTile < tokens ? s0 + kTile : tokens, d1 = d0 + kTile < dim ? d0 + kTile : dim;
      for (int64_t d = d0; d < d1; ++d)
        for (int64_t s = s0; s < s1; ++s) to[d * tokens16 + s] = from[s * stride + d];
    }
}

int64_t up16(int64_t n) { return (n + 15) & ~int64_t{15}; }

}  // namespace

void pack_keys(const float* from, int64_t stride, int64_t tokens, int64_t dim, float* tile) {
  if (tokens % 16 || dim % 16) std::memset(tile, 0, 4 * up16(tokens) * up16(dim));
  transpose(from, stride, tokens, dim, up16(tokens), tile);
}

void pack_values(const float* from, int64_t stride, int64_t tokens, int64_t dim, float* tile) {
  if (tokens % 16 || dim % 16) std::memset(tile, 0, 4 * up16(tokens) * up16(dim));
  for (int64_t s = 0; s < tokens; ++s) std::memcpy(tile + s * up16(dim), from + s * stride, 4 * dim);
}

void pack_keys(const uint16_t* from, int64_t stride, int64_t tokens, int64_t dim, uint16_t* tile) {
  if (tokens % 16 || dim % 16) std::memset(tile, 0, 2 * up16(tokens) * up16(dim));
  const int64_t tokens16 = up16(tokens);
  if (dim % 2 == 0 && stride % 2 == 0 && reinterpret_cast<uintptr_t>(from) % 4 == 0) {
    transpose(reinterpret_cast<const uint32_t*>(from), stride / 2, tokens, dim / 2, tokens16,
              reinterpret_cast<uint32_t*>(tile));
    return;
  }
  for (int64_t s = 0; s < tokens; ++s)
    for (int64_t d = 0; d < dim; ++d) tile[2 * ((d / 2) * tokens16 + s) + d % 2] = from[s * stride + d];
}

void pack_values(const uint16_t* from, int64_t stride, int64_t tokens, int64_t dim, uint16_t* tile) {
#if defined(__x86_64__)
  if (tokens % 16 == 0 && dim % 32 == 0 && best_isa() >= kAvx512)
    return pack_values_avx512(from, stride, tokens, dim, tile);
#endif
  if (tokens % 16 || dim % 16) std::memset(tile, 0, 2 * up16(tokens) * up16(dim));
  for (int64_t s = 0; s + 1 < tokens; s += 2) {
    const uint16_t *even = from + s * stride, *odd = even + stride;
    uint16_t* to = tile + s * up16(dim);
    for (int64_t d = 0; d < dim; ++d) {
      to[2 * d] = even[d];
      to[2 * d + 1] = odd[d];
    }
  }
  if (tokens % 2)
    for (int64_t d = 0; d < dim; ++d) tile[(tokens - 1) * up16(dim) + 2 * d] = from[(tokens - 1) * stride + d];
}

namespace {

void check_cache(const Tensor& cache_k, const Tensor& cache_v, const Tensor& k, const Tensor& v, const Tensor& table,
                 const Tensor& cached) {
  const auto dtype = k.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, "frame cache: k must be f32 or bf16");
  STD_TORCH_CHECK(v.scalar_type() == dtype && cache_k.scalar_type() == dtype && cache_v.scalar_type() == dtype,
                  "frame cache: k, v and the cache must share a dtype");
  STD_TORCH_CHECK(k.dim() == 4 && v.dim() == 4, "frame cache: k and v must be [B,S,H,D]");
  for (int i = 0; i < 4; ++i) STD_TORCH_CHECK(k.size(i) == v.size(i), "frame cache: v must have the shape of k");
  STD_TORCH_CHECK(k.numel() == 0 || (k.stride(3) == 1 && v.stride(3) == 1),
                  "frame cache: the last axis of k and v must be contiguous");
  STD_TORCH_CHECK(table.scalar_type() == ScalarType::Int && cached.scalar_type() == ScalarType::Int,
                  "frame cache: table and cached must be int32");
  STD_TORCH_CHECK(table.is_contiguous() && cached.is_contiguous() && cache_k.is_contiguous() && cache_v.is_contiguous(),
                  "frame cache: cache tensors must be contiguous");
  STD_TORCH_CHECK(table.dim() == 2 && cached.dim() == 1 && table.size(0) == k.size(0) && cached.size(0) == k.size(0),
                  "frame cache: table must be [B,slots] and cached [B]");
  const int64_t expected = k.size(0) * k.size(2) * table.size(1) * up16(k.size(1)) * up16(k.size(3));
  STD_TORCH_CHECK(cache_k.numel() == expected && cache_v.numel() == expected,
                  "frame cache: packed cache must hold ", expected, " elements, got ", cache_k.numel());
  const auto* slots = static_cast<const int32_t*>(table.const_data_ptr());
  const auto* lengths = static_cast<const int32_t*>(cached.const_data_ptr());
  for (int64_t b = 0; b < k.size(0); ++b) {
    STD_TORCH_CHECK(lengths[b] >= 0 && lengths[b] < table.size(1), "frame cache: cached[", b, "] = ", lengths[b],
                    " lies outside 0..", table.size(1) - 1);
    for (int64_t j = 0; j <= lengths[b]; ++j) {
      const int32_t slot = slots[b * table.size(1) + j];
      STD_TORCH_CHECK(slot >= 0 && slot < table.size(1), "frame cache: table[", b, ",", j, "] = ", slot,
                      " is no slot");
    }
  }
}

void append(Tensor cache_k, Tensor cache_v, const Tensor k, const Tensor v, const Tensor table, const Tensor cached) {
  check_cache(cache_k, cache_v, k, v, table, cached);
  const int64_t batch = k.size(0), tokens = k.size(1), heads = k.size(2), dim = k.size(3), slots = table.size(1);
  const int64_t tile = up16(tokens) * up16(dim);
  const auto* slot_of = static_cast<const int32_t*>(table.const_data_ptr());
  const auto* lengths = static_cast<const int32_t*>(cached.const_data_ptr());
  const auto write = [&](auto* to_k, auto* to_v, const auto* from_k, const auto* from_v) {
    torch::stable::parallel_for(0, batch * heads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / heads, h = i % heads, slot = slot_of[b * slots + lengths[b]];
        const int64_t at = (i * slots + slot) * tile;
        pack_keys(from_k + b * k.stride(0) + h * k.stride(2), k.stride(1), tokens, dim, to_k + at);
        pack_values(from_v + b * v.stride(0) + h * v.stride(2), v.stride(1), tokens, dim, to_v + at);
      }
    });
  };
  if (k.numel() == 0) return;
  if (k.scalar_type() == ScalarType::Float)
    write(static_cast<float*>(cache_k.mutable_data_ptr()), static_cast<float*>(cache_v.mutable_data_ptr()),
          static_cast<const float*>(k.const_data_ptr()), static_cast<const float*>(v.const_data_ptr()));
  else
    write(static_cast<uint16_t*>(cache_k.mutable_data_ptr()), static_cast<uint16_t*>(cache_v.mutable_data_ptr()),
          static_cast<const uint16_t*>(k.const_data_ptr()), static_cast<const uint16_t*>(v.const_data_ptr()));
}

FrameAttentionKernel kernel_for(int64_t isa, bool bf16, const FrameAttention& a) {
#if defined(__x86_64__)
  if (isa == kAvx512Bf16Emulated && bf16) return frame_attention_avx512_pairs_emulated;
  // Tiles are multiplied 32 by 32; frames that do not fill them run on vectors.
  if (isa == kAmx && a.tokens16() % 32 == 0 && a.dim % 32 == 0)
    return bf16 ? frame_attention_amx_bf16 : frame_attention_amx_f32;
  if (isa >= kAvx512Bf16 && bf16) return frame_attention_avx512_pairs;
  if (isa >= kAvx512) return bf16 ? frame_attention_avx512_bf16 : frame_attention_avx512_f32;
  if (isa == kAvx2) return bf16 ? frame_attention_avx2_bf16 : frame_attention_avx2_f32;
#endif
  return bf16 ? frame_attention_portable_bf16 : frame_attention_portable_f32;
}

// Scratch of one thread, kept between calls: fresh pages would cost more than the packing done in them.
float* scratch_of(size_t floats) {
  struct Buffer {
    float* data = nullptr;
    size_t size = 0;
    ~Buffer() { std::free(data); }
  };
  static thread_local Buffer buffer;
  if (buffer.size < floats) {
    std::free(buffer.data);
    buffer.size = 0;
    buffer.data = static_cast<float*>(std::aligned_alloc(64, (4 * floats + 63) / 64 * 64));
    STD_TORCH_CHECK(buffer.data != nullptr, "frame_attention: no memory for ", 4 * floats, " bytes of scratch");
    buffer.size = floats;
  }
  return buffer.data;
}

Tensor frame_attention(const Tensor q, const Tensor k, const Tensor v, const Tensor cache_k, const Tensor cache_v,
                       const Tensor table, const Tensor cached, int64_t isa) {
  check_cache(cache_k, cache_v, k, v, table, cached);
  STD_TORCH_CHECK(q.dim() == 4 && q.scalar_type() == k.scalar_type(), "frame_attention: q must be [B,S,H,D] like k");
  STD_TORCH_CHECK(q.size(0) == k.size(0) && q.size(1) == k.size(1) && q.size(3) == k.size(3) && k.size(2) > 0 &&
                      q.size(2) % k.size(2) == 0,
                  "frame_attention: q must match k, with a multiple of its heads");
  Tensor out = empty_cpu_like(q);
  if (q.numel() == 0) return out;
  STD_TORCH_CHECK(q.stride(3) == 1, "frame_attention: the last axis of q must be contiguous");
  FrameAttention a{};
  a.q = q.const_data_ptr();
  a.k = k.const_data_ptr();
  a.v = v.const_data_ptr();
  for (int i = 0; i < 3; ++i) {
    a.q_stride[i] = q.stride(i);
    a.k_stride[i] = k.stride(i);
    a.v_stride[i] = v.stride(i);
  }
  a.cache_k = cache_k.const_data_ptr();
  a.cache_v = cache_v.const_data_ptr();
  a.table = static_cast<const int32_t*>(table.const_data_ptr());
  a.cached = static_cast<const int32_t*>(cached.const_data_ptr());
  a.out = out.mutable_data_ptr();
  a.batch = q.size(0);
  a.tokens = q.size(1);
  a.heads = q.size(2);
  a.kv_heads = k.size(2);
  a.dim = q.size(3);
  a.slots = table.size(1);
  const auto kernel = kernel_for(resolve_isa(isa), q.scalar_type() == ScalarType::BFloat16, a);
  torch::stable::parallel_for(0, a.batch * a.heads, 1, [&](int64_t begin, int64_t end) {
    float* scratch = scratch_of(scratch_floats(a));
    for (int64_t i = begin; i < end; ++i) kernel(a, i / a.heads, i % a.heads, scratch);
  });
  return out;
}

}  // namespace
}  // namespace worldenv

STABLE_TORCH_LIBRARY_IMPL(worldenv, CPU, m) {
  m.impl("frame_attention", TORCH_BOX(&worldenv::frame_attention));
  m.impl("frame_cache_append", TORCH_BOX(&worldenv::append));
}
