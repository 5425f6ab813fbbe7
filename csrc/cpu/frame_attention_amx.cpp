// Frame attention on AMX tiles, bf16: frames of whole blocks of 32 tokens, head dimensions that are multiples of 32.
//
// The packed cache is what tdpbf16ps reads as it stands: pairs over D for the scores, pairs over S for the values.
// For 32 queries at a time: S = Q K^T against 32 keys, exponentiated on the way to P, which is stored as tiles; after
// a stretch of keys, O += P V. The scores of the next 32 keys are multiplied while these are exponentiated. As in
// frame_attention_kernel.h no maximum is subtracted: where the sum of a row of P is too large or too small for that,
// the vdpbf16ps kernel does the head again.
#if defined(__x86_64__)
#define WORLDENV_TARGET "avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16"
#define WORLDENV_LANES 16
#include "target.h"

#include "frame_attention.h"
#include "vector.h"

namespace {

using worldenv::FrameAttention;
using Bf16 = uint16_t;

constexpr int64_t kBlock = 32;  // queries, and keys, of one product: 2 x 2 tiles of results
constexpr int64_t kTile = 16 * kBlock;  // bf16 elements of one operand tile, 1 KB
constexpr int64_t kStretch = worldenv::kTileStretch / kBlock;  // blocks of keys between two visits of O

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// 2^x to 7.5e-05 relative, a fraction of what bf16 rounds away; saturates at 0 and infinity. Minimax on [0, 1].
WORLDENV_INLINE Vec exp2_coarse(Vec x) {
  const Vec f = (Vec)_mm512_reduce_ps((__m512)x, 0b1001);  // x - floor(x)
  Vec p = splat(7.8024523397e-02f);
  p = p * f + 2.2606716591e-01f;
  p = p * f + 6.9583353031e-01f;
  p = p * f + 9.9992522025e-01f;
  return (Vec)_mm512_scalef_ps((__m512)p, (__m512)x);  // p * 2^floor(x)
}

struct Scratch {
  Bf16 *own_keys, *own_values, *q;  // [D/2][S][2], [S/2][D][2], [S][D]
  float *scores;                    // two of [kBlock][kBlock]
  Bf16 *probability;                // [2][kStretch] tiles
  float *out, *sums;                // [kBlock][D], [kBlock][16]
};

// The 2 x 2 tiles of results += (upper, lower) times (b, b + 32): rows of `a_bytes` and `b_bytes`.
WORLDENV_INLINE void multiply(const Bf16* upper, const Bf16* lower, int64_t a_bytes, const Bf16* b, int64_t b_bytes) {
  _tile_loadd(4, upper, a_bytes);
  _tile_loadd(6, b, b_bytes);
  _tile_loadd(7, b + kBlock, b_bytes);
  _tile_loadd(5, lower, a_bytes);
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
}

WORLDENV_INLINE void store_results(float* to, int64_t width) {
  _tile_stored(0, to, 4 * width);
  _tile_stored(1, to + 16, 4 * width);
  _tile_stored(2, to + 16 * width, 4 * width);
  _tile_stored(3, to + 16 * width + 16, 4 * width);
}

// Keys [first, first + 32) of a frame's tile against 32 queries.
WORLDENV_INLINE void multiply_scores(const Bf16* q, const Bf16* keys, int64_t tokens, int64_t dim, float* scores) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t d = 0; d < dim; d += kBlock)
    multiply(q + d, q + 16 * dim + d, 2 * dim, keys + d * tokens, 4 * tokens);
  store_results(scores, kBlock);
}

