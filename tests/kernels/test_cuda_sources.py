"""CUDA sources: compiled by nvcc where there is one, checked on a GPU where there is one."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from worldenv.ops import FrameCache, gae
from worldenv.ops import backend as backends

CUDA = Path(__file__).parents[2] / "csrc" / "cuda"


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc not found: install a CUDA toolkit")
@pytest.mark.parametrize("source", sorted(CUDA.glob("*_kernel.cu")), ids=lambda p: p.stem)
def test_kernels_compile(source, tmp_path):
    """The kernel files need no torch headers: raw pointers and a stream."""
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ("80", "90a")]
    command = ["nvcc", "-std=c++17", "-O3", "-Werror=all-warnings", *targets, "-c", str(source)]
    done = subprocess.run(
        [*command, "-o", str(tmp_path / "kernel.o")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1), (63, 5), (1000, 7), (33, 300)])
def test_gae_scan_matches_the_loop(shape, dtype):
    if (reason := backends.no_cuda(torch.empty(0, device="cuda"), "gae")) is not None:
        pytest.skip(reason)
    reward = torch.randn(shape, dtype=dtype, device="cuda")
    value = torch.randn(shape[0] + 1, shape[1], dtype=dtype, device="cuda")
    over, cut = (torch.rand(shape, device="cuda") < 0.05 for _ in range(2))
    want = gae(reward, value, over, cut, backend="reference")
    got = gae(reward, value, over, cut, backend="cuda")
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, atol=1e-4, rtol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 7])
def test_append_writes_each_rows_own_slot(dim):
    caches = [FrameCache(1, 3, 2, 5, 2, dim, device=d, layout="plain") for d in ("cuda", "cpu")]
    rng = np.random.default_rng(0)
    for _ in range(8):
        k, v = torch.randn(2, 3, 5, 2, dim)
        mask = rng.random(3) < 0.6
        for cache in caches:
            cache.append(0, k.to(cache.device), v.to(cache.device))
            cache.advance(mask)
    for on_gpu, on_cpu in zip(
        (*caches[0].k, *caches[0].v), (*caches[1].k, *caches[1].v), strict=True
    ):
        torch.testing.assert_close(on_gpu.cpu(), on_cpu)
