// Policy-gradient loss over blocks of rows, compiled once per instruction set: log-probabilities, ratio, clipped
// surrogate, KL, entropy and their gradients while the block is in the nearest cache.
//
// Masked rows are selected away, never multiplied by zero: they may hold NaN. Log-probabilities are summed over A in
// index order by one function for both the loss and `action_logprob`, so an unchanged policy has a ratio of exactly 1.
#pragma once

#include "action_loss.h"
#include "vector.h"

namespace {

using worldenv::ActionLoss;
using worldenv::ActionSums;
using worldenv::kRowBlock;

constexpr float kLog2 = 0.693147180559945f;
constexpr float kHalfLog2Pi = 0.918938533204673f;

// `x` with the sign of `of`; 0 where that is 0.
WORLDENV_INLINE Vec signed_as(Vec of, Vec x) {
  return pick(of != 0.0f, (Vec)((Bits)x ^ ((Bits)of & 0x80000000u)), Vec{});
}
WORLDENV_INLINE float exp1(float x) { return expv(splat(x))[0]; }

// Loops over A are short: A = 7, the action of one arm, gets code of its own (`A` = 0 reads it from the arguments).
template <int A>
WORLDENV_INLINE int64_t dims_of(const ActionLoss& x) { return A ? A : x.dims; }

// Repeat one value per row over its A elements. Stores overrun into the next row, which then overwrites them.
WORLDENV_INLINE void expand(const float* per_row, int64_t rows, int64_t dims, float* to) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t a = 0; a < dims; a += kLanes) store(to + r * dims + a, splat(per_row[r]));
}

struct Density {
  Vec logprob, by_mu, by_scale;
};
WORLDENV_INLINE Density density(bool gaussian, Vec mu, Vec log_scale, Vec inverse, Vec action) {
  const Vec z = (action - mu) * inverse;
  if (gaussian) return {-0.5f * z * z - log_scale - kHalfLog2Pi, z * inverse, z * z - 1.0f};
  const Vec distance = absolute(z);
  return {-distance - log_scale - kLog2, signed_as(z, inverse), distance - 1.0f};
}

struct Divergence {
  Vec value, by_mu, by_scale;
};
// KL(pi | reference). `ratio` = log(scale / reference scale), `other` = 1 / reference scale.
WORLDENV_INLINE Divergence divergence(bool gaussian, Vec delta, Vec inverse, Vec ratio, Vec other) {
  if (gaussian) {
    const Vec spread = expv(2.0f * ratio), far = delta * other;
    return {0.5f * (spread + far * far - 1.0f) - ratio, far * other, spread - 1.0f};
  }
  const Vec distance = absolute(delta), near = expv(-distance * inverse);
  const Vec mass = expv(ratio) * near;
  return {distance * other + mass - 1.0f - ratio, signed_as(delta, other * (1.0f - near)),
          mass * (1.0f + distance * inverse) - 1.0f};
}

WORLDENV_INLINE void row_sums(const float* p, int64_t rows, int64_t dims, float* to) {
  for (int64_t r = 0; r < rows; ++r) {
    float s = 0;
#pragma GCC unroll 8
    for (int64_t a = 0; a < dims; ++a) s += p[r * dims + a];
    to[r] = s;
  }
}

// From log-probabilities of a block to d loss / d logprob per row (0 where masked), adding to the sums.
WORLDENV_INLINE void surrogate(const ActionLoss& x, int64_t begin, int64_t rows, const float* logprob,
                               const float* keep, const float* advantage, float* slope, ActionSums& sums) {
  Vec objective = {}, total = {}, clipped = {}, drift = {}, top = {};
  for (int64_t r = 0; r < rows; r += kLanes) {
    const Int on = load(keep + r) != 0.0f;
    const Vec log_ratio = pick(on, load(logprob + r) - load_part(x.behaviour_logprob + begin + r, rows - r), Vec{});
    const Vec ratio = expv(log_ratio), a = pick(on, load(advantage + r), Vec{});
    const Vec bounded = vmin(vmax(ratio, splat(1.0f - x.clip_low)), splat(1.0f + x.clip_high));
    const Vec free = ratio * a, bound = bounded * a;
    const Int cut = bound < free;
    objective += vmin(free, bound);
    total += pick(on, ratio, Vec{});
    clipped += pick(cut, splat(1.0f), Vec{});
    drift += (ratio - 1.0f) - log_ratio;
    top = vmax(top, pick(on, ratio, Vec{}));
    store(slope + r, pick(cut, Vec{}, -free * x.weight));
  }
  sums.surrogate += sum(objective);
  sums.ratio += sum(total);
  sums.clipped += sum(clipped);
  sums.kl_behaviour += sum(drift);
  sums.ratio_max = largest(vmax(splat(sums.ratio_max), top));
}