// P = 2^(scale S) of one block, as two tiles `kStretch` apart; keys from `valid` on get none. Meanwhile `lines` cache
// lines a row are fetched from each of `ahead`.
WORLDENV_INLINE void exponentiate(const float* scores, Vec scale, int64_t valid, Bf16* probability, float* sums,
                                  const char* const (&ahead)[2], int64_t lines) {
  const auto ones = (__m512bh)_mm512_set1_epi16(0x3f80);
  for (int64_t upper = 0; upper < kBlock; upper += 16, probability += kStretch * kTile)
#pragma GCC unroll 4
    for (int64_t r = 0; r < 16; ++r) {
      for (int64_t i = (upper + r) * lines; i < (upper + r + 1) * lines; ++i) {
        __builtin_prefetch(ahead[0] + 64 * i, 0, 2);
        __builtin_prefetch(ahead[1] + 64 * i, 0, 2);
      }
      const float* row = scores + (upper + r) * kBlock;
      Vec a = exp2_coarse(load(row) * scale), b = exp2_coarse(load(row + 16) * scale);
      if (valid < kBlock) {
        a = pick(lane_index() < (int32_t)valid, a, Vec{});
        b = pick(lane_index() + 16 < (int32_t)valid, b, Vec{});
      }
      const auto pair = _mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
      float* partial = sums + 16 * (upper + r);
      // Of what was rounded, so that a key which takes it all gets a weight of 1.
      store(partial, _mm512_dpbf16_ps((__m512)load(partial), pair, ones));
      std::memcpy(probability + r * kBlock, &pair, 64);
    }
}

// O += P V over `count` blocks of keys, whose values begin at values[i].
WORLDENV_INLINE void multiply_values(const Bf16* probability, const Bf16* const* values, int64_t count, int64_t dim,
                                     float* out) {
  for (int64_t d = 0; d < dim; d += kBlock) {
    float* to = out + d;
    _tile_loadd(0, to, 4 * dim);
    _tile_loadd(1, to + 16, 4 * dim);
    _tile_loadd(2, to + 16 * dim, 4 * dim);
    _tile_loadd(3, to + 16 * dim + 16, 4 * dim);
    for (int64_t i = 0; i < count; ++i)
      multiply(probability + i * kTile, probability + (kStretch + i) * kTile, 64, values[i] + 2 * d, 4 * dim);
    store_results(to, dim);
  }
}

// The rows of the next head's queries, keys and values, which the last of this head's queries fetch on the way.
struct Next {
  const Bf16* rows[3];
  int64_t stride[3];

  void fetch(int64_t from, int64_t to, int64_t dim) const {
    for (int64_t r = from; r < to; ++r)
      for (int i = 0; i < 3; ++i)
        for (int64_t d = 0; d < dim; d += kBlock) __builtin_prefetch(rows[i] + r * stride[i] + d, 0, 2);
  }
};

// 32 queries against all frames.
void attend(const FrameAttention& a, const Scratch& s, const Bf16* cache_k, const Bf16* cache_v, const int32_t* slots,
            int64_t cached, const Bf16* q, bool fetch, const Next* following) {
  const int64_t tokens = a.tokens16(), dim = a.dim, tile = a.tile(), per_frame = tokens / kBlock;
  const Vec scale = splat(1.44269504088896341f / __builtin_sqrtf(static_cast<float>(dim)));
  const auto keys_of = [&](int64_t i) {
    const int64_t j = i / per_frame, first = i % per_frame * kBlock;
    return (j < cached ? cache_k + slots[j] * tile : s.own_keys) + 2 * first;
  };
  std::memset(s.out, 0, 4 * kBlock * dim);
  std::memset(s.sums, 0, 4 * kBlock * 16);
  const Bf16* values[kStretch];
  const int64_t blocks = (cached + 1) * per_frame;
  multiply_scores(q, keys_of(0), tokens, dim, s.scores);
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t j = i / per_frame, first = i % per_frame * kBlock, at = i % kStretch;
    if (i + 1 < blocks) multiply_scores(q, keys_of(i + 1), tokens, dim, s.scores + (i + 1) % 2 * kBlock * kBlock);
    // The next frame, or after the own one the next head's first, towards the core.
    const int64_t next = j < cached ? j + 1 : a.slots;
    const char* ahead[2] = {};
    int64_t lines = 0;
    if (fetch && next != cached) {
      const int64_t from = (next < cached ? slots[next] : a.slots + slots[0]) * tile + first * dim;
      ahead[0] = reinterpret_cast<const char*>(cache_k + from);
      ahead[1] = reinterpret_cast<const char*>(cache_v + from);
      lines = dim / kBlock;
    }
    if (following) following->fetch(i * a.tokens / blocks, (i + 1) * a.tokens / blocks, dim);
    exponentiate(s.scores + i % 2 * kBlock * kBlock, scale, a.tokens - first, s.probability + at * kTile, s.sums, ahead,
                 lines);
    values[at] = (j < cached ? cache_v + slots[j] * tile : s.own_values) + first * dim;
    if (at + 1 == kStretch || i + 1 == blocks) multiply_values(s.probability, values, at + 1, dim, s.out);
  }
}

}  // namespace

