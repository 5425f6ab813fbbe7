// Policy-gradient loss with its gradient, and log-probabilities: host checks, blocks of rows, choice of kernel. CPU, f32.

#include "action_loss.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <tuple>
#include <vector>

#include "allocate.h"
#include "isa.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace worldenv {
namespace {

constexpr int64_t kBlocksPerTask = 16;  // fixed, so that sums do not depend on the number of threads

const float* floats(const Tensor& t, int64_t numel, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.is_contiguous() && t.numel() == numel,
                  "action_loss: ", name, " must be contiguous f32 with ", numel, " elements, got ", t.numel());
  return static_cast<const float*>(t.const_data_ptr());
}

const int64_t* tokens(const Tensor& t, int64_t numel, int64_t vocabulary) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Long && t.is_contiguous() && t.numel() == numel,
                  "token_loss: action must be contiguous int64 with ", numel, " elements");
  const auto* p = static_cast<const int64_t*>(t.const_data_ptr());
  for (int64_t i = 0; i < numel; ++i)
    STD_TORCH_CHECK(p[i] >= 0 && p[i] < vocabulary, "token_loss: action ids must lie in 0..", vocabulary - 1, ", got ",
                    p[i]);
  return p;
}

ActionLoss describe(const Tensor& mu, bool categorical) {
  STD_TORCH_CHECK(mu.dim() == (categorical ? 4 : 3), "action_loss: mu must be [B,C,A], logits [B,C,A,K]");
  ActionLoss x{};
  x.chunk = mu.size(1);
  x.rows = mu.size(0) * mu.size(1);
  x.dims = mu.size(2);
  x.vocabulary = categorical ? mu.size(3) : 1;
  x.mu = floats(mu, x.rows * x.dims * x.vocabulary, "mu");
  return x;
}

// Sums over all rows into loss [] and metrics [8], in the order of METRICS in worldenv/ops/action_loss.py.
void run(ActionLoss& x, const Tensor& mask, ActionLossKernel kernel, Tensor& loss, Tensor& metrics) {
  STD_TORCH_CHECK(mask.scalar_type() == ScalarType::Bool && mask.is_contiguous() && mask.numel() == x.rows,
                  "action_loss: mask must be contiguous bool [B,C]");
  x.mask = static_cast<const uint8_t*>(mask.const_data_ptr());
  int64_t count = 0;
  for (int64_t r = 0; r < x.rows; ++r) count += x.mask[r] != 0;
  x.weight = 1.0f / static_cast<float>(count > 0 ? count : 1);
  const int64_t task_rows = kBlocksPerTask * kRowBlock, tasks = (x.rows + task_rows - 1) / task_rows;
  std::vector<ActionSums> sums(tasks);
  const auto work = [&](int64_t first, int64_t last) {
    std::vector<float> scratch(8 * (kRowBlock * x.dims + 64));
    for (int64_t t = first; t < last; ++t)
      for (int64_t r = t * task_rows; r < x.rows && r < (t + 1) * task_rows; r += kRowBlock)
        kernel(x, r, r + kRowBlock < x.rows ? r + kRowBlock : x.rows, scratch.data(), sums[t]);
  };
  if (tasks == 1) work(0, 1);
  else if (tasks > 1) torch::stable::parallel_for(0, tasks, 1, work);
  ActionSums all;
  for (const ActionSums& s : sums) all.add(s);
  const double w = 1.0 / static_cast<double>(count > 0 ? count : 1), policy = -all.surrogate * w;
  auto* m = static_cast<float*>(metrics.mutable_data_ptr());
  const double values[8] = {policy, all.kl * w, all.entropy * w, all.ratio * w, all.ratio_max, all.clipped * w,
                            all.kl_behaviour * w, static_cast<double>(count)};
  for (int i = 0; i < 8; ++i) m[i] = static_cast<float>(values[i]);
  *static_cast<float*>(loss.mutable_data_ptr()) =
      static_cast<float>(policy + x.kl_weight * all.kl * w - x.entropy_weight * all.entropy * w);
}

void set_rows(ActionLoss& x, const Tensor& behaviour, const Tensor& advantage, int64_t batch) {
  x.behaviour_logprob = floats(behaviour, x.rows, "behaviour_logprob");
  x.advantage = floats(advantage, batch, "advantage");
}