// Per-row inputs of a block, padded with zeros to whole vectors.
WORLDENV_INLINE void prepare_rows(const ActionLoss& x, int64_t begin, int64_t rows, float* keep, float* advantage) {
  for (int64_t r = rows; r < kRowBlock + kLanes && r < rows + kLanes; ++r) keep[r] = advantage[r] = 0;
  int64_t b = begin / x.chunk, next = (b + 1) * x.chunk - begin;
  for (int64_t r = 0; r < rows; ++r) {
    if (r == next) ++b, next += x.chunk;
    keep[r] = x.mask[begin + r] ? 1.0f : 0.0f;
    advantage[r] = x.advantage[b];
  }
}

template <int A>
void loss_block_of(const ActionLoss& x, int64_t begin, int64_t end, float* scratch, ActionSums& sums) {
  const int64_t dims = dims_of<A>(x);
  const int64_t rows = end - begin, n = rows * dims, at = begin * dims, step = kRowBlock * dims + 64;
  float *element = scratch, *by_mu = scratch + step, *by_scale = scratch + 2 * step, *kept = scratch + 3 * step;
  float *extra_mu = scratch + 4 * step, *extra_scale = scratch + 5 * step, *slope = scratch + 6 * step;
  float keep[kRowBlock + kLanes], advantage[kRowBlock + kLanes], logprob[kRowBlock + kLanes] = {};
  float row_slope[kRowBlock + kLanes];
  const bool gaussian = x.distribution == worldenv::kGaussian;
  const float constant = gaussian ? 0.5f + kHalfLog2Pi : 1.0f + kLog2;
  prepare_rows(x, begin, rows, keep, advantage);
  expand(keep, rows, dims, kept);
  for (int i = 0; i < kLanes; ++i) kept[n + i] = 0;
  Vec entropy = {}, kl = {};
  for (int64_t i = 0; i < n; i += kLanes) {
    const int64_t left = n - i;
    const Int on = load(kept + i) != 0.0f;
    const Vec mu = load_part(x.mu + at + i, left), log_scale = load_part(x.log_scale + at + i, left);
    const Vec inverse = expv(-log_scale);
    const Density d = density(gaussian, mu, log_scale, inverse, load_part(x.action + at + i, left));
    store(element + i, d.logprob);
    store(by_mu + i, d.by_mu);
    store(by_scale + i, d.by_scale);
    entropy += pick(on, log_scale + constant, Vec{});
    if (!x.reference_mu) continue;
    const Vec delta = mu - load_part(x.reference_mu + at + i, left);
    Vec ratio = {}, other = inverse;
    if (x.reference_log_scale) {
      const Vec reference = load_part(x.reference_log_scale + at + i, left);
      ratio = log_scale - reference;
      other = expv(-reference);
    }
    const Divergence k = divergence(gaussian, delta, inverse, ratio, other);
    kl += pick(on, k.value, Vec{});
    store(extra_mu + i, k.by_mu);
    store(extra_scale + i, k.by_scale);
  }
  sums.entropy += sum(entropy);
  sums.kl += sum(kl);
  row_sums(element, rows, dims, logprob);
  surrogate(x, begin, rows, logprob, keep, advantage, row_slope, sums);
  expand(row_slope, rows, dims, slope);
  const float kl_weight = x.kl_weight * x.weight, entropy_weight = x.entropy_weight * x.weight;
  for (int64_t i = 0; i < n; i += kLanes) {
    const Int on = load(kept + i) != 0.0f;
    const Vec s = load(slope + i);
    Vec mu = s * load(by_mu + i), scale = s * load(by_scale + i) - entropy_weight;
    if (x.reference_mu) {
      mu += kl_weight * load(extra_mu + i);
      scale += kl_weight * load(extra_scale + i);
    }
    store_part(x.grad_mu + at + i, pick(on, mu, Vec{}), n - i);
    store_part(x.grad_log_scale + at + i, pick(on, scale, Vec{}), n - i);
  }
}

void loss_block(const ActionLoss& x, int64_t begin, int64_t end, float* scratch, ActionSums& sums) {
  if (x.dims == 7) loss_block_of<7>(x, begin, end, scratch, sums);
  else loss_block_of<0>(x, begin, end, scratch, sums);
}

void logprob_block(const ActionLoss& x, int64_t begin, int64_t end, float* scratch) {
  const int64_t rows = end - begin, n = rows * x.dims, at = begin * x.dims;
  const bool gaussian = x.distribution == worldenv::kGaussian;
  for (int64_t i = 0; i < n; i += kLanes) {
    const int64_t left = n - i;
    const Vec log_scale = load_part(x.log_scale + at + i, left);
    const Density d = density(gaussian, load_part(x.mu + at + i, left), log_scale, expv(-log_scale),
                              load_part(x.action + at + i, left));
    store(scratch + i, d.logprob);
  }
  row_sums(scratch, rows, x.dims, x.logprob + begin);
}

