// The denoiser's pointwise operations: host checks, blocks of rows, choice of kernel. CPU, f32 and bf16.

#include "pointwise.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <tuple>
#include <type_traits>
#include <vector>

#include "allocate.h"
#include "isa.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace worldenv {
namespace {

constexpr int64_t kElements = 1 << 14;  // per task; fixed, so that sums do not depend on the number of threads

template <class T>
PointwiseKernels<T> kernels_for(int64_t isa) {
  isa = resolve_isa(isa);
  PointwiseTables tables = pointwise_kernels_portable();
#if defined(__x86_64__)
  if (isa >= kAvx512) tables = pointwise_kernels_avx512();
  else if (isa == kAvx2) tables = pointwise_kernels_avx2();
#endif
  if constexpr (std::is_same_v<T, float>) return tables.f32;
  else return tables.bf16;
}

// Calls work(float{}) or work(uint16_t{}) by the tensor's type.
template <class Work>
void by_type(const Tensor& x, const char* op, Work work) {
  if (x.scalar_type() == ScalarType::Float) return work(float{});
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::BFloat16, op, ": expected f32 or bf16");
  work(uint16_t{});
}

template <class T>
NormRotary<T> describe(const Tensor& x, const Tensor& weight, const Tensor& rotary, double eps, Tensor& out) {
  STD_TORCH_CHECK(x.dim() == 2 && rotary.dim() == 2 && rotary.size(0) > 0 && x.size(0) % rotary.size(0) == 0 &&
                      rotary.size(1) > 0 && rotary.size(1) % 2 == 0 && x.size(1) % rotary.size(1) == 0,
                  "norm_rotary: expected x [R,E] and rotary [turns,D]; turns must divide R, D be even and divide E");
  STD_TORCH_CHECK(x.stride(1) == 1, "norm_rotary: the channels of x must be contiguous");
  STD_TORCH_CHECK(weight.scalar_type() == ScalarType::Float && weight.is_contiguous() && weight.numel() == x.size(1),
                  "norm_rotary: weight must be contiguous f32 [E]");
  STD_TORCH_CHECK(rotary.scalar_type() == ScalarType::Float && rotary.is_contiguous(),
                  "norm_rotary: rotary must be contiguous f32");
  NormRotary<T> a{};
  a.x = static_cast<const T*>(x.const_data_ptr());
  a.weight = static_cast<const float*>(weight.const_data_ptr());
  a.rotary = static_cast<const float*>(rotary.const_data_ptr());
  a.out = static_cast<T*>(out.mutable_data_ptr());
  a.stride = x.stride(0);
  a.width = x.size(1);
  a.dim = rotary.size(1);
  a.turns = rotary.size(0);
  a.eps = static_cast<float>(eps);
  return a;
}

int64_t rows_per_task(int64_t width) { return width < kElements ? kElements / width : 1; }

// Rows in tasks of about kElements numbers: work(task, begin, end).
template <class Work>
void over_rows(int64_t rows, int64_t width, Work work) {
  const int64_t block = rows_per_task(width), tasks = (rows + block - 1) / block;
  const auto run = [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) work(t, t * block, (t + 1) * block < rows ? (t + 1) * block : rows);
  };
  if (tasks == 1) run(0, 1);
  else if (tasks > 1) torch::stable::parallel_for(0, tasks, 1, run);
}

Tensor norm_rotary(const Tensor x, const Tensor weight, const Tensor rotary, double eps, int64_t isa) {
  Tensor out = empty_cpu({x.size(0), x.size(1)}, x.scalar_type());
  by_type(x, "norm_rotary", [&](auto zero) {
    using T = decltype(zero);
    const NormRotary<T> a = describe<T>(x, weight, rotary, eps, out);
    const auto kernel = kernels_for<T>(isa).norm_rotary;
    over_rows(x.size(0), a.width, [&](int64_t, int64_t begin, int64_t end) { kernel(a, begin, end); });
  });
  return out;
}

