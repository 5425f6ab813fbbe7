// Frame attention on AMX tiles: frames of whole blocks of 32 tokens, head dimensions that are multiples of 32.
//
// A tile product multiplies pairs of bf16. The packed bf16 cache is an operand as it stands: pairs over D for the
// scores, over S for the values. A float is the exact sum of three bf16 numbers, its parts high, middle and low; of the
// nine products of two floats' parts the six that reach 24 bits are taken, small ones first. Which elements form a
// pair is free as long as both operands agree: of floats it is i and i + 16 of each 32, so that shifts and masks turn
// two vectors into one of pairs for each part.
//
// A unit is 32 queries against 32 keys: S = Q K^T, exponentiated on the way to P, which is stored as tiles. The scores
// of the next unit are multiplied while these are exponentiated. A stretch of keys meets all queries before the next
// is read; at its end O += P V. As in frame_attention_kernel.h no maximum is subtracted: where the sum of a row of P is
// too large or too small for that, or an output is not finite, the kernel on vectors does the head again.
#if defined(__x86_64__)
#define WORLDENV_TARGET "avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16"
#define WORLDENV_LANES 16
#include "target.h"

#include "frame_attention.h"
#include "vector.h"

namespace {

using worldenv::FrameAttention;
using Word = uint32_t;  // a float or a pair of bf16

constexpr int64_t kBlock = 32;       // queries, and keys, of one product: 2 x 2 tiles of results
constexpr int64_t kTile = 16 * 16;   // words of an operand tile

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Steps in words within an operand that is the right factor: from 32 of the other axis to the next, from a column of
// tiles to the other, from row to row. Left factors are whole tiles.
struct Layout {
  int64_t step, column, row;
};

WORLDENV_INLINE void load_left(const Word* upper, const Word* lower) {
  _tile_loadd(4, upper, 64);
  _tile_loadd(5, lower, 64);
}
WORLDENV_INLINE void load_right(const Word* at, const Layout& x) {
  _tile_loadd(6, at, 4 * x.row);
  _tile_loadd(7, at + x.column, 4 * x.row);
}
WORLDENV_INLINE void multiply_loaded() {
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
}
WORLDENV_INLINE void load_results(const float* from, int64_t stride) {
  _tile_loadd(0, from, 4 * stride);
  _tile_loadd(1, from + 16, 4 * stride);
  _tile_loadd(2, from + 16 * stride, 4 * stride);
  _tile_loadd(3, from + 16 * stride + 16, 4 * stride);
}
WORLDENV_INLINE void store_results(float* to, int64_t stride) {
  _tile_stored(0, to, 4 * stride);
  _tile_stored(1, to + 16, 4 * stride);
  _tile_stored(2, to + 16 * stride, 4 * stride);
  _tile_stored(3, to + 16 * stride + 16, 4 * stride);
}
// Until here all stores are done: gcc 12 does not know that _tile_loadd reads memory.
WORLDENV_INLINE void settle() { asm volatile("" ::: "memory"); }

// bf16: the cache is the operand.
struct Pairs {
  using Element = uint16_t;
  static constexpr int64_t kParts = 1;                         // tiles of an operand
  static constexpr int64_t kStretch = worldenv::kTileStretch;  // blocks of keys in a stretch
  static constexpr auto kVectors = worldenv::frame_attention_avx512_pairs;

  static Layout key_layout(int64_t tokens) { return {16 * tokens, 16, tokens}; }
  static Layout value_layout(int64_t dim) { return {32, 16, dim}; }
  static const Word* keys(const Word* at, int64_t, int64_t, Word*) { return at; }
  static const Word* values(const Word* at, int64_t, Word*) { return at; }
  static WORLDENV_INLINE void query(const uint16_t* from, Word* to) { store(to, load_as<Bits>(from)); }

  static WORLDENV_INLINE void multiply(const Word* upper, const Word* lower, const Word* right, const Layout& x) {
    load_left(upper, lower), load_right(right, x), multiply_loaded();
  }

