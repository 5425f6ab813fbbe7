// Arguments of generalised advantage estimation over T steps of B environments.
#pragma once

#include <cstdint>

namespace worldenv {

template <class T>
struct Gae {
  const T *reward, *value;                // [T, B], [T+1, B]
  const uint8_t *terminated, *truncated;  // [T, B]
  T *advantage, *target;                  // [T, B]
  T gamma, lam;
  int64_t steps, batch;
};

// Environments [begin, end).
using GaeKernel = void (*)(const Gae<float>&, int64_t begin, int64_t end);

}  // namespace worldenv
