// Run-time choice of instruction set. Each kernel is one template compiled once per set, in a file that switches
// the target with WORLDENV_TARGET before its first include; only those files may hold wider instructions.
#pragma once

#include <cstdint>

namespace worldenv {

enum Isa : int64_t {
  kPortable = 0,
  kAvx2 = 1,
  kAvx512 = 2,
  kAvx512Bf16 = 3,
  kAmx = 4,
  // AVX-512 code of the bf16 dot-product path with the one instruction replaced: lets its packing and rounding be
  // tested on CPUs without it. Never chosen by itself.
  kAvx512Bf16Emulated = 5,
};

// Best set that this CPU and its operating system support.
int64_t best_isa();

// `requested` if the CPU can run it, the best when it is -1; throws otherwise.
int64_t resolve_isa(int64_t requested);

}  // namespace worldenv
