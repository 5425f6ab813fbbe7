"""Builds `worldenv._C`; everything else is declared in pyproject.toml.

C++ is always compiled. CUDA sources are added when torch itself is a CUDA build and found a
toolkit: torch leaves CUDA_HOME at None under a CPU build, even where nvcc exists. Nothing is
downloaded and no CPU is probed: the CPU kernels choose their instruction set at run time, so no
-march flag may be added here. CUDA is compiled for the GPUs that torch sees, or for the ones that
TORCH_CUDA_ARCH_LIST names; where there are neither, as on a cluster's login node, for sm_80, sm_90
and, as PTX, later ones.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from setuptools import setup

ROOT = Path(__file__).parent


def toolkit() -> str | None:
    """Where nvcc says it lives. Torch goes by the path of the command, which may be a wrapper's."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    command = [nvcc, "--dryrun", "-x", "cu", os.devnull]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stderr
    top = re.search(r"^#\$ TOP=(.+)$", said, re.MULTILINE)
    return str(Path(top[1]).resolve()) if top else None


if not (os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")) and (home := toolkit()):
    os.environ["CUDA_HOME"] = home

from torch.utils.cpp_extension import (  # noqa: E402 (reads CUDA_HOME)
    CUDA_HOME,
    BuildExtension,
    CppExtension,
    CUDAExtension,
)

WITH_CUDA = CUDA_HOME is not None and torch.version.cuda is not None


def sources(*patterns: str) -> list[str]:
    """Paths relative to setup.py, in a stable order."""
    return sorted(str(p.relative_to(ROOT)) for pattern in patterns for p in ROOT.glob(pattern))


cxx = ["-O3", "-g0", "-fvisibility=hidden", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
nvcc = ["-O3", "-lineinfo", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
files = sources("csrc/*.cpp", "csrc/cpu/*.cpp")
if WITH_CUDA:
    if not torch.cuda.is_available():  # torch's own fallback is an empty list, and an IndexError
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
    files += sources("csrc/cuda/*.cu", "csrc/cuda/*.cpp")
    cxx.append("-DWORLDENV_CUDA")
    nvcc.append("-DWORLDENV_CUDA")

extension = (CUDAExtension if WITH_CUDA else CppExtension)(
    name="worldenv._C",
    sources=files,
    include_dirs=[str(ROOT / "csrc")],
    depends=sources("setup.py", "csrc/**/*.h", "csrc/**/*.cuh"),
    extra_compile_args={"cxx": cxx, "nvcc": nvcc} if WITH_CUDA else {"cxx": cxx},
)


class Build(BuildExtension):
    """In one folder also for an editable install, which has another each time: built once."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.build_temp = f"build/temp.{self.plat_name}-{sys.implementation.cache_tag}"


setup(ext_modules=[extension], cmdclass={"build_ext": Build})