  // 2^x to 7.5e-05 relative, a fraction of what bf16 rounds away; saturates at 0 and infinity. Minimax on [0, 1].
  static WORLDENV_INLINE Vec exp2(Vec x) {
    const Vec f = (Vec)_mm512_reduce_ps((__m512)x, 0b1001);  // x - floor(x)
    Vec p = splat(7.8024523397e-02f);
    p = p * f + 2.2606716591e-01f;
    p = p * f + 6.9583353031e-01f;
    p = p * f + 9.9992522025e-01f;
    return (Vec)_mm512_scalef_ps((__m512)p, (__m512)x);  // p * 2^floor(x)
  }
  static WORLDENV_INLINE void put(Vec a, Vec b, Word* to, float* sums) {
    const auto pair = _mm512_cvtne2ps_pbh((__m512)b, (__m512)a), ones = (__m512bh)_mm512_set1_epi16(0x3f80);
    // Of what was rounded, so that a key which takes it all gets a weight of 1.
    store(sums, _mm512_dpbf16_ps((__m512)load(sums), pair, ones));
    store(to, pair);
  }
  static WORLDENV_INLINE void write(uint16_t* to, Vec x) { store(to, (Half)_mm512_cvtneps_pbh((__m512)x)); }
};

// f32: operands are split into parts.
struct Floats {
  using Element = float;
  static constexpr int64_t kParts = 3, kStretch = 1;
  static constexpr auto kVectors = worldenv::frame_attention_avx512_f32;

  static Layout key_layout(int64_t) { return {2 * kParts * kTile, kParts * kTile, 16}; }
  static Layout value_layout(int64_t) { return {2 * kParts * kTile, kParts * kTile, 16}; }
  // Parts of the pairs (a, b): a row of each part's tile.
  static WORLDENV_INLINE void split(Vec a, Vec b, Word* to) {
#pragma GCC unroll 3
    for (int64_t part = 0; part < kParts; ++part) {
      const Bits high = (Bits)b & 0xffff0000u;
      store(to + part * kTile, (Bits)a >> 16 | high);
      a -= (Vec)((Bits)a & 0xffff0000u);
      b -= (Vec)high;
    }
  }
  static const Word* keys(const Word* at, int64_t tokens, int64_t dim, Word* to) {
    const auto* from = reinterpret_cast<const float*>(at);
    for (int64_t tile = 0; tile < dim / 16; ++tile)
      for (int64_t r = 0; r < 16; ++r) {
        const float* row = from + (tile / 2 * 32 + r) * tokens + tile % 2 * 16;
        split(load(row), load(row + 16 * tokens), to + tile * kParts * kTile + 16 * r);
      }
    return to;
  }
  static const Word* values(const Word* at, int64_t dim, Word* to) {
    const auto* from = reinterpret_cast<const float*>(at);
    for (int64_t tile = 0; tile < dim / 16; ++tile)
      for (int64_t r = 0; r < 16; ++r) {
        const float* row = from + r * dim + 16 * tile;
        split(load(row), load(row + 16 * dim), to + tile * kParts * kTile + 16 * r);
      }
    return to;
  }
  static WORLDENV_INLINE void query(const float* from, Word* to) { split(load(from), load(from + 16), to); }

  static WORLDENV_INLINE void multiply(const Word* upper, const Word* lower, const Word* right, const Layout& x) {
    constexpr int64_t middle = kTile, low = 2 * kTile;
    load_left(upper + low, lower + low), load_right(right, x), multiply_loaded();
    load_left(upper + middle, lower + middle), multiply_loaded();
    load_right(right + middle, x), multiply_loaded();
    load_left(upper, lower), multiply_loaded();
    load_right(right + low, x), multiply_loaded();
    load_right(right, x), multiply_loaded();
  }

  // 2^x to 1e-7 relative; saturates at 0 and infinity.
  static WORLDENV_INLINE Vec exp2(Vec x) {
    const Vec f = (Vec)_mm512_reduce_ps((__m512)x, 0b1000);  // x - round(x)
    return (Vec)_mm512_scalef_ps((__m512)exp2_near(f), (__m512)(x - f));
  }
  static WORLDENV_INLINE void put(Vec a, Vec b, Word* to, float* sums) {
    store(sums, load(sums) + (a + b));
    split(a, b, to);
  }
  static WORLDENV_INLINE void write(float* to, Vec x) { store(to, x); }
};

// Rows of q, k and v of one head.
template <class T>
struct Rows {
  const T* at[3];
  int64_t stride[3];