std::tuple<Tensor, Tensor> norm_rotary_bwd(const Tensor grad, const Tensor x, const Tensor weight,
                                           const Tensor rotary, double eps, int64_t isa) {
  Tensor out = empty_cpu({x.size(0), x.size(1)}, x.scalar_type()), by_weight = empty_cpu_like(weight);
  STD_TORCH_CHECK(grad.scalar_type() == x.scalar_type() && grad.is_contiguous() && grad.numel() == x.numel(),
                  "norm_rotary: the gradient must be contiguous and like x");
  by_type(x, "norm_rotary", [&](auto zero) {
    using T = decltype(zero);
    NormRotary<T> a = describe<T>(x, weight, rotary, eps, out);
    a.grad_out = static_cast<const T*>(grad.const_data_ptr());
    const auto kernel = kernels_for<T>(isa).norm_rotary_bwd;
    const int64_t rows = x.size(0), width = a.width;
    const int64_t block = rows_per_task(width), tasks = (rows + block - 1) / block;
    std::vector<float> parts(tasks * width, 0.0f);
    over_rows(rows, width, [&](int64_t task, int64_t begin, int64_t end) {
      std::vector<float> scratch(width);
      NormRotary<T> mine = a;
      mine.grad_weight = parts.data() + task * width;
      kernel(mine, begin, end, scratch.data());
    });
    auto* total = static_cast<float*>(by_weight.mutable_data_ptr());
    for (int64_t e = 0; e < width; ++e) {
      double s = 0;
      for (int64_t t = 0; t < tasks; ++t) s += parts[t * width + e];
      total[e] = static_cast<float>(s);
    }
  });
  return {out, by_weight};
}

template <class Work>
void over_elements(int64_t count, Work work) {
  over_rows((count + kElements - 1) / kElements, kElements, [&](int64_t, int64_t begin, int64_t end) {
    const int64_t last = end * kElements < count ? end * kElements : count;
    work(begin * kElements, last - begin * kElements);
  });
}

Tensor gelu(const Tensor x, int64_t isa) {
  STD_TORCH_CHECK(x.is_contiguous(), "gelu: x must be contiguous");
  Tensor out = empty_cpu_like(x);
  by_type(x, "gelu", [&](auto zero) {
    using T = decltype(zero);
    const auto* from = static_cast<const T*>(x.const_data_ptr());
    auto* to = static_cast<T*>(out.mutable_data_ptr());
    const auto kernel = kernels_for<T>(isa).gelu;
    over_elements(x.numel(), [&](int64_t at, int64_t n) { kernel(from + at, to + at, n); });
  });
  return out;
}

Tensor gelu_bwd(const Tensor grad, const Tensor x, int64_t isa) {
  STD_TORCH_CHECK(x.is_contiguous() && grad.is_contiguous() && grad.numel() == x.numel() &&
                      grad.scalar_type() == x.scalar_type(),
                  "gelu: x and the gradient must be contiguous and alike");
  Tensor out = empty_cpu_like(x);
  by_type(x, "gelu", [&](auto zero) {
    using T = decltype(zero);
    const auto *from = static_cast<const T*>(x.const_data_ptr()), *slope = static_cast<const T*>(grad.const_data_ptr());
    auto* to = static_cast<T*>(out.mutable_data_ptr());
    const auto kernel = kernels_for<T>(isa).gelu_bwd;
    over_elements(x.numel(), [&](int64_t at, int64_t n) { kernel(slope + at, from + at, to + at, n); });
  });
  return out;
}

}  // namespace
}  // namespace worldenv

STABLE_TORCH_LIBRARY_IMPL(worldenv, CPU, m) {
  m.impl("norm_rotary", TORCH_BOX(&worldenv::norm_rotary));
  m.impl("norm_rotary_bwd", TORCH_BOX(&worldenv::norm_rotary_bwd));
  m.impl("gelu", TORCH_BOX(&worldenv::gelu));
  m.impl("gelu_bwd", TORCH_BOX(&worldenv::gelu_bwd));
}