namespace worldenv {

void frame_attention_amx(const FrameAttention& a, int64_t b, int64_t h, float* scratch) {
  const int64_t tokens = a.tokens16(), dim = a.dim, tile = a.tile(), kv = h / (a.heads / a.kv_heads);
  Scratch s;
  s.own_keys = reinterpret_cast<Bf16*>(scratch);
  s.own_values = s.own_keys + tile;
  s.q = s.own_values + tile;
  s.scores = scratch + 3 * tile / 2;
  s.probability = reinterpret_cast<Bf16*>(s.scores + 2 * kBlock * kBlock);
  s.out = s.scores + 2 * kBlock * kBlock + kStretch * kTile;
  s.sums = s.out + kBlock * dim;
  pack_keys(static_cast<const Bf16*>(a.k) + b * a.k_stride[0] + kv * a.k_stride[2], a.k_stride[1], a.tokens, dim,
            s.own_keys);
  pack_values(static_cast<const Bf16*>(a.v) + b * a.v_stride[0] + kv * a.v_stride[2], a.v_stride[1], a.tokens, dim,
              s.own_values);
  const Bf16* q = static_cast<const Bf16*>(a.q) + b * a.q_stride[0] + h * a.q_stride[2];
  for (int64_t r = 0; r < a.tokens; ++r)
    for (int64_t d = 0; d < dim; d += kBlock) store(s.q + r * dim + d, load_as<Bits>(q + r * a.q_stride[1] + d));
  std::memset(s.q + a.tokens * dim, 0, 2 * (tokens - a.tokens) * dim);
  const int64_t head = (b * a.kv_heads + kv) * a.slots * tile;
  const Bf16 *cache_k = static_cast<const Bf16*>(a.cache_k) + head, *cache_v = static_cast<const Bf16*>(a.cache_v) + head;

  const int64_t next_h = (h + 1) % a.heads, next_b = b + (h + 1) / a.heads, next_kv = next_h / (a.heads / a.kv_heads);
  const Next following{{static_cast<const Bf16*>(a.q) + next_b * a.q_stride[0] + next_h * a.q_stride[2],
                        static_cast<const Bf16*>(a.k) + next_b * a.k_stride[0] + next_kv * a.k_stride[2],
                        static_cast<const Bf16*>(a.v) + next_b * a.v_stride[0] + next_kv * a.v_stride[2]},
                       {a.q_stride[1], a.k_stride[1], a.v_stride[1]}};
  const TileConfig config;
  _tile_loadconfig(&config);
  bool safe = true;
  for (int64_t first = 0; first < tokens && safe; first += kBlock) {
    attend(a, s, cache_k, cache_v, a.table + b * a.slots, a.cached[b], s.q + first * dim, first == 0,
           first + kBlock == tokens && next_b < a.batch ? &following : nullptr);
    Bf16* out = static_cast<Bf16*>(a.out) + ((b * a.tokens + first) * a.heads + h) * dim;
    for (int64_t r = 0; r < kBlock && first + r < a.tokens; ++r) {
      const float total = _mm512_reduce_add_ps(_mm512_loadu_ps(s.sums + 16 * r));
      safe = safe && total > 0x1p-30f && total < 0x1p60f;
      const Vec inverse = splat(1.0f / total);
      for (int64_t d = 0; d < dim; d += 16)
        store(out + r * a.heads * dim + d, (Half)_mm512_cvtneps_pbh((__m512)(load(s.out + r * dim + d) * inverse)));
    }
  }
  _tile_release();
  if (!safe) frame_attention_avx512_pairs(a, b, h, scratch);
}

}  // namespace worldenv

#endif
