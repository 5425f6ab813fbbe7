// The host-side Python module `worldenv._C`: what the build contains and what this CPU can run.
//
// Importing it also registers the tensor operations, which ops.cpp declares with torch.library; no tensor crosses
// pybind11. CPU features are read at run time so that one wheel serves every x86-64, and arm64 builds report none.

#undef TORCH_TARGET_VERSION  // no tensor here, and with it torch 2.11's copy of pybind11 refuses to be included
#include <pybind11/pybind11.h>

#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#include <cstdint>
#endif

namespace py = pybind11;

namespace {

#if defined(__x86_64__)

struct Registers {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Registers cpuid(unsigned leaf, unsigned subleaf) {
  Registers r;
  if (!__get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx)) return {};
  return r;
}

// XCR0 says which registers the operating system saves; without it AVX instructions fault even on a CPU that has them.
std::uint64_t saved_state() {
  const Registers r = cpuid(1, 0);
  if (!((r.ecx >> 27) & 1)) return 0;  // OSXSAVE
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<std::uint64_t>(high) << 32) | low;
}

#endif

py::dict cpu_features() {
  py::dict out;
#if defined(__x86_64__)
  const auto bit = [](unsigned word, int index) { return static_cast<bool>((word >> index) & 1); };
  const std::uint64_t state = saved_state();
  const bool ymm = (state & 0x6) == 0x6, zmm = (state & 0xe6) == 0xe6, tiles = (state & 0x60000) == 0x60000;
  const Registers base = cpuid(1, 0), seven = cpuid(7, 0), more = cpuid(7, 1);
  out["avx2"] = ymm && bit(seven.ebx, 5);
  out["fma"] = ymm && bit(base.ecx, 12);
  out["f16c"] = ymm && bit(base.ecx, 29);
  out["avx512f"] = zmm && bit(seven.ebx, 16);
  out["avx512bw"] = zmm && bit(seven.ebx, 30);
  out["avx512vl"] = zmm && bit(seven.ebx, 31);
  out["avx512_bf16"] = zmm && bit(more.eax, 5);
  out["amx_bf16"] = tiles && bit(seven.edx, 22);
#endif
  return out;
}

py::dict build_info() {
  py::dict out;
#if defined(__clang__)
  out["compiler"] = std::string("clang ") + __clang_version__;
#elif defined(__GNUC__)
  out["compiler"] = std::string("gcc ") + __VERSION__;
#else
  out["compiler"] = std::string("unknown");
#endif
#if defined(WORLDENV_CUDA)
  out["cuda"] = true;
#else
  out["cuda"] = false;
#endif
  out["cxx_standard"] = static_cast<long>(__cplusplus);
#if defined(__x86_64__)
  out["architecture"] = "x86_64";
#elif defined(__aarch64__)
  out["architecture"] = "aarch64";
#else
  out["architecture"] = "other";
#endif
  return out;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Host-side module of worldenv; importing it registers torch.ops.worldenv.";
  m.def("cpu_features", &cpu_features,
        "Instruction sets that both this CPU and its operating system support, by name; empty off x86-64.");
  m.def("build_info", &build_info, "Compiler, C++ standard, architecture and whether CUDA sources were compiled.");
}
