"""Ring cache of past frames' keys and values, and the attention of one new frame over it.

`FrameCache` preallocates `frames + 1` slots per layer and environment: `frames` that may be
attended to (the first `sinks` frames of the episode and the most recent others) and one spare that
the frame in progress is written to, so a row that is not advanced loses nothing. Lengths and
positions are numpy integers on the host: deciding where to write and what to read never waits for a
device. Kernels read the same numbers from a device copy (`table`, `cached`), refreshed
asynchronously by `advance` and `reset`.

A window of W frames in `spatiotemporal_attention` counts the query's own frame: it corresponds to a
cache of `frames = W - 1 + sinks`.

Layouts: `plain` [L, B, H, slots, S, D] for torch and Triton; `packed` (CPU, C++) keeps keys
transposed and, in bf16, interleaved in pairs, so that the kernel multiplies straight from the
cache; see csrc/cpu/frame_attention.cpp.
Liberty taken: keys come with their rotary embedding already applied, at `positions`.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from worldenv.ops import backend as backends
from worldenv.ops.checks import check_floating, check_same, check_shape, shape_of

if backends.NO_TRITON is None:
    from worldenv.ops import triton_ops

_OP = "frame_attention"


class FrameCache:
    """Keys and values of past frames, per layer and environment.

    Args:
        layers, batch: L and B.
        frames: frames that stay visible, sinks included, >= 1.
        tokens, heads, head_dim: S, H (of keys and values) and D.
        sinks: first frames of an episode that are never evicted, 0 <= sinks <= frames.
        dtype, device: of the stored keys and values.
        layout: "auto" | "plain" | "packed".

    Attributes:
        positions: int64 [B] (numpy), frames advanced since the row's reset; the index of the frame
            in progress.
        lengths: int64 [B] (numpy), frames a row attends to: min(positions, frames).
        k, v: per layer, tensors of the layout above; `table` int32 [B, frames + 1] and `cached`
            int32 [B] on the
            device: the slots of the cached frames in time order, then the slot of the frame in
                progress.
    """

    def __init__(
        self,
        layers: int,
        batch: int,
        frames: int,
        tokens: int,
        heads: int,
        head_dim: int,
        *,
        sinks: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        layout: str = "auto",
    ) -> None:
        sizes = {
            "layers": layers,
            "frames": frames,
            "tokens": tokens,
            "heads": heads,
            "head_dim": head_dim,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"FrameCache: {name} must be >= 1, got {size}")
        if batch < 0 or not 0 <= sinks <= frames:
            raise ValueError(
                f"FrameCache: need batch >= 0 and 0 <= sinks <= frames, got batch={batch}, "
                f"sinks={sinks}, frames={frames}"
            )
        if layout not in ("auto", "plain", "packed"):
            raise ValueError(f"FrameCache: layout must be auto, plain or packed, got {layout!r}")
        why_not = backends.no_cpp(torch.device(device), dtype)
        if layout == "packed" and why_not is not None:
            raise backends.BackendUnavailable(
                f"FrameCache: layout 'packed' cannot be used: {why_not}"
            )
        self.layers, self.batch, self.frames, self.tokens = layers, batch, frames, tokens
        self.heads, self.head_dim, self.sinks = heads, head_dim, sinks
        self.dtype, self.device = dtype, torch.device(device)
        self.layout = "plain" if layout == "plain" or why_not is not None else "packed"
        self.slots = frames + 1
        frame = (tokens, head_dim) if self.layout == "plain" else (_up16(tokens) * _up16(head_dim),)
        shape = (batch, heads, self.slots, *frame)
        self.k = [torch.zeros(shape, dtype=dtype, device=self.device) for _ in range(layers)]
        self.v = [torch.zeros(shape, dtype=dtype, device=self.device) for _ in range(layers)]
        self.positions = np.zeros(batch, dtype=np.int64)
        self.table = torch.zeros(batch, self.slots, dtype=torch.int32, device=self.device)
        self.cached = torch.zeros(batch, dtype=torch.int32, device=self.device)
        self._refresh()

    @property
    def lengths(self) -> np.ndarray:
        """Frames each row attends to, int64 [B] on the host."""
        return np.minimum(self.positions, self.frames)

    @property
    def capturable(self) -> bool:
        """Whether appending and attending read their slots on the device alone, so that a CUDA
        graph of them stays right as the cache advances: the CUDA append and Triton attention."""
        return self._appends_on_gpu and backends.NO_TRITON is None and self.layout == "plain"

    @property
    def _appends_on_gpu(self) -> bool:
        return self.device.type == "cuda" and backends.has_kernel("frame_cache_append", "CUDA")

    def nbytes(self) -> int:
        """Memory held by keys and values, bytes."""
        return sum(t.numel() * t.element_size() for t in (*self.k, *self.v))

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Write the frame in progress of every row: k, v [B, S, H, D]. May be repeated before
        `advance`."""
        self._check_frame("FrameCache.append", layer, k, v)
        if self.batch:
            self._write(layer, k.detach().to(self.dtype), v.detach().to(self.dtype))

    def advance(self, mask: np.ndarray | Tensor | None = None) -> None:
        """Keep the frame in progress: rows where mask [B] (bool, default all) is True move on by
        one frame.

        The other rows keep their state, and their slot is rewritten by the next append. A mask on a
        GPU is read back (a synchronisation): pass numpy or CPU bools where that matters.
        """
        self.positions[self._rows("advance", mask)] += 1
        self._refresh()

    def reset(self, mask: np.ndarray | Tensor | None = None) -> None:
        """Forget the frames of rows where mask [B] (bool, default all) is True, without touching
        the others."""
        self.positions[self._rows("reset", mask)] = 0
        self._refresh()

    def gather(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """Copies in time order: k, v [B, n, S, H, D] and valid bool [B, n], n = lengths.max()."""
        n = int(self.lengths.max()) if self.batch else 0
        rows = torch.arange(self.batch, device=self.device).unsqueeze(1)
        slots = self.table[:, :n].long()
        k, v = (x[layer][rows, :, slots] for x in (self.k, self.v))  # [B, n, H, tile]
        if self.layout == "packed":
            k, v = self._unpack(k, self.head_dim).transpose(3, 4), self._unpack(v, self.tokens)
            k, v = (x[:, :, :, : self.tokens, : self.head_dim] for x in (k, v))
        k, v = k.transpose(2, 3), v.transpose(2, 3)
        valid = torch.arange(n, device=self.device) < self.cached.unsqueeze(1)
        return k, v, valid

    def _unpack(self, tiles: Tensor, inner: int) -> Tensor:
        """Tiles [B, n, H, tile] as matrices of `inner` rows, rounded up; splits bf16 pairs."""
        rows = _up16(inner)
        if tiles.dtype == torch.bfloat16:
            return tiles.unflatten(3, (rows // 2, -1, 2)).transpose(4, 5).flatten(3, 4)
        return tiles.unflatten(3, (rows, -1))

    def _rows(self, name: str, mask: np.ndarray | Tensor | None) -> np.ndarray:
        if mask is None:
            return np.ones(self.batch, dtype=bool)
        rows = mask.cpu().numpy() if isinstance(mask, Tensor) else np.asarray(mask)
        if rows.dtype != bool or rows.shape != (self.batch,):
            raise ValueError(
                f"FrameCache.{name}: mask must be bool of shape ({self.batch},), "
                f"got {rows.dtype} {rows.shape}"
            )
        return rows

    def _refresh(self) -> None:
        """Recompute the slot table on the host and send it to the device without waiting."""
        lengths = self.lengths[:, None]
        j = np.arange(self.slots)[None, :]
        frame = self.positions[:, None] - lengths + j
        ring = self.slots - self.sinks
        slot = np.where(j < self.sinks, j, self.sinks + (frame - self.sinks) % ring)
        self._host_table = np.where(j <= lengths, slot, 0).astype(np.int32)
        host = torch.from_numpy(self._host_table), torch.from_numpy(lengths[:, 0].astype(np.int32))
        if self.device.type != "cuda":
            self.table, self.cached = host
        else:
            # Copied into place: a captured CUDA graph keeps reading the same addresses.
            self.table.copy_(host[0].pin_memory(), non_blocking=True)
            self.cached.copy_(host[1].pin_memory(), non_blocking=True)

    def _pending(self) -> np.ndarray:
        """Slot of the frame in progress, per row."""
        return self._host_table[np.arange(self.batch), self.lengths]

    def _write(self, layer: int, k: Tensor, v: Tensor) -> None:
        if self.layout == "packed" or self._appends_on_gpu:
            k, v = _last_contiguous(k), _last_contiguous(v)
            torch.ops.worldenv.frame_cache_append(
                self.k[layer], self.v[layer], k, v, self.table, self.cached
            )
            return
        pending = self._pending()
        kt, vt = k.transpose(1, 2), v.transpose(1, 2)  # [B, H, S, D]
        if (pending == pending[0]).all():
            self.k[layer][:, :, pending[0]] = kt
            self.v[layer][:, :, pending[0]] = vt
            return
        rows = torch.arange(self.batch, device=self.device)
        slots = self.table.gather(1, self.cached.long().unsqueeze(1)).squeeze(1).long()
        self.k[layer][rows, :, slots] = kt
        self.v[layer][rows, :, slots] = vt

    def _check_frame(self, op: str, layer: int, k: Tensor, v: Tensor) -> None:
        if not 0 <= layer < self.layers:
            raise ValueError(f"{op}: layer must be in 0..{self.layers - 1}, got {layer}")
        check_floating(op, k=k, v=v)
        check_same(op, k=k, v=v)
        for name, x in (("k", k), ("v", v)):
            check_shape(
                op, name, x, (self.batch, self.tokens, self.heads, self.head_dim), "B,S,H,D"
            )
        if k.device.type != self.device.type:
            raise ValueError(f"{op}: k must be on the cache's device {self.device}, got {k.device}")


def frame_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, cache: FrameCache, layer: int
) -> Tensor:
    """Plain torch over gathered frames, softmax in float32 (float64 stays). Shapes as
    `frame_attention`."""
    past_k, past_v, valid = cache.gather(layer)
    wide = torch.promote_types(q.dtype, torch.float32)
    batch, tokens, heads, dim = q.shape
    groups = heads // k.shape[2]
    keys, values = (
        torch.cat((past.flatten(1, 2), now.to(past.dtype)), 1).to(wide).repeat_interleave(groups, 2)
        for past, now in ((past_k, k), (past_v, v))
    )  # [B, (n+1)*S, H, D]
    seen = torch.cat(
        (valid, torch.ones_like(valid[:, :1]) if valid.shape[1] else valid.new_ones(batch, 1)), 1
    )
    seen = seen.repeat_interleave(tokens, 1)[:, None, None, :]
    scores = torch.einsum("bqhd,bkhd->bhqk", q.to(wide), keys) * dim**-0.5
    probability = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    values = values.masked_fill(~seen.view(batch, -1, 1, 1), 0)  # a stale slot may hold NaN
    return torch.einsum("bhqk,bkhd->bqhd", probability, values).to(q.dtype)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, cache: FrameCache, layer: int) -> Tensor:
    """Torch's kernel over a view of the ring: the current frame is written to its spare slot first.

    Slots 0..length are exactly a row's visible ones (before wrap-around a prefix, after it all of
    them), so rows of equal length need no mask, and no frame is ever copied.
    """
    if cache.layout != "plain":
        past_k, past_v, valid = cache.gather(layer)
        keys, values = (
            torch.cat((past.flatten(1, 2), now.to(cache.dtype)), 1).transpose(1, 2)
            for past, now in ((past_k, k), (past_v, v))
        )
        seen = F.pad(valid, (0, 1), value=True).repeat_interleave(cache.tokens, 1)[:, None, None, :]
        return _attend(q, keys, values, seen)
    cache._write(layer, k.to(cache.dtype), v.to(cache.dtype))
    lengths = cache.lengths
    n = int(lengths.max()) + 1
    keys, values = (x[layer][:, :, :n].flatten(2, 3) for x in (cache.k, cache.v))  # [B, H, n*S, D]
    mask = None
    if (lengths != lengths[0]).any():
        seen = torch.arange(n, device=q.device) <= cache.cached.unsqueeze(1)
        mask = seen.repeat_interleave(cache.tokens, 1)[:, None, None, :]
    return _attend(q, keys, values, mask)


def _attend(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2).to(keys.dtype),
        keys,
        values,
        attn_mask=mask,
        enable_gqa=q.shape[2] != keys.shape[1],
    )
    return out.transpose(1, 2).to(q.dtype)


