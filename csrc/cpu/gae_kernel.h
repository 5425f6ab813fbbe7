// The backward scan over T, compiled once per instruction set: a few vectors of environments at a time, whose traces
// and next values stay in registers.
#pragma once

#include "gae.h"
#include "vector.h"

namespace {

using worldenv::Gae;

typedef uint8_t Bytes __attribute__((vector_size(WORLDENV_LANES)));

WORLDENV_INLINE Int flags(const uint8_t* p, int64_t n) {
  Bytes b = {};
  if (n >= kLanes) b = load_as<Bytes>(p);
  else std::memcpy(&b, p, n);
#if WORLDENV_LANES == 16 && defined(__x86_64__)  // gcc would convert them one by one
  return (Int)_mm512_cvtepu8_epi32((__m128i)b) != 0;
#elif WORLDENV_LANES == 8 && defined(__x86_64__)
  return (Int)_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(load_as<int64_t>(&b))) != 0;
#else
  return __builtin_convertvector(b, Int) != 0;
#endif
}

// Environments [column, column + count), count <= NV * kLanes.
template <int NV>
WORLDENV_INLINE void gae_columns(const Gae<float>& a, int64_t column, int64_t count) {
  const float decay = a.gamma * a.lam;
  Vec trace[NV] = {}, next[NV];
  for (int v = 0; v < NV; ++v) next[v] = load_part(a.value + a.steps * a.batch + column + v * kLanes, count - v * kLanes);
  for (int64_t t = a.steps - 1; t >= 0; --t)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      const int64_t at = t * a.batch + column + v * kLanes, n = count - v * kLanes;
      // Chosen, not multiplied: what follows an episode's end may hold NaN.
      const Int over = flags(a.terminated + at, n), cut = over | flags(a.truncated + at, n);
      const Vec now = load_part(a.value + at, n), bootstrap = pick(over, Vec{}, next[v]);
      trace[v] = load_part(a.reward + at, n) + a.gamma * bootstrap - now + decay * pick(cut, Vec{}, trace[v]);
      next[v] = now;
      store_part(a.advantage + at, trace[v], n);
      store_part(a.target + at, trace[v] + now, n);
    }
}

void gae_block(const Gae<float>& a, int64_t begin, int64_t end) {
  for (; begin + 4 * kLanes <= end; begin += 4 * kLanes) gae_columns<4>(a, begin, 4 * kLanes);
  for (; begin < end; begin += kLanes) gae_columns<1>(a, begin, end - begin);
}

}  // namespace
