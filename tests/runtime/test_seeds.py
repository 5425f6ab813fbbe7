"""Seeds are stable, keys never run together, and counter noise is noise: per row, step and lane."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from worldenv.runtime import seeds


def test_derive_is_stable_across_processes():
    code = "from worldenv.runtime.seeds import derive; print(derive(7, 'sft', 12))"
    # Python salts hash() anew in each process: another salt must change nothing.
    command = [sys.executable, "-c", code]
    environment = os.environ | {"PYTHONHASHSEED": "1"}
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert run.stdout.strip() == str(seeds.derive(7, "sft", 12))
    assert seeds.derive(7, "sft", 12) == 4545640964797945518  # pinned: old runs must still resume


def test_derive_keeps_keys_apart():
    keys = [("ab", "c"), ("a", "bc"), ("abc",), (1, 2), (12,), ("1", 2), (1, "2"), (-1,), ()]
    keys += [(0, "sft", step) for step in range(10_000)]
    found = {seeds.derive(*key) for key in keys}
    assert len(found) == len(keys)
    assert all(0 <= seed < 2**63 for seed in found)
    assert seeds.derive(np.int64(3), "x") == seeds.derive(3, "x")


@pytest.mark.parametrize("key", [1.0, True, None, (1,)])
def test_derive_refuses_other_types(key):
    with pytest.raises(TypeError, match="int or str"):
        seeds.derive(key)


def test_generators_repeat():
    first = torch.rand(5, generator=seeds.generator(0, "stage", 3))
    again = torch.rand(5, generator=seeds.generator(0, "stage", 3))
    other = torch.rand(5, generator=seeds.generator(0, "stage", 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert seeds.numpy_generator(1, "a").random() == seeds.numpy_generator(1, "a").random()


@pytest.mark.parametrize("draw", [seeds.counter_normal, seeds.counter_uniform])
@pytest.mark.parametrize("shape", [(1,), (7,), (63, 5), (64, 24), (200_003,)])
def test_counter_noise_ignores_the_batch(draw, shape):
    rows = torch.tensor([5, -3, 2**62, 0, 77])
    steps = torch.tensor([0, 9, 2**40, 9, 1])
    batch = draw(rows, steps, shape)
    assert batch.shape == (5, *shape)
    assert batch.dtype == torch.float32
    order = torch.tensor([3, 1, 4, 0, 2])
    assert torch.equal(draw(rows[order], steps[order], shape), batch[order])
    for i in range(5):
        alone = draw(rows[i : i + 1], int(steps[i]), shape)
        assert torch.equal(alone[0], batch[i])


def _assert_standard_normal(x: torch.Tensor) -> None:
    """Moments within five standard errors."""
    x, n = x.double().flatten(), x.numel()
    assert abs(x.mean()) < 5 / n**0.5
    assert abs((x**2).mean() - 1) < 5 * (2 / n) ** 0.5
    assert abs((x**3).mean()) < 5 * (15 / n) ** 0.5
    assert abs((x**4).mean() - 3) < 5 * (96 / n) ** 0.5
    assert torch.isfinite(x).all()
    assert x.abs().max() < 6.7


def test_counter_normal_is_normal_along_every_axis():
    _assert_standard_normal(seeds.counter_normal(torch.arange(16), 0, (65_536,)))
    across_seeds = seeds.counter_normal(torch.arange(1 << 19), 4, (2,))
    _assert_standard_normal(across_seeds)
    steps = torch.arange(1 << 19)
    across_steps = seeds.counter_normal(torch.zeros_like(steps), steps, (2,))
    _assert_standard_normal(across_steps)
    # Kolmogorov-Smirnov against the normal distribution function
    x = across_seeds.flatten().double().sort().values
    rank = torch.arange(1, len(x) + 1).double() / len(x)
    assert (torch.special.ndtr(x) - rank).abs().max() < 2.0 / len(x) ** 0.5


def test_counter_normal_neighbours_are_uncorrelated():
    x = seeds.counter_normal(torch.arange(64), 0, (16_384,)).double()
    later = seeds.counter_normal(torch.arange(64), 1, (16_384,)).double()
    n = x.numel()
    pairs = {
        "element": x[:, :-1] * x[:, 1:],
        "half": x[:, :8192] * x[:, 8192:],
        "squares of halves": (x[:, :8192] ** 2 - 1) * (x[:, 8192:] ** 2 - 1) / 2,
        "seed": x[:-1] * x[1:],
        "step": x * later,
    }
    for name, product in pairs.items():
        assert abs(product.mean()) < 5 / product.numel() ** 0.5, name
    assert n == 1 << 20


def test_counter_uniform_fills_its_bins():
    for u in (
        seeds.counter_uniform(torch.zeros(1, dtype=torch.int64), 0, (1 << 20,)),
        seeds.counter_uniform(torch.arange(1 << 20), 3, (1,)),
    ):
        assert u.min() >= 0
        assert u.max() < 1
        expected = (1 << 20) / 1024
        chi2 = ((torch.histc(u, 1024, 0, 1) - expected) ** 2 / expected).sum()
        assert abs(chi2 - 1023) < 5 * (2 * 1023) ** 0.5


def test_consecutive_seeds_and_steps_never_collide():
    rows = torch.arange(512).repeat_interleave(512)
    steps = torch.arange(512).repeat(512)
    draws = seeds.counter_uniform(rows, steps, (4,))
    assert len(torch.unique(draws, dim=0)) == 512 * 512


def test_counter_noise_edges():
    assert seeds.counter_normal(torch.arange(3), 0, ()).shape == (3,)
    assert seeds.counter_normal(torch.arange(3), 0, (0, 4)).shape == (3, 0, 4)
    assert seeds.counter_uniform(torch.arange(0), 0, (4,)).shape == (0, 4)
    with pytest.raises(ValueError, match=r"int64 \[B\]"):
        seeds.counter_normal(torch.zeros(3), 0, (2,))
    with pytest.raises(ValueError, match="step"):
        seeds.counter_normal(torch.arange(3), torch.tensor(0.5), (2,))


@pytest.mark.gpu
def test_counter_noise_on_a_gpu_is_the_cpu_noise():
    rows = torch.arange(5)
    for draw in (seeds.counter_normal, seeds.counter_uniform):
        there = draw(rows.cuda(), 3, (4096,)).cpu()
        torch.testing.assert_close(there, draw(rows, 3, (4096,)), atol=2e-6, rtol=2e-6)
