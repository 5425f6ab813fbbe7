"""The cases: each op called as the model calls it, beside its rivals. Rivals that are not installed
are left out."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.attention import attention_case, teacher_forcing_case
from bench.timing import Case, backward_of
from worldenv.ops import (
    FrameCache,
    action_logprob,
    action_loss,
    frame_attention,
    gae,
    gelu,
    modulated_norm,
    norm_rotary,
)
from worldenv.ops.action_loss import action_loss_reference
from worldenv.ops.adaln import modulated_norm_reference
from worldenv.ops.gelu import gelu_reference
from worldenv.ops.norm_rotary import norm_rotary_reference

STEPS = 4  # denoising steps per frame; one more pass writes the cache


def filled_cache(frames: Tensor, layout: str) -> FrameCache:
    """A cache of one layer holding all but the last of `frames` [2, B, F, S, H, D] (keys and
    values)."""
    _, batch, count, tokens, heads, dim = frames.shape
    cache = FrameCache(
        1, batch, count - 1, tokens, heads, dim,
        dtype=frames.dtype, device=frames.device, layout=layout,
    )  # fmt: skip
    for f in range(count - 1):
        cache.append(0, frames[0, :, f], frames[1, :, f])
        cache.advance()
    return cache


def frame_attention_case(
    batch: int, tokens: int, heads: int, dim: int, past: int, dtype: torch.dtype, device: str
) -> Case:
    """One frame of one layer: an attention per denoising step and for the clean pass, then the
    append."""
    frames = torch.randn(2, batch, past + 1, tokens, heads, dim, device=device).to(dtype)
    qkv = torch.randn(batch, tokens, 3, heads, dim, device=device).to(dtype)
    q, k, v = qkv.unbind(2)
    caches = {layout: filled_cache(frames, layout) for layout in ("auto", "plain")}
    joined = [x[:, :past].flatten(1, 2).transpose(1, 2).contiguous() for x in frames]

    def cached(layout: str, backend: str) -> Tensor:
        cache = caches[layout]
        for _ in range(STEPS + 1):
            out = frame_attention(q, k, v, cache, 0, backend=backend)
        cache.append(0, k, v)
        return out

    def concatenated() -> Tensor:
        for _ in range(STEPS + 1):
            keys, values = (
                torch.cat((x, now.transpose(1, 2)), 2)
                for x, now in zip(joined, (k, v), strict=True)
            )
            out = F.scaled_dot_product_attention(q.transpose(1, 2), keys, values)
        return out.transpose(1, 2)

    def truth() -> Tensor:
        return frame_attention(q, k, v, caches["plain"], 0, backend="reference")

    flops = 4.0 * batch * heads * tokens * tokens * (past + 1) * dim * (STEPS + 1)
    return Case(
        "frame_attention",
        f"B{batch} S{tokens} H{heads} D{dim} past {past}",
        str(dtype)[6:],
        torch.no_grad()(lambda: cached("auto", "auto")),
        {
            "sdpa, preallocated cache": torch.no_grad()(lambda: cached("plain", "sdpa")),
            "sdpa, torch.cat": torch.no_grad()(concatenated),
        },
        torch.no_grad()(truth),
        2e-5 if dtype == torch.float32 else 2e-2,
        flops,
    )


def action_loss_case(batch: int, compiled: bool, device: str) -> Case:
    """Laplace loss and gradient through autograd at (B, 8, 7)."""
    mu, log_scale, action = (torch.randn(batch, 8, 7, device=device) * 0.5 for _ in range(3))
    noise = 0.1 * torch.randn(batch, 8, device=device)
    # At a clip bound rounding decides whether there is a gradient: no ratio, exp(-noise), is there.
    for bound in (0.8, 1.2):
        noise += 1e-3 * ((-noise).exp() - bound).abs().lt(1e-4)
    behaviour = action_logprob(mu, log_scale, action) + noise
    advantage = torch.randn(batch, device=device)
    mask = torch.rand(batch, 8, device=device) < 0.9
    leaves = [mu.requires_grad_(), log_scale.requires_grad_()]
    rows = (action, behaviour, advantage, mask)

    def eager(mu: Tensor, log_scale: Tensor) -> Tensor:
        """What one writes by hand: the loss alone, no metrics."""
        inverse = torch.exp(-log_scale)
        logprob = (-(action - mu).abs() * inverse - log_scale - 0.6931471805599453).sum(-1)
        ratio = torch.exp(logprob - behaviour)
        gain = advantage.unsqueeze(-1)
        surrogate = torch.minimum(ratio * gain, ratio.clamp(0.8, 1.2) * gain)
        return -(surrogate * mask).sum() / mask.sum()

    rivals = {
        "eager, loss alone": lambda: backward_of(eager, leaves),
        "eager, with metrics": lambda: backward_of(
            lambda *x: action_loss_reference(*x, *rows)[0], leaves
        ),
    }
    if compiled:
        graph = torch.compile(eager)
        rivals["torch.compile, loss alone"] = lambda: backward_of(graph, leaves)
    return Case(
        "action_loss",
        f"({batch}, 8, 7)",
        "float32",
        lambda: backward_of(lambda *x: action_loss(*x, *rows)[0], leaves),
        rivals,
        lambda: backward_of(lambda *x: action_loss_reference(*x, *rows)[0], leaves),
        1e-4,
        traffic=4.0 * 5 * mu.numel(),
    )


def token_loss_case(shape: tuple[int, int, int], vocabulary: int, device: str) -> Case:
    """Categorical loss and gradient over action tokens (B, C, A). With A = 1 a ratio belongs to one
    token, as in language models, and Liger's GRPO loss is the same function."""
    batch, chunk, dims = shape
    logits = torch.randn(*shape, vocabulary, device=device)
    action = torch.randint(vocabulary, shape, device=device)
    behaviour = action_logprob(logits, None, action, distribution="categorical")
    rows = (
        action,
        behaviour,
        torch.randn(batch, device=device),
        torch.ones(batch, chunk, device=device),
    )
    leaves = [logits.requires_grad_()]

    def with_backend(backend: str) -> Tensor:
        return backward_of(
            lambda x: action_loss(x, None, *rows, distribution="categorical", backend=backend)[0],
            leaves,
        )

    rivals = {"eager, with metrics": lambda: with_backend("reference")}
    if dims == 1 and logits.is_cuda and importlib.util.find_spec("liger_kernel") is not None:
        rivals["liger, GRPO loss"] = _liger(logits.squeeze(2), action.squeeze(2), *rows[1:])
    return Case(
        "action_loss categorical",
        f"{(*shape, vocabulary)}",
        "float32",
        lambda: with_backend("auto"),
        rivals,
        lambda: with_backend("reference"),
        1e-4,
        traffic=4.0 * 2 * logits.numel(),
    )


