"""Every random draw names what it is for, so a resumed run draws what an uninterrupted one would.

`derive` and `generator` hash keys such as (seed, "sft", step) into a seed: no generator's state is
ever saved. `counter_uniform` and `counter_normal` are stateless functions of (seed, step,
position), evaluated on the seeds' own device for a whole batch at once: an environment sees the
same noise whichever others share its batch.

Liberties: the counter hash is a 32-bit mixer under a 64-bit key (two multiply-xorshift rounds with
the key's halves added in between), not Philox: it has to pass the
statistics in tests/runtime/test_seeds.py. It is not for cryptography. Values agree bit for bit on
one device; across devices `log` and `cos` may differ in the last place.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

Key = int | str

_GOLDEN = 0x9E3779B97F4A7C15
_BLOCK = 1 << 17  # elements per block on a CPU: 512 KB of int32, so that the passes stay in cache


def derive(*keys: Key) -> int:
    """A seed in [0, 2**63) from `keys`, the same in every process and on every machine.

    Use `derive(...) % 2**32` for libraries that take 32-bit seeds. Raises TypeError for keys other
    than int and str.
    """
    digest = hashlib.blake2b(digest_size=8)
    for key in keys:
        if isinstance(key, str):
            data = b"s" + key.encode()
        elif isinstance(key, int | np.integer) and not isinstance(key, bool):
            data = b"i" + str(int(key)).encode()
        else:
            raise TypeError(f"seed keys are int or str, got {type(key).__name__} {key!r}")
        digest.update(len(data).to_bytes(4, "little") + data)
    return int.from_bytes(digest.digest(), "little") >> 1


def generator(*keys: Key, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator seeded by `derive(*keys)`."""
    return torch.Generator(device=device).manual_seed(derive(*keys))


def numpy_generator(*keys: Key) -> np.random.Generator:
    """A NumPy generator seeded by `derive(*keys)`."""
    return np.random.default_rng(derive(*keys))


def counter_uniform(seeds: Tensor, step: int | Tensor, shape: Sequence[int]) -> Tensor:
    """Uniform numbers in [0, 1), a function of (seed, step, position) alone.

    seeds: [B] int64, any values; step: int, or int64 broadcastable to [B]; shape: of one
    environment's draw. Returns [B, *shape] float32 on the seeds' device, multiples of 2**-24.
    """
    high, low = _keys(seeds, step)
    size = math.prod(shape)
    out = torch.empty(len(seeds), size, device=seeds.device)
    for rows, start, stop in _blocks(len(seeds), size, seeds.device):
        bits = _hash(high[rows], low[rows], start, stop)
        out[rows, start:stop] = bits.bitwise_right_shift_(8).bitwise_and_(0xFFFFFF)
    return out.mul_(2.0**-24).view(len(seeds), *shape)


def counter_normal(seeds: Tensor, step: int | Tensor, shape: Sequence[int]) -> Tensor:
    """Standard normal numbers, a function of (seed, step, position) alone; |x| stays under 6.7.

    seeds: [B] int64, any values; step: int, or int64 broadcastable to [B]; shape: of one
    environment's draw. Returns [B, *shape] float32 on the seeds' device. The same (seed, step)
    gives numbers related to `counter_uniform`'s: draw both kinds under different seeds.
    """
    high, low = _keys(seeds, step)
    size = math.prod(shape)
    half = (size + 1) // 2  # Box-Muller makes two normals of two uniforms
    out = torch.empty(len(seeds), 2 * half, device=seeds.device)
    for rows, start, stop in _blocks(len(seeds), half, seeds.device):
        first = _hash(high[rows], low[rows], start, stop)
        angle = _hash(high[rows], low[rows], half + start, half + stop).to(torch.float32)
        angle.mul_(math.pi * 2.0**-31)
        radius = first.bitwise_and_(0x7FFFFFFF).to(torch.float32).add_(0.5).mul_(2.0**-31)
        radius.log_().mul_(-2.0).sqrt_()
        torch.mul(radius, torch.cos(angle), out=out[rows, start:stop])
        torch.mul(radius, angle.sin_(), out=out[rows, half + start : half + stop])
    return out[:, :size].reshape(len(seeds), *shape)


def _keys(seeds: Tensor, step: int | Tensor) -> tuple[Tensor, Tensor]:
    """Two int32 [B, 1] halves of a 64-bit key per environment: splitmix64 over seed and step."""
    if seeds.dtype != torch.int64 or seeds.ndim != 1:
        raise ValueError(f"seeds must be int64 [B], got {seeds.dtype} {list(seeds.shape)}")
    if isinstance(step, Tensor) and step.dtype != torch.int64:
        raise ValueError(f"step must be an int or int64, got {step.dtype}")
    key = _splitmix(_splitmix(seeds) + step).unsqueeze(1)
    return (key >> 32).to(torch.int32), _wrap32(key).to(torch.int32)


def _splitmix(x: Tensor) -> Tensor:
    """splitmix64's output function on int64, whose arithmetic wraps."""
    x = x + _signed(_GOLDEN)
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _signed(0x94D049BB133111EB)
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def _signed(x: int, bits: int = 64) -> int:
    """The two's complement reading of an unsigned constant."""
    return x - (1 << bits) if x >> (bits - 1) else x


def _wrap32(x: Tensor) -> Tensor:
    """The low half of an int64 as a signed 32-bit value, which casts to int32 exactly."""
    return ((x & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000


def _hash(high: Tensor, low: Tensor, start: int, stop: int) -> Tensor:
    """32 random bits for each counter in [start, stop): [B, stop - start] int32.

    The constants are lowbias32's (Chris Wellons, "Prospecting for hash functions"). Adding the
    key's other half between the rounds makes streams with equal first halves differ, so the key
    space is 2**64.
    """
    counter = torch.arange(start, stop, dtype=torch.int32, device=low.device)
    x = counter.mul_(_signed(0x9E3779B9, 32)) + low
    x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF)).mul_(0x7FEB352D).add_(high)
    x.bitwise_xor_((x >> 15).bitwise_and_(0x1FFFF)).mul_(_signed(0x846CA68B, 32))
    return x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))


def _blocks(batch: int, size: int, device: torch.device) -> list[tuple[slice, int, int]]:
    """Rectangles (rows, start, stop) that cover [B, size]: cache-sized on a CPU, one elsewhere."""
    if batch == 0 or size == 0:
        return []
    if device.type != "cpu":
        return [(slice(None), 0, size)]
    width = min(size, _BLOCK)
    height = max(1, _BLOCK // width)
    return [
        (slice(row, row + height), start, min(start + width, size))
        for row in range(0, batch, height)
        for start in range(0, size, width)
    ]
