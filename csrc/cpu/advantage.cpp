// Generalised advantage estimation: one backward scan over T, vectorised over B by the compiler. CPU, f32 and f64.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstring>
#include <tuple>
#include <type_traits>
#include <vector>

#include "allocate.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace worldenv {
namespace {

// x or 0, by a bit mask: what follows an episode's end may hold NaN, and a branch would stop vectorisation.
template <class T>
inline T keep_if(bool condition, T x) {
  using Word = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  Word bits;
  std::memcpy(&bits, &x, sizeof(T));
  bits &= Word{0} - static_cast<Word>(condition);
  std::memcpy(&x, &bits, sizeof(T));
  return x;
}

template <class T>
void scan(const T* __restrict reward, const T* __restrict value, const uint8_t* __restrict terminated,
          const uint8_t* __restrict truncated, T gamma, T lam, int64_t steps, int64_t batch, int64_t begin,
          int64_t end, T* __restrict advantage, T* __restrict target) {
  std::vector<T> storage(end - begin);
  T* __restrict carry = storage.data();
  for (int64_t t = steps - 1; t >= 0; --t) {
    const int64_t at = t * batch + begin;
    for (int64_t i = 0; i < end - begin; ++i) {
      const T now = value[at + i];
      const T bootstrap = keep_if(!terminated[at + i], value[at + batch + i]);
      const T trace = keep_if(!(terminated[at + i] | truncated[at + i]), carry[i]);
      const T a = (reward[at + i] + gamma * bootstrap - now) + gamma * lam * trace;
      advantage[at + i] = a;
      target[at + i] = a + now;
      carry[i] = a;
    }
  }
}

std::tuple<Tensor, Tensor> gae(const Tensor reward, const Tensor value, const Tensor terminated,
                               const Tensor truncated, double gamma, double lam) {
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
  const auto* over = static_cast<const uint8_t*>(terminated.const_data_ptr());
  const auto* cut = static_cast<const uint8_t*>(truncated.const_data_ptr());
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    torch::stable::parallel_for(0, batch, 1 + (1 << 15) / steps, [&](int64_t begin, int64_t end) {
      scan(static_cast<const T*>(reward.const_data_ptr()), static_cast<const T*>(value.const_data_ptr()), over, cut,
           static_cast<T>(gamma), static_cast<T>(lam), steps, batch, begin, end,
           static_cast<T*>(advantage.mutable_data_ptr()), static_cast<T*>(target.mutable_data_ptr()));
    });
  };
  if (dtype == ScalarType::Float) run(float{});
  else run(double{});
  return {advantage, target};
}

}  // namespace
}  // namespace worldenv

STABLE_TORCH_LIBRARY_IMPL(worldenv, CPU, m) { m.impl("gae", TORCH_BOX(&worldenv::gae)); }
