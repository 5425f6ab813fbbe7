// New contiguous CPU tensors by the direct C call: the stable `new_empty` looks its operator up by name each time,
// which costs more than a small kernel.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>

namespace worldenv {

inline torch::stable::Tensor empty_cpu(const int64_t* sizes, int64_t dims, torch::headeronly::ScalarType dtype) {
  int64_t strides[8] = {}, step = 1;
  STD_TORCH_CHECK(dims <= 8, "worldenv: at most 8 axes, got ", dims);
  for (int64_t i = dims - 1; i >= 0; --i) {
    strides[i] = step;
    step *= sizes[i] > 1 ? sizes[i] : 1;
  }
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, sizes, strides, static_cast<int32_t>(dtype),
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  return torch::stable::Tensor(handle);
}

inline torch::stable::Tensor empty_cpu(std::initializer_list<int64_t> sizes, torch::headeronly::ScalarType dtype) {
  return empty_cpu(sizes.begin(), static_cast<int64_t>(sizes.size()), dtype);
}

inline torch::stable::Tensor empty_cpu_like(const torch::stable::Tensor& t) {
  return empty_cpu(t.sizes().data(), t.dim(), t.scalar_type());
}

}  // namespace worldenv
