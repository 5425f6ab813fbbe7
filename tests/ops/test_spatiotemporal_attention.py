"""Spatiotemporal attention: masks, backends against the float64 reference, gradients by name."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

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


NAMES = ("q", "k", "v", "history k", "history v")
FORCED = [  # halves: 1, queries of the noisy frames; 2, of the clean ones too
    {"shape": (2, 5, 7, 4, 32), "kv_heads": 2, "window": 2, "sinks": 1, "halves": 2},
    {"shape": (2, 5, 7, 4, 32), "kv_heads": 2, "window": 3, "sinks": 0, "halves": 1},
    {"shape": (1, 4, 1, 1, 64), "kv_heads": 1, "window": None, "sinks": 0, "halves": 2},
    {"shape": (1, 3, 63, 3, 32), "kv_heads": 3, "window": 9, "sinks": 0, "halves": 2},
    {"shape": (2, 1, 5, 2, 32), "kv_heads": 1, "window": 2, "sinks": 0, "halves": 2},
    {"shape": (1, 6, 4, 2, 32), "kv_heads": 1, "window": 1, "sinks": 2, "halves": 2},
    {"shape": (1, 3, 20, 2, 32), "kv_heads": 2, "window": 1, "sinks": 0, "halves": 1},
]


def inputs(shape, kv_heads, dtype=torch.float32, halves=0):
    generator = torch.Generator().manual_seed(1)
    b, f, s, h, d = shape
    shapes = [(b, f, s, heads, d) for heads in (h, *[kv_heads] * (4 if halves else 2))]
    shapes[0] = (b, f * max(halves, 1), s, h, d)
    return [torch.randn(x, generator=generator).to(dtype) for x in shapes]


def teacher_forced(q, k, v, *history, **options):
    return spatiotemporal_attention(q, k, v, history=history or None, **options)


def gradients(function, tensors, weight):
    tensors = [t.detach().clone().requires_grad_() for t in tensors]
    out = function(*tensors)
    (out * weight.to(out.dtype)).sum().backward()
    return {"out": out.detach(), **{n: t.grad for n, t in zip(NAMES, tensors, strict=False)}}


def by_the_frame(q, k, v, past_k, past_v, window):
    """What each noisy frame sees, put together frame by frame."""
    out = []
    for f in range(q.shape[1]):
        past = slice(max(0, f + 2 - window), f + 1)
        keys, values = (
            torch.cat([a[:, past].flatten(1, 2), b[:, f]], 1).transpose(1, 2)
            for a, b in ((past_k, k), (past_v, v))
        )
        out.append(F.scaled_dot_product_attention(q[:, f].transpose(1, 2), keys, values))
    return torch.stack(out, 1).transpose(2, 3)


def test_frame_mask_by_hand():
    allowed = frame_mask(5, 2, 1, True).int().tolist()
    assert allowed == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 0, 1, 1, 0],
        [1, 0, 0, 1, 1],
    ]


def test_teacher_forcing_mask_by_hand():
    """A noisy frame stands where the next clean one would, and never sees that one: the answer."""
    allowed = frame_mask(4, 3, 1, True, halves=2).int().tolist()
    assert allowed == [
        [1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0, 0],
        [1, 0, 0, 0, 1, 0, 0, 0],
        [1, 1, 0, 0, 0, 1, 0, 0],
        [1, 1, 1, 0, 0, 0, 1, 0],
        [1, 0, 1, 1, 0, 0, 0, 1],
    ]
    assert frame_mask(4, 3, 1, True, halves=1).int().tolist() == allowed[4:]


@pytest.mark.parametrize("window", [1, 2, 3, 9])
def test_teacher_forcing_is_what_each_frame_sees(window):
    tensors = inputs((2, 4, 6, 2, 32), 2, halves=1)
    weight = torch.randn(2, 4, 6, 2, 32)
    want = gradients(lambda *x: by_the_frame(*x, window), tensors, weight)
    got = gradients(lambda *x: teacher_forced(*x, window=window), tensors, weight)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, atol=2e-6, rtol=1e-5)


def test_history_without_a_gradient_is_a_constant():
    tensors = inputs((1, 3, 5, 2, 32), 1, halves=1)
    weight = torch.randn(1, 3, 5, 2, 32)
    want = gradients(lambda *x: teacher_forced(*x, window=2), tensors, weight)
    history = tensors[3:]
    got = gradients(lambda *x: teacher_forced(*x, *history, window=2), tensors[:3], weight)
    assert all(torch.equal(want[name], got[name]) for name in ("out", "q", "k", "v"))
    assert all(t.grad is None for t in history)


def test_a_noisy_frame_reaches_itself_alone():
    q, k, v, past_k, past_v = inputs((1, 4, 3, 1, 32), 1, halves=2)
    before = teacher_forced(q, k, v, past_k, past_v)
    k[:, 2], v[:, 2] = float("nan"), float("nan")
    past_k[:, 3], past_v[:, 3] = float("nan"), float("nan")
    after = teacher_forced(q, k, v, past_k, past_v)
    reached = [f for f in range(8) if after[:, f].isnan().any()]
    assert reached == [3, 6, 7]  # clean 3, noisy 2, and noisy 3, which sees clean 3
    kept = [f for f in range(8) if f not in reached]
    torch.testing.assert_close(before[:, kept], after[:, kept], atol=0, rtol=0)


@pytest.mark.parametrize("case", CASES + FORCED, ids=lambda c: "x".join(map(str, c["shape"])))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backends_and_gradients_match_float64(case, dtype):
    options = {name: case[name] for name in ("window", "sinks", "causal") if name in case}
    tensors = inputs(case["shape"], case["kv_heads"], dtype, case.get("halves", 0))
    weight = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(1))

    def exact(q, k, v, *history):
        return spatiotemporal_attention_reference(q, k, v, history=history or None, **options)

    want = gradients(exact, [t.double() for t in tensors], weight)
    plain = gradients(exact, tensors, weight)
    got = gradients(lambda *x: teacher_forced(*x, **options), tensors, weight)
    for name, value in want.items():
        allowed = 2 * (plain[name] - value).abs().max() + 4 * torch.finfo(dtype).eps
        # Torch's own kernel rounds probabilities (bf16) and approximates exp (f32).
        rounding = 4 if dtype == torch.bfloat16 else 32
        allowed = allowed + rounding * torch.finfo(dtype).eps * value.abs().max()
        assert (got[name] - value).abs().max() <= allowed, name


@pytest.mark.parametrize("halves", [0, 1, 2])
def test_gradcheck(halves):
    tensors = [t.double().requires_grad_() for t in inputs((1, 3, 2, 2, 4), 1, halves=halves)]

    def attend(*x):
        return teacher_forced(*x, window=2, sinks=1)

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
        ({"causal": False, "history": (k, v)}, "need causal.*history given"),
        ({"history": (k[:, :1], v)}, r"k of history must be \[B,F,S,Hk,D, like k\]"),
        ({"history": (k, v[0])}, r"v of history must be \[B,F,S,H,D\]"),
        ({"history": (k,)}, "history must be keys and values, got 1 tensors"),
        ({"backend": "cpp"}, "backend must be one of"),
    ]:
        with pytest.raises(ValueError, match=message):
            spatiotemporal_attention(q, k, v, **change)
    with pytest.raises(ValueError, match="heads of q"):
        spatiotemporal_attention(q[:, :, :, :3], k, v)
    with pytest.raises(ValueError, match="k and v must be"):
        spatiotemporal_attention(q, k, v[:, :1])
    with pytest.raises(ValueError, match="half the frames or all"):
        spatiotemporal_attention(q[:, :1], k, v, history=(k, v))
    with pytest.raises(TypeError, match="v of history must have the dtype"):
        spatiotemporal_attention(q, k, v, history=(k, v.double()))
    with pytest.raises(ValueError, match=r"q must be \[B,F,S,H,D\]"):
        spatiotemporal_attention(q[0], k, v)
    with pytest.raises(TypeError, match="k must have the dtype"):
        spatiotemporal_attention(q, k.double(), v)
    with pytest.raises(TypeError, match="floating point"):
        spatiotemporal_attention(q.int(), k, v)
    with pytest.raises(BackendUnavailable, match="cannot run"):
        spatiotemporal_attention(q, k, v, backend="flash_attn")


@pytest.mark.parametrize("halves", [0, 2])
def test_empty_batch_keeps_the_graph(halves):
    tensors = [t[:0].requires_grad_() for t in inputs((1, 2, 3, 4, 32), 2, halves=halves)]
    out = teacher_forced(*tensors)
    assert out.shape == tensors[0].shape
    out.sum().backward()
    assert all(t.grad is not None for t in tensors[1:])


@pytest.mark.parametrize("halves", [0, 1, 2])
def test_compiles_in_one_graph(halves):
    tensors = inputs((1, 3, 4, 2, 32), 2, halves=halves)

    def attend(*x):
        return teacher_forced(*x, window=2)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors), attend(*tensors))
