"""Cases of spatiotemporal attention and their rivals."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.timing import Case, Run, backward_of
from worldenv.ops import backend as backends
from worldenv.ops import spatiotemporal_attention
from worldenv.ops.attention import frame_mask, spatiotemporal_attention_reference


def attention_case(
    shape: tuple[int, ...],
    window: int | None,
    causal: bool,
    dtype: torch.dtype,
    device: str,
    train: bool,
) -> Case:
    """The denoiser's attention in training: forward and backward, or forward alone."""
    leaves = [torch.randn(shape, device=device).to(dtype).requires_grad_() for _ in range(3)]
    weight = torch.randn(shape, device=device).to(dtype)
    batch, frames, tokens, heads, dim = shape
    options = {"window": window, "causal": causal}
    allowed = frame_mask(frames, window, 0, causal).to(device)
    share = allowed.float().mean().item()
    mask = None
    if causal:
        mask = allowed.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1)

    def through(attend: Callable[..., Tensor]) -> Run:
        if train:
            return lambda: backward_of(lambda *x: (attend(*x) * weight).sum(), leaves)
        return torch.no_grad()(lambda: attend(*leaves))

    def on_sequences(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """From [B, F, S, H, D] to [B, H, F*S, D] and back."""

        def run(*x: Tensor) -> Tensor:
            out = attend(*(t.flatten(1, 2).transpose(1, 2) for t in x))
            return out.transpose(1, 2).reshape(shape)

        return run

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    rivals = {"sdpa with a mask" if causal else "sdpa": through(on_sequences(sdpa))}
    if torch.cuda.is_available():
        rivals["flex_attention"] = through(on_sequences(_flex(allowed if causal else None, tokens)))
    for library in _libraries(causal, dtype, device):
        forced = functools.partial(spatiotemporal_attention, backend=library, **options)
        rivals[library] = through(forced)
    if not causal:
        for name, kernel in _sdpa_kernels(shape, dtype, device).items():
            rivals[f"sdpa, {name}"] = through(on_sequences(sdpa_kernel(kernel)(sdpa)))
    return Case(
        f"spatiotemporal_attention {'training' if train else 'forward'}",
        f"{shape} window {window} {'causal' if causal else 'full'}",
        str(dtype)[6:],
        through(functools.partial(spatiotemporal_attention, **options)),
        rivals,
        through(functools.partial(spatiotemporal_attention_reference, **options)),
        1e-4 if dtype == torch.float32 else 3e-2,
        (14.0 if train else 4.0) * batch * heads * (frames * tokens) ** 2 * dim * share,
    )


def _libraries(causal: bool, dtype: torch.dtype, device: str) -> Iterator[str]:
    """Attention libraries that are installed and take such tensors."""
    if device == "cuda" and not causal and dtype in (torch.bfloat16, torch.float16):
        if backends.NO_FLASH_ATTN is None:
            yield "flash_attn"
        if backends.NO_XFORMERS is None:
            yield "xformers"


def _sdpa_kernels(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> dict:
    """SDPA's kernels that can run such tensors, each as a rival of its own; on a GPU."""
    if device != "cuda":
        return {}
    batch, frames, tokens, heads, dim = shape
    x = torch.empty(batch, heads, frames * tokens, dim, dtype=dtype, device=device)
    given = torch.backends.cuda.SDPAParams(x, x, x, None, 0.0, False, False)
    usable = {
        "flash": (SDPBackend.FLASH_ATTENTION, torch.backends.cuda.can_use_flash_attention),
        "cudnn": (SDPBackend.CUDNN_ATTENTION, torch.backends.cuda.can_use_cudnn_attention),
        "efficient": (
            SDPBackend.EFFICIENT_ATTENTION,
            torch.backends.cuda.can_use_efficient_attention,
        ),
    }
    return {name: kernel for name, (kernel, can) in usable.items() if can(given)}


def _flex(allowed: Tensor | None, tokens: int) -> Callable[..., Tensor]:
    """FlexAttention under a mask [query frames, key frames]."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask = None
    if allowed is not None:

        def visible(b, h, i, j):
            return allowed[i // tokens, j // tokens]

        lengths = (size * tokens for size in allowed.shape)
        mask = create_block_mask(visible, None, None, *lengths, "cuda")
    return functools.partial(torch.compile(flex_attention, dynamic=False), block_mask=mask)


def teacher_forcing_case(
    shape: tuple[int, ...], window: int, halves: int, dtype: torch.dtype, device: str
) -> Case:
    """Forward and backward of F noisy frames after as many clean ones; halves: 1, queries of the
    noisy frames over a history without a gradient; 2, of the clean frames too, and one with."""
    batch, frames, tokens, heads, dim = shape
    lead = (batch, halves * frames, tokens, heads, dim)
    q, *kv = (torch.randn(x, device=device).to(dtype) for x in (lead, *[shape] * 4))
    weight = torch.randn(lead, device=device).to(dtype)
    leaves, constant = ([q, *kv], []) if halves == 2 else ([q, *kv[:2]], kv[2:])
    for leaf in leaves:
        leaf.requires_grad_()
    allowed = frame_mask(frames, window, 0, True, halves).to(device)
    mask = allowed.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1)

    def through(attend: Callable[..., Tensor]) -> Run:
        return lambda: backward_of(lambda *x: (attend(*x, *constant) * weight).sum(), leaves)

    def joined(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """From q, and k and v in two halves each, to [B, H, F*S, D] and back."""

        def run(q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor) -> Tensor:
            whole = (q, torch.cat((past_k, k), 1), torch.cat((past_v, v), 1))
            out = attend(*(x.flatten(1, 2).transpose(1, 2) for x in whole))
            return out.transpose(1, 2).reshape(lead)

        return run

    def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    def by_the_frame(q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor) -> Tensor:
        out = []
        for f in range(frames):
            past = slice(max(0, f + 2 - window), f + 1)
            pairs = ((past_k, k), (past_v, v))
            seen = (torch.cat((old[:, past].flatten(1, 2), x[:, f]), 1) for old, x in pairs)
            sides = (x.transpose(1, 2) for x in (q[:, f], *seen))
            out.append(F.scaled_dot_product_attention(*sides).transpose(1, 2))
        return torch.stack(out, 1)

    def ours(attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, *past: Tensor):
        return attend(q, k, v, history=past, window=window)

    rivals = {"sdpa, frame by frame": through(by_the_frame)} if halves == 1 else {}
    rivals["sdpa with a mask"] = through(joined(masked))
    if device == "cuda":
        rivals["flex_attention"] = through(joined(_flex(allowed, tokens)))
    work = 4 * tokens**2 * batch * heads * dim * int(allowed.sum())
    return Case(
        "teacher forcing",
        f"{shape} window {window}, queries of {'all' if halves == 2 else 'noisy frames'}",
        str(dtype)[6:],
        through(functools.partial(ours, spatiotemporal_attention)),
        rivals,
        through(functools.partial(ours, spatiotemporal_attention_reference)),
        1e-4 if dtype == torch.float32 else 3e-2,
        3.5 * work,
    )