def _liger(
    logits: Tensor, action: Tensor, behaviour: Tensor, advantage: Tensor, mask: Tensor
) -> Callable[[], tuple[Tensor, ...]]:
    """Liger takes the logits of one step more, as a language model has them."""
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    leaf = F.pad(logits.detach(), (0, 0, 0, 1)).requires_grad_()
    options = {"temperature": 1.0, "beta": 0.0, "eps_low": 0.2, "eps_high": 0.2}

    def run() -> tuple[Tensor, ...]:
        out = triton_grpo_loss(
            leaf, behaviour, None, action, advantage, mask,
            **options, inplace=False, loss_type="bnpo", reduce=True,
        )  # fmt: skip
        return (torch.autograd.grad(out[0], leaf)[0][:, :-1],)

    return run


def gae_case(steps: int, batch: int, device: str) -> Case:
    reward = torch.randn(steps, batch, device=device)
    value = torch.randn(steps + 1, batch, device=device)
    over, cut = (torch.rand(steps, batch, device=device) < 0.02 for _ in range(2))
    inputs = (reward, value, over, cut)

    def loop() -> Tensor:
        """As PPO programs have it: every term inside the loop, masks as floats."""
        going, unbroken = (~over).float(), (~(over | cut)).float()
        advantage, trace = torch.empty_like(reward), 0.0
        for t in reversed(range(steps)):
            delta = reward[t] + 0.99 * value[t + 1] * going[t] - value[t]
            advantage[t] = trace = delta + 0.99 * 0.95 * unbroken[t] * trace
        return advantage

    rivals = {
        "torch loop": loop,
        "torch loop, terms outside": lambda: gae(*inputs, backend="reference")[0],
    }
    if importlib.util.find_spec("torchrl") is not None:
        from torchrl.objectives.value.functional import vec_generalized_advantage_estimate

        columns = [x.t().unsqueeze(-1) for x in (value[:-1], value[1:], reward, over | cut, over)]

        def torchrl() -> Tensor:
            return vec_generalized_advantage_estimate(0.99, 0.95, *columns)[0].squeeze(-1).t()

        rivals["torchrl, vectorised"] = torchrl
    return Case(
        "gae",
        f"T{steps} B{batch}",
        "float32",
        lambda: gae(*inputs)[0],
        rivals,
        lambda: gae(*inputs, backend="reference")[0],
        1e-5,
        traffic=4.0 * 4 * reward.numel(),
    )


