// Which instruction set the kernels use; the compiler's own cpuid helpers also check what the OS saves.

#include "isa.h"

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace worldenv {
namespace {

// AMX with bf16; Linux saves tiles only for a process that has asked for it.
bool may_use_tiles() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

}  // namespace

int64_t best_isa() {
#if defined(__x86_64__)
  static const int64_t best = [] {
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (avx512 && __builtin_cpu_supports("avx512bf16")) return may_use_tiles() ? kAmx : kAvx512Bf16;
    return avx512 ? kAvx512 : avx2 ? kAvx2 : kPortable;
  }();
  return best;
#else
  return kPortable;
#endif
}

int64_t resolve_isa(int64_t requested) {
  const int64_t best = best_isa();
  if (requested < 0) return best;
  const int64_t needed = requested == kAvx512Bf16Emulated ? int64_t{kAvx512} : requested;
  STD_TORCH_CHECK(requested <= kAvx512Bf16Emulated && needed <= best, "isa ", requested,
                  " cannot run on this CPU, whose best is ", best, " (see worldenv/ops/backend.py)");
  return requested;
}

}  // namespace worldenv

STABLE_TORCH_LIBRARY_IMPL(worldenv, CompositeExplicitAutograd, m) {
  m.impl("best_isa", TORCH_BOX(&worldenv::best_isa));
}
