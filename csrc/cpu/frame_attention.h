// Arguments of one frame-attention call and of its kernels; layout of the packed cache.
//
// Tile of one frame and head, S16 and D16 being S and D rounded up to 16 and the padding zero:
//   f32   keys [D16][S16] (transposed),           values [S16][D16]
//   bf16  keys [D16/2][S16][2] (pairs over D),    values [S16/2][D16][2] (pairs over S)
// so both products read rows of contiguous vectors, and the bf16 ones are operands of vdpbf16ps as they stand.
#pragma once

#include <cstdint>

namespace worldenv {

struct FrameAttention {
  const void *q, *k, *v;               // [B, S, H, D], [B, S, Hk, D] of the frame in progress
  int64_t q_stride[3], k_stride[3], v_stride[3];  // elements; the last axis is contiguous
  const void *cache_k, *cache_v;       // [B, Hk, slots, tile]
  const int32_t *table, *cached;       // [B, slots], [B]
  void* out;                           // [B, S, H, D], contiguous
  int64_t batch, tokens, heads, kv_heads, dim, slots;

  int64_t tokens16() const { return (tokens + 15) & ~int64_t{15}; }
  int64_t dim16() const { return (dim + 15) & ~int64_t{15}; }
  int64_t tile() const { return tokens16() * dim16(); }
};

constexpr int64_t kQueryBlock = 96;  // queries that meet a block of keys before the next is read
constexpr int64_t kKeyBlock = 64;    // its keys, then its values, stay in the nearest cache: 16 KB at D = 64

constexpr int64_t kTileStretch = 4;  // on AMX: blocks of 32 keys whose probabilities, in bf16, are held at a time

// Floats of scratch one thread needs.
inline int64_t scratch_floats(const FrameAttention& a) {
  const int64_t rows = a.tokens < kQueryBlock ? a.tokens : kQueryBlock;
  // Queries, outputs, row sums, row maxima, raw scores, probabilities; packed frame and widened tile.
  const int64_t vectors = rows * (2 * a.dim16() + 2 * 16 + 2 * kKeyBlock) + 4 * a.tile() + 64;
  // On tiles: packed frame, outputs, queries; row sums; two blocks of scores; probabilities; parts of keys and values.
  const int64_t tiles = 9 * a.tile() / 2 + 16 * a.tokens16() + 2 * 32 * 32 + 2 * 256 * kTileStretch + 96 * a.dim16();
  return vectors > tiles ? vectors : tiles;
}

// One (environment, head) pair; the name says instruction set and element type of tensors and cache.
using FrameAttentionKernel = void (*)(const FrameAttention&, int64_t b, int64_t h, float* scratch);

void frame_attention_portable_f32(const FrameAttention&, int64_t, int64_t, float*);
void frame_attention_portable_bf16(const FrameAttention&, int64_t, int64_t, float*);
void frame_attention_avx2_f32(const FrameAttention&, int64_t, int64_t, float*);
void frame_attention_avx2_bf16(const FrameAttention&, int64_t, int64_t, float*);
void frame_attention_avx512_f32(const FrameAttention&, int64_t, int64_t, float*);
void frame_attention_avx512_bf16(const FrameAttention&, int64_t, int64_t, float*);
void frame_attention_avx512_pairs(const FrameAttention&, int64_t, int64_t, float*);
void frame_attention_amx_bf16(const FrameAttention&, int64_t, int64_t, float*);
void frame_attention_amx_f32(const FrameAttention&, int64_t, int64_t, float*);
void frame_attention_avx512_pairs_emulated(const FrameAttention&, int64_t, int64_t, float*);

// Pack one frame and head: rows [S][D] with the given row stride into a tile of keys or of values.
void pack_keys(const float* from, int64_t stride, int64_t tokens, int64_t dim, float* tile);
void pack_values(const float* from, int64_t stride, int64_t tokens, int64_t dim, float* tile);
void pack_keys(const uint16_t* from, int64_t stride, int64_t tokens, int64_t dim, uint16_t* tile);
void pack_values(const uint16_t* from, int64_t stride, int64_t tokens, int64_t dim, uint16_t* tile);

// The same with AVX-512 where tokens and dim are multiples of 16, dim of bf16 values of 32; keys are floats or pairs of
// bf16, in which stride and dim count.
void pack_keys_avx512(const uint32_t* from, int64_t stride, int64_t tokens, int64_t dim, uint32_t* tile);
void pack_values_avx512(const uint16_t* from, int64_t stride, int64_t tokens, int64_t dim, uint16_t* tile);

}  // namespace worldenv