def modulated_norm_case(rows: tuple[int, ...], width: int, dtype: torch.dtype, device: str) -> Case:
    x = torch.randn(*rows, width, device=device).to(dtype).requires_grad_()
    shift, scale = (
        torch.randn(rows[0], *[1] * (len(rows) - 1), width, device=device).requires_grad_()
        for _ in range(2)
    )
    weight = torch.randn(*rows, width, device=device).to(dtype)
    leaves = [x, shift, scale]

    def through(function: Callable[..., Tensor]) -> Callable[[], Tensor]:
        return lambda: backward_of(lambda *y: (function(*y) * weight).float().sum(), leaves)

    return Case(
        "modulated_norm",
        f"{(*rows, width)}",
        str(dtype)[6:],
        through(modulated_norm),
        {"eager": through(modulated_norm_reference)},
        through(modulated_norm_reference),
        1e-4 if dtype == torch.float32 else 3e-2,
        traffic=5.0 * x.numel() * x.element_size(),
    )


def norm_rotary_case(
    rows: tuple[int, int], heads: int, dim: int, dtype: torch.dtype, device: str, train: bool
) -> Case:
    """Queries or keys of (frames, tokens): forward, or forward and backward."""
    width = heads * dim
    qkv = torch.randn(*rows, 3 * width, device=device).to(dtype)
    x, weight = qkv.chunk(3, -1)[0], torch.randn(width, device=device)
    angle = torch.randn(*rows, dim // 2, device=device)
    rotary = torch.polar(torch.ones_like(angle), angle)
    grad = torch.randn(*rows, heads, dim, device=device).to(dtype)
    leaves = [x.detach().requires_grad_(), weight.requires_grad_()]

    def through(function: Callable[..., Tensor]) -> Callable[[], Tensor]:
        if train:
            return lambda: backward_of(
                lambda *y: (function(*y, rotary) * grad).float().sum(), leaves
            )
        return torch.no_grad()(lambda: function(x, weight, rotary))

    return Case(
        f"norm_rotary {'training' if train else 'inference'}",
        f"{rows} H{heads} D{dim}",
        str(dtype)[6:],
        through(norm_rotary),
        {"eager": through(norm_rotary_reference)},
        through(norm_rotary_reference),
        1e-4 if dtype == torch.float32 else 3e-2,
        traffic=(5.0 if train else 2.0) * x.numel() * x.element_size(),
    )


def gelu_case(shape: tuple[int, ...], dtype: torch.dtype, train: bool) -> Case:
    x = torch.randn(shape).to(dtype).requires_grad_()
    grad = torch.randn(shape).to(dtype)

    def through(function: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
        if train:
            return lambda: torch.autograd.grad(function(x), x, grad)[0]
        return torch.no_grad()(lambda: function(x))

    return Case(
        f"gelu {'training' if train else 'inference'}",
        f"{shape}",
        str(dtype)[6:],
        through(gelu),
        {"torch": through(gelu_reference)},
        lambda: through(gelu_reference)().detach(),
        1e-4 if dtype == torch.float32 else 3e-2,
        traffic=(5.0 if train else 2.0) * x.numel() * x.element_size(),
    )


def cpu_cases(compiled: bool) -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        for past in (8, 16):
            yield frame_attention_case(8, 64, 8, 64, past, dtype, "cpu")
        yield frame_attention_case(8, 64, 8, 32, 8, dtype, "cpu")
    for window in (3, 9):
        yield teacher_forcing_case((4, 8, 64, 4, 64), window, 1, torch.float32, "cpu")
    for batch in (32, 256, 2048, 16384):
        yield action_loss_case(batch, compiled, "cpu")
    yield token_loss_case((64, 8, 7), 256, "cpu")
    yield gae_case(64, 128, "cpu")
    yield gae_case(16, 32, "cpu")
    for train in (False, True):
        for dtype in (torch.float32, torch.bfloat16):
            yield norm_rotary_case((8, 64), 8, 32, dtype, "cpu", train)
            yield gelu_case((8, 64, 1024), dtype, train)


def gpu_cases() -> Iterator[Case]:
    bf16 = torch.bfloat16
    for dim in (64, 128):
        for train in (False, True):
            for tokens in (512, 1024, 4096):
                yield attention_case((4, 1, tokens, 16, dim), None, False, bf16, "cuda", train)
            yield attention_case((4, 16, 256, 16, dim), 4, True, bf16, "cuda", train)
        for halves in (1, 2):
            yield teacher_forcing_case((4, 16, 256, 16, dim), 5, halves, bf16, "cuda")
        yield frame_attention_case(32, 64, 16, dim, 16, bf16, "cuda")
        yield frame_attention_case(8, 256, 24, dim, 8, bf16, "cuda")
    for batch in (256, 16384, 262144):
        yield action_loss_case(batch, True, "cuda")
    yield token_loss_case((4096, 8, 7), 256, "cuda")
    yield token_loss_case((1024, 56, 1), 256, "cuda")
    for width in (1536, 3072):
        yield modulated_norm_case((16, 4096), width, bf16, "cuda")
        yield norm_rotary_case((16, 4096), width // 128, 128, bf16, "cuda", False)
        yield norm_rotary_case((16, 4096), width // 128, 128, bf16, "cuda", True)
    yield gae_case(64, 128, "cuda")
    yield gae_case(256, 4096, "cuda")
