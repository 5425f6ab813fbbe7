r"""Random shapes, strides and malformed arguments against the C++ kernels under sanitizers.

Not collected by pytest. It loads a library of its own, built from the same sources without the
Python module:

    T=$(python -c "import torch, os; print(os.path.dirname(torch.__file__))")
    g++ -std=c++20 -O1 -g -fPIC -shared -fsanitize=address,undefined \
        -fno-sanitize-recover=undefined -DTORCH_TARGET_VERSION=0x020b000000000000 \
        -Icsrc -I$T/include -I$T/include/torch/csrc/api/include csrc/ops.cpp csrc/cpu/*.cpp \
        -o /tmp/worldenv_sanitized.so -L$T/lib -ltorch -ltorch_cpu -lc10
    LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so)" \
        ASAN_OPTIONS=detect_leaks=0 \
        python tests/ops/fuzz_kernels.py /tmp/worldenv_sanitized.so 300
"""

from __future__ import annotations

import random
import sys

import torch


def up16(n: int) -> int:
    return -(-n // 16) * 16


def strided(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor whose outer axes may be permuted or cut from something larger."""
    if random.random() < 0.5:
        return torch.randn(shape).to(dtype)
    larger = [n + random.randint(0, 2) for n in shape[:-1]] + [shape[-1] + random.randint(0, 3)]
    return torch.randn(larger).to(dtype)[tuple(slice(0, n) for n in shape)]


def frame_attention(ops, best: int) -> None:
    dtype = random.choice([torch.float32, torch.bfloat16])
    batch, slots = random.randint(0, 3), random.randint(1, 5)
    tokens = random.randint(1, 130)
    dim = random.choice([random.randint(1, 140), 32 * random.randint(1, 4)])  # AMX takes the latter
    kv_heads = random.randint(1, 3)
    heads = kv_heads * random.randint(1, 2)
    k, v = (strided((batch, tokens, kv_heads, dim), dtype) for _ in range(2))
    q = strided((batch, tokens, heads, dim), dtype) * random.choice([1, 30])
    shape = (batch, kv_heads, slots, up16(tokens) * up16(dim))
    cache_k, cache_v = torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)
    permutations = [torch.randperm(slots) for _ in range(batch)]
    table = torch.stack(permutations).int() if batch else torch.zeros(0, slots, dtype=torch.int32)
    cached = torch.randint(slots, (batch,), dtype=torch.int32)
    if random.random() < 0.3 and batch:  # malformed: must raise, never crash
        spoil = random.choice(["length", "slot", "cache", "dtype"])
        if spoil == "length":
            cached[0] = random.choice([-1, slots, 2**31 - 1])
        elif spoil == "slot":
            table[0, 0] = random.choice([-1, slots, -(2**31)])
        elif spoil == "cache":
            cache_k = cache_k[..., :-1]
        else:
            v = v.double()
        try:
            ops.frame_attention(q, k, v, cache_k, cache_v, table, cached)
        except RuntimeError:
            return
        raise AssertionError(f"accepted a bad {spoil}")
    ops.frame_cache_append(cache_k, cache_v, k, v, table, cached)
    isa = random.choice([i for i in range(-1, 6) if (2 if i == 5 else i) <= best])
    out = ops.frame_attention(q, k, v, cache_k, cache_v, table, cached, isa)
    assert out.isfinite().all()


def action_loss(ops, best: int) -> None:
    shape = (random.randint(0, 40), random.randint(1, 9), random.randint(1, 20))
    mu, log_scale, action = (torch.randn(shape) for _ in range(3))
    behaviour, advantage = torch.randn(shape[:2]), torch.randn(shape[0])
    mask = torch.rand(shape[:2]) < 0.7
    other = random.choice([None, torch.randn(shape)])
    scale = None if other is None else random.choice([None, torch.randn(shape)])
    isa = random.randint(-1, min(best, 2))
    rows = (behaviour, advantage, mask)
    constants = (0.2, 0.3, 0.1, 0.01, isa)
    ops.action_loss(mu, log_scale, action, *rows, other, scale, random.randint(0, 1), *constants)
    ops.action_logprob(mu, log_scale, action, random.randint(0, 1), isa)
    vocabulary = random.randint(1, 40)
    logits = torch.randn(*shape, vocabulary)
    tokens = torch.randint(vocabulary, shape)
    ops.token_loss(logits, tokens, *rows, random.choice([None, logits + 1]), *constants)
    ops.token_logprob(logits, tokens, isa)


def pointwise(ops, best: int) -> None:
    dtype = random.choice([torch.float32, torch.bfloat16])
    rows, heads, dim = random.randint(0, 50), random.randint(1, 5), 2 * random.randint(1, 40)
    isa = random.randint(-1, min(best, 2))
    x = torch.randn(rows, heads * dim + random.randint(0, 9)).to(dtype)[:, : heads * dim]
    period = random.choice([n for n in range(1, rows + 2) if rows % n == 0])
    weight, turns = torch.randn(heads * dim), torch.randn(period, dim)
    out = ops.norm_rotary(x, weight, turns, 1e-6, isa)
    ops.norm_rotary_bwd(out, x, weight, turns, 1e-6, isa)
    y = torch.randn(random.choice([0, 1, 15, 16384, 16385, random.randint(0, 70_000)])).to(dtype)
    ops.gelu_bwd(y, ops.gelu(y, isa), isa)
    for bad in (weight[1:], weight.double()):
        try:
            ops.norm_rotary(x, bad, turns, 1e-6, isa)
        except RuntimeError:
            continue
        raise AssertionError("accepted a bad weight")


def gae(ops, best: int) -> None:
    steps, batch = random.randint(0, 40), random.randint(0, 40)
    dtype = random.choice([torch.float32, torch.float64])
    masks = [torch.rand(steps, batch) < 0.1 for _ in range(2)]
    reward = torch.randn(steps, batch, dtype=dtype)
    ops.gae(
        reward,
        torch.randn(steps + 1, batch, dtype=dtype),
        *masks,
        0.9,
        0.9,
        random.randint(-1, min(best, 2)),
    )


def main() -> None:
    torch.ops.load_library(sys.argv[1])
    ops = torch.ops.worldenv
    best = ops.best_isa()
    for seed in range(int(sys.argv[2])):
        random.seed(seed)
        torch.manual_seed(seed)
        for case in (frame_attention, action_loss, gae, pointwise):
            case(ops, best)
    print(f"{sys.argv[2]} rounds clean")


if __name__ == "__main__":
    main()