std::tuple<Tensor, Tensor, Tensor, Tensor> action_loss(
    const Tensor mu, const Tensor log_scale, const Tensor action, const Tensor behaviour_logprob,
    const Tensor advantage, const Tensor mask, const std::optional<Tensor> reference_mu,
    const std::optional<Tensor> reference_log_scale, int64_t distribution, double clip_low, double clip_high,
    double kl_weight, double entropy_weight, int64_t isa) {
  ActionLoss x = describe(mu, false);
  const int64_t n = x.rows * x.dims;
  x.log_scale = floats(log_scale, n, "log_scale");
  x.action = floats(action, n, "action");
  set_rows(x, behaviour_logprob, advantage, mu.size(0));
  if (reference_mu) x.reference_mu = floats(*reference_mu, n, "reference_mu");
  if (reference_log_scale) x.reference_log_scale = floats(*reference_log_scale, n, "reference_log_scale");
  x.distribution = static_cast<Distribution>(distribution);
  x.clip_low = static_cast<float>(clip_low);
  x.clip_high = static_cast<float>(clip_high);
  x.kl_weight = static_cast<float>(kl_weight);
  x.entropy_weight = static_cast<float>(entropy_weight);
  Tensor loss = empty_cpu({}, ScalarType::Float), metrics = empty_cpu({8}, ScalarType::Float);
  Tensor grad_mu = empty_cpu_like(mu), grad_log_scale = empty_cpu_like(mu);
  x.grad_mu = static_cast<float*>(grad_mu.mutable_data_ptr());
  x.grad_log_scale = static_cast<float*>(grad_log_scale.mutable_data_ptr());
  run(x, mask, action_kernels(isa).loss, loss, metrics);
  return {loss, metrics, grad_mu, grad_log_scale};
}

std::tuple<Tensor, Tensor, Tensor> token_loss(const Tensor logits, const Tensor action, const Tensor behaviour_logprob,
                                              const Tensor advantage, const Tensor mask,
                                              const std::optional<Tensor> reference_logits, double clip_low,
                                              double clip_high, double kl_weight, double entropy_weight, int64_t isa) {
  ActionLoss x = describe(logits, true);
  x.token = tokens(action, x.rows * x.dims, x.vocabulary);
  set_rows(x, behaviour_logprob, advantage, logits.size(0));
  if (reference_logits) x.reference_mu = floats(*reference_logits, logits.numel(), "reference_logits");
  x.clip_low = static_cast<float>(clip_low);
  x.clip_high = static_cast<float>(clip_high);
  x.kl_weight = static_cast<float>(kl_weight);
  x.entropy_weight = static_cast<float>(entropy_weight);
  Tensor loss = empty_cpu({}, ScalarType::Float), metrics = empty_cpu({8}, ScalarType::Float);
  Tensor grad = empty_cpu_like(logits);
  x.grad_mu = static_cast<float*>(grad.mutable_data_ptr());
  run(x, mask, action_kernels(isa).token_loss, loss, metrics);
  return {loss, metrics, grad};
}

Tensor logprobs(ActionLoss& x, const Tensor& like, ActionLogprobKernel kernel) {
  Tensor out = empty_cpu({like.size(0), like.size(1)}, ScalarType::Float);
  x.logprob = static_cast<float*>(out.mutable_data_ptr());
  const int64_t blocks = (x.rows + kRowBlock - 1) / kRowBlock;
  torch::stable::parallel_for(0, blocks, kBlocksPerTask, [&](int64_t first, int64_t last) {
    std::vector<float> scratch(kRowBlock * x.dims + 64);
    for (int64_t i = first; i < last; ++i)
      kernel(x, i * kRowBlock, (i + 1) * kRowBlock < x.rows ? (i + 1) * kRowBlock : x.rows, scratch.data());
  });
  return out;
}

Tensor action_logprob(const Tensor mu, const Tensor log_scale, const Tensor action, int64_t distribution,
                      int64_t isa) {
  ActionLoss x = describe(mu, false);
  x.log_scale = floats(log_scale, x.rows * x.dims, "log_scale");
  x.action = floats(action, x.rows * x.dims, "action");
  x.distribution = static_cast<Distribution>(distribution);
  return logprobs(x, mu, action_kernels(isa).logprob);
}

Tensor token_logprob(const Tensor logits, const Tensor action, int64_t isa) {
  ActionLoss x = describe(logits, true);
  x.token = tokens(action, x.rows * x.dims, x.vocabulary);
  return logprobs(x, logits, action_kernels(isa).token_logprob);
}

}  // namespace

ActionKernels action_kernels(int64_t isa) {
  isa = resolve_isa(isa);
#if defined(__x86_64__)
  if (isa >= kAvx512) return action_kernels_avx512();
  if (isa == kAvx2) return action_kernels_avx2();
#endif
  return action_kernels_portable();
}

}  // namespace worldenv

STABLE_TORCH_LIBRARY_IMPL(worldenv, CPU, m) {
  m.impl("action_loss", TORCH_BOX(&worldenv::action_loss));
  m.impl("token_loss", TORCH_BOX(&worldenv::token_loss));
  m.impl("action_logprob", TORCH_BOX(&worldenv::action_logprob));
  m.impl("token_logprob", TORCH_BOX(&worldenv::token_logprob));
}
