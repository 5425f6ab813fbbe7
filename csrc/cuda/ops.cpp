// CUDA side of the ops: host checks, allocation, the current stream; the kernels are in *_kernel.cu.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <tuple>

#include "kernels.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace worldenv {
namespace {

using Pointer = const Tensor*;

void* current_stream(const Tensor& t) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return stream;
}

void check_launch(int code, const char* op) { STD_TORCH_CHECK(code == 0, op, ": CUDA launch failed with code ", code); }

std::tuple<Tensor, Tensor> gae(const Tensor reward, const Tensor value, const Tensor terminated,
                               const Tensor truncated, double gamma, double lam, int64_t /* isa */) {
  STD_TORCH_CHECK(reward.dim() == 2, "gae: reward must be [T,B]");
  const auto dtype = reward.scalar_type();
  const int64_t steps = reward.size(0), batch = reward.size(1);
  STD_TORCH_CHECK((dtype == ScalarType::Float || dtype == ScalarType::Double) && value.scalar_type() == dtype,
                  "gae: reward and value must both be f32 or f64");
  for (Pointer t : {Pointer(&reward), Pointer(&value), Pointer(&terminated), Pointer(&truncated)})
    STD_TORCH_CHECK(t->is_cuda() && t->is_contiguous() && t->get_device_index() == reward.get_device_index(),
                    "gae: tensors must be contiguous and on one CUDA device");
  STD_TORCH_CHECK(value.numel() == (steps + 1) * batch && terminated.numel() == steps * batch &&
                      truncated.numel() == steps * batch && terminated.scalar_type() == ScalarType::Bool &&
                      truncated.scalar_type() == ScalarType::Bool,
                  "gae: value must be [T+1,B] and the masks bool [T,B]");
  const torch::stable::accelerator::DeviceGuard guard(reward.get_device_index());
  Tensor advantage = torch::stable::empty_like(reward), target = torch::stable::empty_like(reward);
  const Gae a{reward.const_data_ptr(), value.const_data_ptr(),
              static_cast<const uint8_t*>(terminated.const_data_ptr()),
              static_cast<const uint8_t*>(truncated.const_data_ptr()),
              advantage.mutable_data_ptr(), target.mutable_data_ptr(), gamma, lam, steps, batch,
              dtype == ScalarType::Double};
  check_launch(launch_gae(a, current_stream(reward)), "gae");
  return {advantage, target};
}

void append(Tensor cache_k, Tensor cache_v, const Tensor k, const Tensor v, const Tensor table, const Tensor cached) {
  STD_TORCH_CHECK(k.dim() == 4 && v.dim() == 4 && cache_k.dim() == 5 && cache_v.dim() == 5,
                  "frame cache: k, v must be [B,S,H,D], the cache [B,H,slots,S,D]");
  const int64_t expected[5] = {k.size(0), k.size(2), table.size(1), k.size(1), k.size(3)};
  for (int i = 0; i < 5; ++i)
    STD_TORCH_CHECK(cache_k.size(i) == expected[i] && cache_v.size(i) == expected[i],
                    "frame cache: the cache must be [B,H,slots,S,D] like k");
  for (int i = 0; i < 4; ++i) STD_TORCH_CHECK(v.size(i) == k.size(i), "frame cache: v must have the shape of k");
  for (Pointer t : {Pointer(&v), Pointer(&cache_k), Pointer(&cache_v)})
    STD_TORCH_CHECK(t->scalar_type() == k.scalar_type(), "frame cache: k, v and the cache must share a dtype");
  for (Pointer t : {Pointer(&k), Pointer(&v), Pointer(&cache_k), Pointer(&cache_v), Pointer(&table), Pointer(&cached)})
    STD_TORCH_CHECK(t->is_cuda() && t->get_device_index() == k.get_device_index(),
                    "frame cache: tensors must be on one CUDA device");
  STD_TORCH_CHECK(table.scalar_type() == ScalarType::Int && cached.scalar_type() == ScalarType::Int &&
                      table.is_contiguous() && cached.is_contiguous() && table.size(0) == k.size(0) &&
                      cached.size(0) == k.size(0),
                  "frame cache: table and cached must be contiguous int32 [B,slots] and [B]");
  if (k.numel() == 0) return;
  STD_TORCH_CHECK(cache_k.is_contiguous() && cache_v.is_contiguous() && k.stride(3) == 1 && v.stride(3) == 1,
                  "frame cache: the cache and the last axis of k and v must be contiguous");
  const torch::stable::accelerator::DeviceGuard guard(k.get_device_index());
  CacheAppend a{k.const_data_ptr(), v.const_data_ptr(), cache_k.mutable_data_ptr(), cache_v.mutable_data_ptr(),
                static_cast<const int32_t*>(table.const_data_ptr()),
                static_cast<const int32_t*>(cached.const_data_ptr()),
                {k.stride(0), k.stride(1), k.stride(2)}, {v.stride(0), v.stride(1), v.stride(2)},
                k.size(0), k.size(1), k.size(2), k.size(3), table.size(1),
                static_cast<int64_t>(k.element_size())};
  check_launch(launch_cache_append(a, current_stream(k)), "frame cache");
}

}  // namespace
}  // namespace worldenv

STABLE_TORCH_LIBRARY_IMPL(worldenv, CUDA, m) {
  m.impl("gae", TORCH_BOX(&worldenv::gae));
  m.impl("frame_cache_append", TORCH_BOX(&worldenv::append));
}
