// Frame attention of one (environment, head) pair, compiled once per instruction set.
//
// For a block of queries, a block of keys at a time: scores = Q K^T in registers, exponentiated where they are; when
// all queries have met these keys, O += P V. So the nearest cache holds either keys or values, never both, while the
// queries stream by. The first attempt subtracts no maximum: scores are nearly always small (|s| < 64 in powers of two, as
// with normalised queries and keys), which saves the row maxima and every rescaling of O; f32 holds such sums exactly
// as well. The largest |score| is tracked, and a block that exceeds the bound (or holds an infinity) is redone with
// the usual running maximum.
//
// Liberty taken: matrix products are written here rather than taken from a BLAS; the shapes are small and fixed, the
// cache is already packed, and the exponentials belong between the two products.
#pragma once

#include <type_traits>

#include "frame_attention.h"
#include "vector.h"

namespace {

using worldenv::FrameAttention;
using worldenv::kQueryBlock;

constexpr float kSafeScore = 64.0f;
constexpr int kRows = WORLDENV_MR;  // with WORLDENV_NV vectors each: as many sums as registers hold
constexpr int64_t kKeyBlock = worldenv::kKeyBlock;

// An operand element of the products: one float, or a pair of bf16 multiplied and added together. `put` stores a
// probability and returns what was stored, so that the sums match the rounded values.
struct Single {
  using Element = float;
  using Probability = float;
  static WORLDENV_INLINE Vec multiply_add(Vec sum, float a, Vec b) { return sum + a * b; }
  static WORLDENV_INLINE Vec put(float* p, Vec x) {
    store(p, x);
    return x;
  }
};

struct EmulatedPair {
  using Element = uint32_t;
  using Probability = uint16_t;
  static WORLDENV_INLINE Vec multiply_add(Vec sum, uint32_t a, Vec b) {
    const Bits pair = (Bits)b, left = a - Bits{};
    sum += (Vec)(left << 16) * (Vec)(pair << 16);
    return sum + (Vec)(left & 0xffff0000u) * (Vec)(pair & 0xffff0000u);
  }
  static WORLDENV_INLINE Vec put(uint16_t* p, Vec x) {
    const Half half = narrow(x);
    store(p, half);
    return widen(half);
  }
};

template <class Op>
struct Problem {
  using E = typename Op::Element;
  using P = typename Op::Probability;
  const E* q;       // [rows][depth]
  float* out;       // [rows][D16]
  float* sums;      // [rows][16], one partial sum per lane
  float* maxima;    // [rows], only with a running maximum
  P* probability;   // [rows][kKeyBlock]
  float* raw;       // [rows][kKeyBlock], only with a running maximum
  int64_t rows, depth, tokens, tokens16, dim16;
  bool running;     // subtract a running maximum
  float scale;      // log2(e) / sqrt(D)
};

// MR rows of scores, from `row` on, against NV vectors of keys starting at `key`.
template <class Op, int MR, int NV>
WORLDENV_INLINE void score_tile(const Problem<Op>& x, int64_t row, const typename Op::Element* keys, int64_t key,
                                Vec& top) {
  const auto* q = x.q + row * x.depth;
  float* sums = x.sums + row * 16;
  const int64_t at = row * kKeyBlock + key % kKeyBlock;
  Vec acc[MR][NV] = {};
  for (int64_t d = 0; d < x.depth; ++d) {
    Vec b[NV];
#pragma GCC unroll 16
    for (int v = 0; v < NV; ++v) b[v] = load_as<Vec>(keys + d * x.tokens16 + key + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
      const typename Op::Element a = q[r * x.depth + d];
#pragma GCC unroll 16
      for (int v = 0; v < NV; ++v) acc[r][v] = Op::multiply_add(acc[r][v], a, b[v]);
    }
  }
  // Locals: for all the compiler knows, what is stored below could be `top` or part of `x`.
  const Vec scale = splat(x.scale);  // scaled queries would round once more
  const int32_t left = (int32_t)(x.tokens - key);
  float* raw = x.raw + at;
  auto* probability = x.probability + at;
  if (x.running) {
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 16
      for (int v = 0; v < NV; ++v) store(raw + r * kKeyBlock + v * kLanes, acc[r][v] * scale);
    return;
  }
  Vec high[2] = {top, {}};
  const auto exponentiate = [&](auto whole) WORLDENV_LAMBDA {
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
      Vec partial = load(sums + r * 16);
#pragma GCC unroll 16
      for (int v = 0; v < NV; ++v) {
        const Vec s = acc[r][v] * scale;
        high[v % 2] = largest_magnitude(high[v % 2], s);
        Vec e = exp2_unclamped(s);
        if constexpr (!whole.value) e = pick(lane_index() < left - v * kLanes, e, Vec{});
        partial += Op::put(probability + r * kKeyBlock + v * kLanes, e);
      }
      store(sums + r * 16, partial);
    }
  };
  if (left >= NV * kLanes) exponentiate(std::true_type{});
  else exponentiate(std::false_type{});
  top = vmax(high[0], high[1]);
}

