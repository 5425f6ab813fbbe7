"""Spatiotemporal attention: masks, backends against the float64 reference, gradients by name."""

from __future__ import annotations

import pytest
import torch

from worldenv.ops import BackendUnavailable, spatiotemporal_attention
from worldenv.ops.attention import frame_mask, spatiotemporal_attention_reference

CASES = [
    {"shape": (2, 5, 7, 4, 32), "kv_heads": 2, "window": 2, "sinks": 1, "causal": True},
    {"shape": (1, 1, 1, 1, 64), "kv_heads": 1, "window": None, "sinks": 0, "causal": True},
    {"shape": (1, 4, 63, 3, 32), "kv_heads": 3, "window": 3, "sinks": 0, "causal": True},
    {"shape": (2, 4, 33, 2, 32), "kv_heads": 1, "window": 1, "sinks": 0, "causal": True},
    {"shape": (1, 2, 1000, 1, 32), "kv_heads": 1, "window": None, "sinks": 0, "causal": True},
    {"shape": (2, 3, 10, 2, 128), "kv_heads": 1, "window": None, "sinks": 0, "causal": False},
]


def inputs(shape, kv_heads, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    b, f, s, h, d = shape
    shapes = [(b, f, s, heads, d) for heads in (h, kv_heads, kv_heads)]
    return [torch.randn(x, generator=generator).to(dtype) for x in shapes]


def gradients(function, tensors, weight):
    tensors = [t.detach().clone().requires_grad_() for t in tensors]
    out = function(*tensors)
    (out * weight.to(out.dtype)).sum().backward()
    return {"out": out.detach(), **dict(zip("qkv", (t.grad for t in tensors), strict=True))}


def test_frame_mask_by_hand():
    allowed = frame_mask(5, 2, 1, True).int().tolist()
    assert allowed == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 0, 1, 1, 0],
        [1, 0, 0, 1, 1],
    ]


@pytest.mark.parametrize("case", CASES, ids=lambda c: "x".join(map(str, c["shape"])))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backends_and_gradients_match_float64(case, dtype):
    options = {name: case[name] for name in ("window", "sinks", "causal")}
    tensors = inputs(case["shape"], case["kv_heads"], dtype)
    weight = torch.randn(case["shape"])

    def exact(*x):
        return spatiotemporal_attention_reference(*x, **options)

    want = gradients(exact, [t.double() for t in tensors], weight)
    plain = gradients(exact, tensors, weight)
    got = gradients(lambda *x: spatiotemporal_attention(*x, **options), tensors, weight)
    for name, value in want.items():
        allowed = 2 * (plain[name] - value).abs().max() + 4 * torch.finfo(dtype).eps
        # Torch's own kernel rounds probabilities (bf16) and approximates exp (f32).
        rounding = 4 if dtype == torch.bfloat16 else 32
        allowed = allowed + rounding * torch.finfo(dtype).eps * value.abs().max()
        assert (got[name] - value).abs().max() <= allowed, name


def test_gradcheck():
    tensors = [t.double().requires_grad_() for t in inputs((1, 3, 2, 2, 4), 1)]

    def attend(*x):
        return spatiotemporal_attention(*x, window=2, sinks=1)

    assert torch.autograd.gradcheck(attend, tensors)


def test_later_frames_do_not_reach_earlier_ones():
    q, k, v = inputs((1, 4, 3, 1, 32), 1)
    before = spatiotemporal_attention(q, k, v)
    k[:, 2:], v[:, 2:] = 7.0, 7.0
    after = spatiotemporal_attention(q, k, v)
    torch.testing.assert_close(before[:, :2], after[:, :2], atol=0, rtol=0)


def test_bad_arguments_are_named():
    q, k, v = inputs((1, 2, 3, 4, 32), 2)
    for change, message in [
        ({"window": 0}, "window must be"),
        ({"sinks": -1}, "sinks must be"),
        ({"causal": False, "window": 2}, "need causal"),
        ({"backend": "cpp"}, "backend must be one of"),
    ]:
        with pytest.raises(ValueError, match=message):
            spatiotemporal_attention(q, k, v, **change)
    with pytest.raises(ValueError, match="heads of q"):
        spatiotemporal_attention(q[:, :, :, :3], k, v)
    with pytest.raises(ValueError, match="k and v must be"):
        spatiotemporal_attention(q, k, v[:, :1])
    with pytest.raises(ValueError, match=r"q must be \[B,F,S,H,D\]"):
        spatiotemporal_attention(q[0], k, v)
    with pytest.raises(TypeError, match="k must have the dtype"):
        spatiotemporal_attention(q, k.double(), v)
    with pytest.raises(TypeError, match="floating point"):
        spatiotemporal_attention(q.int(), k, v)
    with pytest.raises(BackendUnavailable, match="cannot run"):
        spatiotemporal_attention(q, k, v, backend="flash_attn")


def test_empty_batch_keeps_the_graph():
    q, k, v = (t[:0].requires_grad_() for t in inputs((1, 2, 3, 4, 32), 2))
    out = spatiotemporal_attention(q, k, v)
    assert out.shape == q.shape
    out.sum().backward()


def test_compiles_in_one_graph():
    q, k, v = inputs((1, 3, 4, 2, 32), 2)

    def attend(q, k, v):
        return spatiotemporal_attention(q, k, v, window=2)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), attend(q, k, v))