def _cpp(q: Tensor, k: Tensor, v: Tensor, cache: FrameCache, layer: int) -> Tensor:
    q, k, v = (_last_contiguous(x.detach().to(cache.dtype)) for x in (q, k, v))
    return torch.ops.worldenv.frame_attention(
        q, k, v, cache.k[layer], cache.v[layer], cache.table, cache.cached
    )


def frame_attention(
    q: Tensor, k: Tensor, v: Tensor, cache: FrameCache, layer: int, *, backend: str = "auto"
) -> Tensor:
    """Attention of one new frame over the layer's cached frames and its own tokens.

    Args:
        q: [B, S, H, D] float, rotary applied.
        k, v: [B, S, Hk, D] of the same frame, Hk = cache.heads, a divisor of H; not stored (see
            `FrameCache.append`), though the spare slot may be overwritten with them.
        cache: rows may have different lengths; a row with no cached frame attends to its own tokens
            only.
        layer: 0 .. L-1.
        backend: auto | triton (CUDA) | cpp (packed cache) | sdpa (copies a packed cache
            first) | reference.

    Returns:
        [B, S, H, D] in the dtype of q. For inference: gradients do not flow into cached frames.

    Raises:
        ValueError, TypeError: a wrong shape, dtype or device, named.
        BackendUnavailable: a forced backend cannot run.
    """
    check_floating(_OP, q=q)
    cache._check_frame(_OP, layer, k, v)
    check_same(_OP, q=q, k=k)
    if q.dim() != 4 or (q.shape[0], q.shape[1], q.shape[3]) != (k.shape[0], k.shape[1], k.shape[3]):
        raise ValueError(f"{_OP}: q must be [B,S,H,D] beside k {shape_of(k)}, got {shape_of(q)}")
    if q.shape[2] == 0 or q.shape[2] % cache.heads:
        raise ValueError(f"{_OP}: heads of q must be a multiple of {cache.heads}, got {q.shape[2]}")
    if q.numel() == 0:
        return torch.empty_like(q)
    out_dtype = q.dtype
    name = backends.choose(
        _OP,
        backend,
        {
            "triton": backends.no_triton(q) or _not_plain(cache) or backends.no_gradient(q, k, v),
            "cpp": backends.no_cpp(q.device, cache.dtype)
            or _not_packed(cache)
            or backends.no_gradient(q, k, v),
            "sdpa": backends.no_gradient(q, k, v),
            "reference": None,
        },
    )
    if name == "triton":
        q, k, v = (_last_contiguous(x.to(cache.dtype)) for x in (q, k, v))
        state = (cache.k[layer], cache.v[layer], cache.table, cache.cached)
        return triton_ops.frame_attention(q, k, v, *state).to(out_dtype)
    if name == "cpp":
        return _cpp(q, k, v, cache, layer).to(q.dtype)
    if name == "sdpa":
        return _sdpa(q, k, v, cache, layer)
    return frame_attention_reference(q, k, v, cache, layer)


def _up16(n: int) -> int:
    return -(-n // 16) * 16


def _last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _not_packed(cache: FrameCache) -> str | None:
    return (
        None if cache.layout == "packed" else "the cache has layout 'plain' (build it as 'packed')"
    )


def _not_plain(cache: FrameCache) -> str | None:
    if cache.layout != "plain" or cache.dtype == torch.float64:
        return f"it takes a plain cache of up to float32, got {cache.layout} {cache.dtype}"
    return None


if backends.NO_CPP is None:

    @torch.library.register_fake("worldenv::frame_attention")
    def _(q: Tensor, *_: object) -> Tensor:
        return q.new_empty(q.shape)

    @torch.library.register_fake("worldenv::frame_cache_append")
    def _(*_: object) -> None:
        return None