// MR rows of O += P V, from `row` on, over NV vectors of the head dimension starting at `column`; `values` are those
// of the `count` keys that the probabilities belong to.
template <class Op, int MR, int NV>
WORLDENV_INLINE void value_tile(const Problem<Op>& x, int64_t row, const typename Op::Element* values, int64_t count,
                                int64_t column) {
  using E = typename Op::Element;
  constexpr int64_t ratio = sizeof(E) / sizeof(typename Op::Probability), stride = kKeyBlock / ratio;
  const E* p = reinterpret_cast<const E*>(x.probability + row * kKeyBlock);
  float* out = x.out + row * x.dim16 + column;
  Vec acc[MR][NV];
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < NV; ++v) acc[r][v] = load(out + r * x.dim16 + v * kLanes);
  for (int64_t s = 0; s < (count + ratio - 1) / ratio; ++s) {
    Vec b[NV];
#pragma GCC unroll 16
    for (int v = 0; v < NV; ++v) b[v] = load_as<Vec>(values + s * x.dim16 + column + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
      E a;
      std::memcpy(&a, p + r * stride + s, sizeof(E));
#pragma GCC unroll 16
      for (int v = 0; v < NV; ++v) acc[r][v] = Op::multiply_add(acc[r][v], a, b[v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < NV; ++v) store(out + r * x.dim16 + v * kLanes, acc[r][v]);
}

// The running-maximum softmax of all rows' raw scores against a block of `count` keys.
template <class Op>
void renormalise(const Problem<Op>& x, int64_t count) {
  for (int64_t row = 0; row < x.rows; ++row) {
    const float* s = x.raw + row * kKeyBlock;
    float* out = x.out + row * x.dim16;
    float* sums = x.sums + row * 16;
    float top = x.maxima[row];
    for (int64_t i = 0; i < count; ++i) top = s[i] > top ? s[i] : top;
    const Vec shrink = exp2v(splat(x.maxima[row] - top));
    x.maxima[row] = top;
    for (int64_t i = 0; i < x.dim16; i += kLanes) store(out + i, load(out + i) * shrink);
    Vec partial = load(sums) * shrink;
    for (int64_t i = 0; i < count; i += kLanes) {
      Vec e = exp2v(load(s + i) - top);
      e = pick(lane_index() + (int32_t)i < (int32_t)count, e, Vec{});
      partial += Op::put(x.probability + row * kKeyBlock + i, e);
    }
    store(sums, partial);
  }
}

// Keys [first, last), rounded up to whole vectors, against MR rows.
template <class Op, int MR>
WORLDENV_INLINE void score_rows(const Problem<Op>& x, int64_t row, const typename Op::Element* keys, int64_t first,
                                int64_t last, Vec& top) {
  constexpr int NV = WORLDENV_NV;
  int64_t key = first;
  for (; key + NV * kLanes <= last; key += NV * kLanes) score_tile<Op, MR, NV>(x, row, keys, key, top);
  if constexpr (NV > 2)
    for (; key + 2 * kLanes <= last; key += 2 * kLanes) score_tile<Op, MR, 2>(x, row, keys, key, top);
  for (; key < last; key += kLanes) score_tile<Op, MR, 1>(x, row, keys, key, top);
}

template <class Op, int MR>
WORLDENV_INLINE void value_rows(const Problem<Op>& x, int64_t row, const typename Op::Element* values, int64_t count) {
  constexpr int NV = WORLDENV_NV;
  int64_t column = 0;
  for (; column + NV * kLanes <= x.dim16; column += NV * kLanes) value_tile<Op, MR, NV>(x, row, values, count, column);
  if constexpr (NV > 2)
    for (; column + 2 * kLanes <= x.dim16; column += 2 * kLanes) value_tile<Op, MR, 2>(x, row, values, count, column);
  for (; column < x.dim16; column += kLanes) value_tile<Op, MR, 1>(x, row, values, count, column);
}

// Tiles that the next frame will read: fetched towards the core a share per row block, behind the arithmetic.
struct Ahead {
  const char *keys, *values;
  int64_t bytes, share, at;

  void fetch() {
    if (!keys) return;
    const int64_t stop = at + share < bytes ? at + share : bytes;
    for (; at < stop; at += 64) {
      __builtin_prefetch(keys + at, 0, 2);
      __builtin_prefetch(values + at, 0, 2);
    }
  }
};

template <class Op>
void frame_block(const Problem<Op>& x, const typename Op::Element* keys, const typename Op::Element* values,
                 Ahead ahead, Vec& top) {
  constexpr int64_t ratio = sizeof(typename Op::Element) / sizeof(typename Op::Probability);
  for (int64_t first = 0; first < x.tokens; first += kKeyBlock) {
    const int64_t last = first + kKeyBlock < x.tokens16 ? first + kKeyBlock : x.tokens16;
    const int64_t count = (last < x.tokens ? last : x.tokens) - first;
    int64_t row = 0;
    for (; row + kRows <= x.rows; row += kRows) {
      ahead.fetch();
      score_rows<Op, kRows>(x, row, keys, first, last, top);
    }
    for (; row + 4 <= x.rows; row += 4) score_rows<Op, 4>(x, row, keys, first, last, top);
    for (; row < x.rows; ++row) score_rows<Op, 1>(x, row, keys, first, last, top);
    if (x.running) renormalise(x, count);
    const auto* part = values + first / ratio * x.dim16;
    for (row = 0; row + kRows <= x.rows; row += kRows) value_rows<Op, kRows>(x, row, part, count);
    for (; row + 4 <= x.rows; row += 4) value_rows<Op, 4>(x, row, part, count);
    for (; row < x.rows; ++row) value_rows<Op, 1>(x, row, part, count);
  }
}

// A bf16 tile of interleaved pairs as two float rows per row of pairs.
inline void widen_tile(const uint16_t* from, int64_t pairs, int64_t width, float* to) {
  for (int64_t i = 0; i < pairs; ++i)
    for (int64_t j = 0; j < width; j += kLanes) {
      const Bits pair = load_as<Bits>(from + 2 * (i * width + j));
      store(to + 2 * i * width + j, pair << 16);
      store(to + (2 * i + 1) * width + j, pair & 0xffff0000u);
    }
}

inline void copy_row(const float* from, int64_t n, float* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = from[i];
}
inline void copy_row(const uint16_t* from, int64_t n, float* to) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = static_cast<uint32_t>(from[i]) << 16;
    std::memcpy(to + i, &bits, 4);
  }
}
inline void copy_row(const uint16_t* from, int64_t n, uint32_t* to) {
  std::memcpy(to, from, 2 * n);
}
inline void write_row(const float* from, float factor, int64_t n, float* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = from[i] * factor;
}
inline void write_row(const float* from, float factor, int64_t n, uint16_t* to) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(to + i, narrow(load(from + i) * factor));
  if (i < n) {
    Vec last = {};
    std::memcpy(&last, from + i, 4 * (n - i));
    const Half half = narrow(last * factor);
    std::memcpy(to + i, &half, 2 * (n - i));
  }
}

