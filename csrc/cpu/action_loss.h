// Arguments of the policy-gradient loss and of its kernels. Rows are chunk steps: R = B * C.
#pragma once

#include <cstdint>

#include "gae.h"

namespace worldenv {

enum Distribution : int64_t { kLaplace = 0, kGaussian = 1 };

struct ActionLoss {
  const float *mu, *log_scale, *action;                // [R, A]; tokens: mu = logits [R, A, K]
  const int64_t* token;                                // [R, A], tokens only
  const float *reference_mu, *reference_log_scale;     // like mu, or null
  const float *behaviour_logprob, *advantage;          // [R], [B]
  const uint8_t* mask;                                 // [R]
  float *grad_mu, *grad_log_scale, *logprob;           // like mu; [R] where only log-probabilities are asked for
  int64_t rows, chunk, dims, vocabulary;               // R, C, A, K
  Distribution distribution;
  float clip_low, clip_high, kl_weight, entropy_weight, weight;  // weight = 1 / unmasked rows
};

// Sums over unmasked rows, added up in double across blocks.
struct ActionSums {
  double surrogate = 0, kl = 0, entropy = 0, ratio = 0, clipped = 0, kl_behaviour = 0;
  float ratio_max = 0;

  void add(const ActionSums& o) {
    surrogate += o.surrogate;
    kl += o.kl;
    entropy += o.entropy;
    ratio += o.ratio;
    clipped += o.clipped;
    kl_behaviour += o.kl_behaviour;
    ratio_max = o.ratio_max > ratio_max ? o.ratio_max : ratio_max;
  }
};

constexpr int64_t kRowBlock = 64;

// Rows [begin, end), at most kRowBlock of them; `scratch` holds 8 * (kRowBlock * A + 64) floats.
using ActionLossKernel = void (*)(const ActionLoss&, int64_t begin, int64_t end, float* scratch, ActionSums&);
using ActionLogprobKernel = void (*)(const ActionLoss&, int64_t begin, int64_t end, float* scratch);

struct ActionKernels {
  ActionLossKernel loss, token_loss;
  ActionLogprobKernel logprob, token_logprob;
  GaeKernel gae;
};

ActionKernels action_kernels_portable();
ActionKernels action_kernels_avx2();
ActionKernels action_kernels_avx512();
ActionKernels action_kernels(int64_t isa);  // of an instruction set, or of the best with -1

}  // namespace worldenv