// log(sum(exp(logits))); the probabilities themselves are never stored.
WORLDENV_INLINE float log_sum_exp(const float* logits, int64_t count) {
  Vec top = splat(-__builtin_inff());
  for (int64_t j = 0; j + kLanes <= count; j += kLanes) top = vmax(top, load(logits + j));
  float m = largest(top);
  for (int64_t j = count / kLanes * kLanes; j < count; ++j) m = logits[j] > m ? logits[j] : m;
  Vec total = {};
  for (int64_t j = 0; j < count; j += kLanes) {
    const Vec e = expv(load_part(logits + j, count - j) - m);
    total += pick(lane_index() + (int32_t)j < (int32_t)count, e, Vec{});
  }
  return m + __builtin_logf(sum(total));
}
WORLDENV_INLINE float token_row(const ActionLoss& x, int64_t row, float* log_sums) {
  float s = 0;
  for (int64_t a = 0; a < x.dims; ++a) {
    const int64_t i = row * x.dims + a;
    log_sums[a] = log_sum_exp(x.mu + i * x.vocabulary, x.vocabulary);
    s += x.mu[i * x.vocabulary + x.token[i]] - log_sums[a];
  }
  return s;
}

void token_logprob_block(const ActionLoss& x, int64_t begin, int64_t end, float* scratch) {
  for (int64_t r = begin; r < end; ++r) x.logprob[r] = token_row(x, r, scratch);
}

// Gradient of one categorical, and its entropy and KL added to the sums.
WORLDENV_INLINE void token_gradient(const ActionLoss& x, int64_t i, float log_sum, float slope, ActionSums& sums) {
  const int64_t count = x.vocabulary;
  const float *logits = x.mu + i * count, *reference = x.reference_mu ? x.reference_mu + i * count : nullptr;
  float* grad = x.grad_mu + i * count;
  const float other = reference ? log_sum_exp(reference, count) : 0.0f;
  Vec entropy = {}, kl = {};
  for (int64_t j = 0; j < count; j += kLanes) {
    const Int on = lane_index() + (int32_t)j < (int32_t)count;
    const Vec logp = load_part(logits + j, count - j) - log_sum, p = pick(on, expv(logp), Vec{});
    entropy -= pick(p > 0.0f, p * logp, p);
    if (reference) kl += pick(p > 0.0f, p * (logp - (load_part(reference + j, count - j) - other)), p);
  }
  const float h = sum(entropy), d = sum(kl);
  sums.entropy += h;
  sums.kl += d;
  const float kl_weight = x.kl_weight * x.weight, entropy_weight = x.entropy_weight * x.weight;
  for (int64_t j = 0; j < count; j += kLanes) {
    const Vec logp = load_part(logits + j, count - j) - log_sum, p = expv(logp);
    Vec g = -slope * p;
    if (entropy_weight != 0.0f) g += pick(p > 0.0f, entropy_weight * p * (logp + h), p);
    if (reference && kl_weight != 0.0f)
      g += pick(p > 0.0f, kl_weight * p * (logp - (load_part(reference + j, count - j) - other) - d), p);
    store_part(grad + j, g, count - j);
  }
  grad[x.token[i]] += slope;
}

void token_loss_block(const ActionLoss& x, int64_t begin, int64_t end, float* scratch, ActionSums& sums) {
  const int64_t rows = end - begin;
  float keep[kRowBlock + kLanes], advantage[kRowBlock + kLanes], logprob[kRowBlock + kLanes] = {};
  float slope[kRowBlock + kLanes];
  prepare_rows(x, begin, rows, keep, advantage);
  for (int64_t r = 0; r < rows; ++r)
    if (keep[r] != 0.0f) logprob[r] = token_row(x, begin + r, scratch + r * x.dims);
  surrogate(x, begin, rows, logprob, keep, advantage, slope, sums);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t a = 0; a < x.dims; ++a) {
      const int64_t i = (begin + r) * x.dims + a;
      if (keep[r] != 0.0f) token_gradient(x, i, scratch[r * x.dims + a], slope[r], sums);
      else std::memset(x.grad_mu + i * x.vocabulary, 0, 4 * x.vocabulary);
    }
}

}  // namespace

#define WORLDENV_ACTION_KERNELS(name)                                                         \
  worldenv::ActionKernels worldenv::name() {                                                  \
    return {loss_block, token_loss_block, logprob_block, token_logprob_block, gae_block};     \
  }
