// Generalised advantage estimation: host checks, choice of kernel. CPU, f32 and f64.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <tuple>

#include "action_loss.h"
#include "allocate.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace worldenv {
namespace {

// Plain code for float64, which only tests and references use.
void scan(const Gae<double>& a, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    double trace = 0;
    for (int64_t t = a.steps - 1; t >= 0; --t) {
      const int64_t at = t * a.batch + i;
      // Chosen, not multiplied: what follows an episode's end may hold NaN.
      const double bootstrap = a.terminated[at] ? 0 : a.gamma * a.value[at + a.batch];
      const double carried = a.terminated[at] || a.truncated[at] ? 0 : a.gamma * a.lam * trace;
      trace = a.reward[at] + bootstrap - a.value[at] + carried;
      a.advantage[at] = trace;
      a.target[at] = trace + a.value[at];
    }
  }
}

std::tuple<Tensor, Tensor> gae(const Tensor reward, const Tensor value, const Tensor terminated,
                               const Tensor truncated, double gamma, double lam, int64_t isa) {
  STD_TORCH_CHECK(reward.dim() == 2, "gae: reward must be [T,B]");
  const int64_t steps = reward.size(0), batch = reward.size(1);
  const auto dtype = reward.scalar_type();
  STD_TORCH_CHECK((dtype == ScalarType::Float || dtype == ScalarType::Double) && value.scalar_type() == dtype,
                  "gae: reward and value must both be f32 or f64");
  STD_TORCH_CHECK(value.numel() == (steps + 1) * batch && terminated.numel() == steps * batch &&
                      truncated.numel() == steps * batch,
                  "gae: value must be [T+1,B] and the masks [T,B]");
  STD_TORCH_CHECK(terminated.scalar_type() == ScalarType::Bool && truncated.scalar_type() == ScalarType::Bool,
                  "gae: masks must be bool");
  STD_TORCH_CHECK(
      reward.is_contiguous() && value.is_contiguous() && terminated.is_contiguous() && truncated.is_contiguous(),
      "gae: tensors must be contiguous");
  Tensor advantage = empty_cpu_like(reward), target = empty_cpu_like(reward);
  if (reward.numel() == 0) return {advantage, target};
  const auto run = [&](auto zero, auto kernel) {
    using T = decltype(zero);
    const Gae<T> a{static_cast<const T*>(reward.const_data_ptr()), static_cast<const T*>(value.const_data_ptr()),
                   static_cast<const uint8_t*>(terminated.const_data_ptr()),
                   static_cast<const uint8_t*>(truncated.const_data_ptr()),
                   static_cast<T*>(advantage.mutable_data_ptr()), static_cast<T*>(target.mutable_data_ptr()),
                   static_cast<T>(gamma), static_cast<T>(lam), steps, batch};
    const int64_t grain = 1 + (1 << 15) / steps;
    if (batch <= grain) kernel(a, 0, batch);
    else torch::stable::parallel_for(0, batch, grain, [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
  };
  if (dtype == ScalarType::Float) run(float{}, action_kernels(isa).gae);
  else run(double{}, scan);
  return {advantage, target};
}

}  // namespace
}  // namespace worldenv

STABLE_TORCH_LIBRARY_IMPL(worldenv, CPU, m) { m.impl("gae", TORCH_BOX(&worldenv::gae)); }
