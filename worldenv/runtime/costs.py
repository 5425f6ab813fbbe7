"""What a piece of work takes, counted while it runs on `meta`: bytes alive at most, and FLOPs.

Nothing is allocated and nothing is computed: every op says what it would make. A tensor counts from
when it is made until nothing holds it, autograd included, so that what the backward pass needs is
in it by its true size. What kernels take for themselves while they run is not.
"""

import gc
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import (
    flop_registry,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)


@dataclass(frozen=True)
class Spent:
    """Bytes beyond those that were there before, and floating point operations."""

    peak: int
    kept: int  # by what the work returned
    flops: int


def measure(work: Callable[[], object]) -> Spent:
    """What `work` takes. Its tensors may be on any device; on `meta` it takes no memory.

    What only Python's collector of cycles would free counts as alive: when that runs, who knows.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        with Counter() as counter:
            result = work()
            kept = counter.alive
    finally:
        if collects:
            gc.enable()
    del result
    return Spent(counter.peak, kept, counter.flops)


class Counter(TorchDispatchMode):
    """Bytes of the tensors made under it: alive now, and most at a time; and FLOPs."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = self.flops = 0
        self._seen: weakref.WeakSet = weakref.WeakSet()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        given = {_place(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and _place(x) not in given:
                self._made(x.untyped_storage())
        op = func._overloadpacket
        formula = _FORMULAS.get(op._qualified_op_name) or flop_registry.get(op)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=out)
        return out

    def _made(self, storage: Any) -> None:
        if storage in self._seen:
            return
        self._seen.add(storage)
        size = storage.nbytes()
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._freed, size)

    def _freed(self, size: int) -> None:
        self.alive -= size


def _place(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Torch's attention as its kernels keep memory: on `meta` it would write all scores down."""
    if enable_gqa:  # what grouped heads cost the kernel of a CPU
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return flash(q, k, v, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


_ON_META = torch.library.Library("aten", "IMPL")
_ON_META.impl("scaled_dot_product_attention", _attention, "AutogradMeta")  # without gradients too


def _flash(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(q.shape, k.shape, v.shape)


def _flash_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad.shape, q.shape, k.shape, v.shape)


def _frames(q: Tensor, k: Tensor, v: Tensor, cache: Tensor, *_: Any, **__: Any) -> int:
    """Of one frame over a full cache `[B, H, slots, ...]`, itself among them."""
    batch, tokens, heads, dim = q.shape
    return 4 * batch * heads * tokens * tokens * cache.shape[2] * dim


_FORMULAS: dict[str, Callable[..., int]] = {
    "aten::_scaled_dot_product_flash_attention_for_cpu": _flash,
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": _flash_backward,
    "worldenv::frame_attention": _frames,
}
"""Of what torch's own table has no formula for."""