// Key and value tiles of one frame as operands: as they stand, or widened to float when bf16 meets `Single`.
template <class Op, class T>
struct Tiles {
  using E = typename Op::Element;
  static constexpr bool kWiden = sizeof(T) == 2 && sizeof(typename Op::Probability) == 4;
  E *keys, *values;
  int64_t tokens16, dim16;

  const E* operand(const T* tile, bool is_key) const {
    if constexpr (kWiden) {
      E* to = is_key ? keys : values;
      widen_tile(tile, (is_key ? dim16 : tokens16) / 2, is_key ? tokens16 : dim16, to);
      return to;
    } else {
      return reinterpret_cast<const E*>(tile);
    }
  }
};

template <class Op, class T>
void attend(const FrameAttention& a, int64_t b, int64_t h, float* scratch) {
  using E = typename Op::Element;
  const int64_t tokens16 = a.tokens16(), dim16 = a.dim16(), tile = a.tile();
  const int64_t kv = h / (a.heads / a.kv_heads), cached = a.cached[b];
  T* own_keys = reinterpret_cast<T*>(scratch);
  T* own_values = reinterpret_cast<T*>(scratch + tile);
  const T* k = static_cast<const T*>(a.k) + b * a.k_stride[0] + kv * a.k_stride[2];
  const T* v = static_cast<const T*>(a.v) + b * a.v_stride[0] + kv * a.v_stride[2];
  worldenv::pack_keys(k, a.k_stride[1], a.tokens, a.dim, own_keys);
  worldenv::pack_values(v, a.v_stride[1], a.tokens, a.dim, own_values);
  const Tiles<Op, T> tiles{reinterpret_cast<E*>(scratch + 2 * tile), reinterpret_cast<E*>(scratch + 3 * tile),
                           tokens16, dim16};
  const int64_t rows_max = a.tokens < kQueryBlock ? a.tokens : kQueryBlock;
  float* q_rows = scratch + 4 * tile;
  Problem<Op> x;
  x.out = q_rows + rows_max * dim16;
  x.sums = x.out + rows_max * dim16;
  x.maxima = x.sums + rows_max * 16;
  x.raw = x.maxima + rows_max * 16;
  x.probability = reinterpret_cast<typename Op::Probability*>(x.raw + rows_max * kKeyBlock);
  x.tokens = a.tokens;
  x.tokens16 = tokens16;
  x.dim16 = dim16;
  x.depth = dim16 * (sizeof(typename Op::Probability) == 2 ? 1 : 2) / 2;
  x.scale = 1.44269504088896341f / __builtin_sqrtf(static_cast<float>(a.dim));
  x.q = reinterpret_cast<const E*>(q_rows);
  const T* cache_k = static_cast<const T*>(a.cache_k) + (b * a.kv_heads + kv) * a.slots * tile;
  const T* cache_v = static_cast<const T*>(a.cache_v) + (b * a.kv_heads + kv) * a.slots * tile;

  for (int64_t first = 0; first < a.tokens; first += kQueryBlock) {
    x.rows = a.tokens - first < kQueryBlock ? a.tokens - first : kQueryBlock;
    std::memset(q_rows, 0, 4 * x.rows * x.depth);
    for (int64_t r = 0; r < x.rows; ++r) {
      const T* q = static_cast<const T*>(a.q) + b * a.q_stride[0] + (first + r) * a.q_stride[1] + h * a.q_stride[2];
      copy_row(q, a.dim, reinterpret_cast<E*>(q_rows) + r * x.depth);
    }
    for (int attempt = 0; attempt < 2; ++attempt) {
      x.running = attempt == 1;
      Vec top = {};
      std::memset(x.out, 0, 4 * x.rows * dim16);
      std::memset(x.sums, 0, 4 * x.rows * 16);
      for (int64_t r = 0; r < x.rows; ++r) x.maxima[r] = -__builtin_inff();
      for (int64_t j = 0; j <= cached; ++j) {
        const int64_t slot = a.table[b * a.slots + j];
        const E* keys = tiles.operand(j < cached ? cache_k + slot * tile : own_keys, true);
        const E* values = tiles.operand(j < cached ? cache_v + slot * tile : own_values, false);
        Ahead ahead{};
        if (cached > 0 && j != cached - 1) {  // after the own frame comes the next head's first
          const int64_t next = j < cached ? a.table[b * a.slots + j + 1] * tile : (a.slots + a.table[b * a.slots]) * tile;
          ahead.keys = reinterpret_cast<const char*>(cache_k + next);
          ahead.values = reinterpret_cast<const char*>(cache_v + next);
          ahead.bytes = tile * sizeof(T);
          ahead.share = (ahead.bytes * kRows * kKeyBlock / (x.rows * tokens16) + 63) / 64 * 64;
        }
        frame_block(x, keys, values, ahead, top);
      }
      if (x.running || largest(top) < kSafeScore) break;
    }
    T* out = static_cast<T*>(a.out) + ((b * a.tokens + first) * a.heads + h) * a.dim;
    for (int64_t r = 0; r < x.rows; ++r) {
      float* partial = x.sums + r * 16;
      for (int half = 8; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) partial[i] += partial[i + half];
      write_row(x.out + r * dim16, 1.0f / partial[0], a.dim, out + r * a.heads * a.dim);
    }
  }
}

}  // namespace