  Rows(const FrameAttention& a, int64_t b, int64_t h) : stride{a.q_stride[1], a.k_stride[1], a.v_stride[1]} {
    const int64_t kv = h / (a.heads / a.kv_heads);
    at[0] = static_cast<const T*>(a.q) + b * a.q_stride[0] + h * a.q_stride[2];
    at[1] = static_cast<const T*>(a.k) + b * a.k_stride[0] + kv * a.k_stride[2];
    at[2] = static_cast<const T*>(a.v) + b * a.v_stride[0] + kv * a.v_stride[2];
  }
  // Row r of each towards the core.
  void fetch(int64_t r, int64_t dim) const {
    for (int i = 0; i < 3; ++i)
      for (int64_t d = 0; d < dim; d += 64 / sizeof(T)) __builtin_prefetch(at[i] + r * stride[i] + d, 0, 2);
  }
};

// One block of 32 keys and its values, in the cache or packed.
struct Block {
  const Word *keys, *values;

  // Cache lines [line, end) of each towards the core; a row of keys has two.
  WORLDENV_INLINE void fetch(int64_t& line, int64_t end, int64_t tokens) const {
    for (; line < end; ++line) {
      __builtin_prefetch(keys + line / 2 * tokens + line % 2 * 16, 0, 2);
      __builtin_prefetch(values + 16 * line, 0, 2);
    }
  }
};

template <class Op>
void attend(const FrameAttention& a, int64_t b, int64_t h, float* scratch) {
  using T = typename Op::Element;
  constexpr int64_t tiles = Op::kParts * kTile, stretch = Op::kStretch;  // words of an operand tile with its parts
  static_assert(Op::kParts * stretch <= worldenv::kTileStretch, "what scratch_floats counts on");
  const int64_t tokens = a.tokens16(), dim = a.dim, per_frame = tokens / kBlock;
  const int64_t frame = a.tile() * sizeof(T) / 4, q_row = dim / kBlock * tiles;
  auto *own_keys = reinterpret_cast<Word*>(scratch), *own_values = own_keys + frame;
  auto *out = reinterpret_cast<float*>(own_values + frame), *sums = out + a.tile();
  float* scores[2] = {sums + 16 * tokens, sums + 16 * tokens + kBlock * kBlock};
  auto* q = reinterpret_cast<Word*>(scores[1] + kBlock * kBlock);  // [S / 16][D / 32] tiles
  Word* probability = q + tokens / 16 * q_row;                     // [2][stretch] tiles
  Word *key_parts = probability + 2 * stretch * tiles, *value_parts = key_parts + dim / 16 * tiles;

  const Rows<T> rows(a, b, h);
  worldenv::pack_keys(rows.at[1], rows.stride[1], a.tokens, dim, reinterpret_cast<T*>(own_keys));
  worldenv::pack_values(rows.at[2], rows.stride[2], a.tokens, dim, reinterpret_cast<T*>(own_values));
  if (a.tokens < tokens) std::memset(q, 0, 4 * (probability - q));
  for (int64_t r = 0; r < a.tokens; ++r)
    for (int64_t d = 0; d < dim / kBlock; ++d)
      Op::query(rows.at[0] + r * rows.stride[0] + d * kBlock, q + r / 16 * q_row + d * tiles + r % 16 * 16);
  std::memset(out, 0, 4 * a.tile());
  std::memset(sums, 0, 4 * 16 * tokens);

  const int32_t* slots = a.table + b * a.slots;
  const int64_t cached = a.cached[b], blocks = (cached + 1) * per_frame;
  const int64_t head = (b * a.kv_heads + h / (a.heads / a.kv_heads)) * a.slots * frame;
  const Word* cache_k = static_cast<const Word*>(a.cache_k) + head;
  const Word* cache_v = static_cast<const Word*>(a.cache_v) + head;
  const auto block = [&](int64_t i) {  // past the last come those of the next head
    const int64_t j = i / per_frame, key = i % per_frame * kBlock, value = frame / tokens * key;
    if (j == cached) return Block{own_keys + key, own_values + value};
    const int64_t at = (j < cached ? slots[j] : a.slots + slots[(j - cached - 1) % a.slots]) * frame;
    return Block{cache_k + at + key, cache_v + at + value};
  };
  const bool last = b + 1 == a.batch && h + 1 == a.heads;
  const Rows<T> next_rows = last ? rows : Rows<T>(a, b + (h + 1) / a.heads, (h + 1) % a.heads);

  const Word *keys[stretch], *values[stretch];
  const Layout key_layout = Op::key_layout(tokens), value_layout = Op::value_layout(dim);
  const auto multiply_scores = [&](int64_t query, int64_t i, float* to) WORLDENV_LAMBDA {
    const Word* left = q + query / 16 * q_row;
    settle();
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t d = 0; d < dim / kBlock; ++d)
      Op::multiply(left + d * tiles, left + q_row + d * tiles, keys[i] + d * key_layout.step, key_layout);
    store_results(to, kBlock);
  };
  const auto multiply_values = [&](int64_t query, int64_t count) WORLDENV_LAMBDA {
    settle();
    for (int64_t d = 0; d < dim / kBlock; ++d) {
      float* to = out + query * dim + d * kBlock;
      load_results(to, dim);
      for (int64_t i = 0; i < count; ++i)
        Op::multiply(probability + i * tiles, probability + (stretch + i) * tiles, values[i] + d * value_layout.step,
                     value_layout);
      store_results(to, dim);
    }
  };

  const TileConfig config;
  _tile_loadconfig(&config);
  const Vec scale = splat(1.44269504088896341f / __builtin_sqrtf(static_cast<float>(dim)));
  const int64_t lines = (2 * dim * sizeof(T) + tokens - 1) / tokens;  // of a block's keys for every fourth query
  int64_t due = 0, row = 0, buffer = 0;
  for (int64_t at = 0; at < blocks; at += stretch) {
    const int64_t count = blocks - at < stretch ? blocks - at : stretch;
    int64_t valid[stretch];
    Block ahead[stretch];
    for (int64_t i = 0; i < count; ++i) {
      const Block now = block(at + i);
      keys[i] = Op::keys(now.keys, tokens, dim, key_parts);
      values[i] = Op::values(now.values, dim, value_parts);
      valid[i] = a.tokens - (at + i) % per_frame * kBlock;
      ahead[i] = block(at + count + i);
    }
    multiply_scores(0, 0, scores[buffer]);
    for (int64_t query = 0; query < tokens; query += kBlock)
      for (int64_t i = 0; i < count; ++i, buffer ^= 1) {
        if (i + 1 < count) multiply_scores(query, i + 1, scores[buffer ^ 1]);
        else if (query + kBlock < tokens) multiply_scores(query + kBlock, 0, scores[buffer ^ 1]);
        // Fetched evenly: the next stretch over this one, the next head's rows over this head.
        int64_t line = query / 4 * lines;
        for (due += a.tokens; due >= blocks * per_frame; due -= blocks * per_frame) next_rows.fetch(row++, dim);
#pragma GCC unroll 4
        for (int64_t r = 0; r < kBlock; ++r) {
          if (r % 4 == 0) ahead[i].fetch(line, line + lines, tokens);
          Vec x = Op::exp2(load(scores[buffer] + r * kBlock) * scale);
          Vec y = Op::exp2(load(scores[buffer] + r * kBlock + 16) * scale);
          if (valid[i] < kBlock) {
            x = pick(lane_index() < (int32_t)valid[i], x, Vec{});
            y = pick(lane_index() + 16 < (int32_t)valid[i], y, Vec{});
          }
          Op::put(x, y, probability + (r / 16 * stretch + i) * tiles + r % 16 * 16, sums + 16 * (query + r));
        }
        if (i + 1 == count) multiply_values(query, count);
      }
  }
  _tile_release();

  bool safe = true;
  Vec finite = {};
  for (int64_t r = 0; r < a.tokens; ++r) {
    T* to = static_cast<T*>(a.out) + ((b * a.tokens + r) * a.heads + h) * dim;
    const float total = _mm512_reduce_add_ps(_mm512_loadu_ps(sums + 16 * r));
    safe = safe && total > 0x1p-30f && total < 0x1p60f;
    const Vec inverse = splat(1.0f / total);
    for (int64_t d = 0; d < dim; d += 16) {
      const Vec o = load(out + r * dim + d) * inverse;
      finite += o - o;
      Op::write(to + d, o);
    }
  }
  if (!safe || sum(finite) != 0.0f) Op::kVectors(a, b, h, scratch);
}

}  // namespace

namespace worldenv {

void frame_attention_amx_f32(const FrameAttention& a, int64_t b, int64_t h, float* scratch) {
  attend<Floats>(a, b, h, scratch);
}
void frame_attention_amx_bf16(const FrameAttention& a, int64_t b, int64_t h, float* scratch) {
  attend<Pairs>(a, b, h, scratch);
}

}  // namespace worldenv

#endif
