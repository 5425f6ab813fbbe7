"""Triton kernels compiled ahead of time for sm_80 and sm_90, in bf16, without a GPU."""

from __future__ import annotations

import importlib
import os

import pytest

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="compiles only outside the interpreter"
)
BF16, F32, I32, BOOL, I64 = "*bf16", "*fp32", "*i32", "*i1", "*i64"
STRIDES = [f"{x}_{axis}" for x in "qkv" for axis in ("batch", "row", "head")]
SIZES = ["heads", "groups", "frames", "tokens", "dim", "window", "sinks"]
TILES = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_D": 64}
ATTENTION = {"CAUSAL": True, "PRECISION": "tf32", **TILES}


def names(kind: str, *arguments: str) -> dict[str, str]:
    return dict.fromkeys(arguments, kind)


def attention(extra: dict[str, str], *scales: str) -> dict[str, str]:
    inputs = names(BF16, "q", "k", "v") | extra
    return inputs | names("i32", *STRIDES, *SIZES) | names("fp32", *scales)


SAVED = names(BF16, "grad") | names(F32, "lse", "delta")
LOSS_POINTERS = (
    "mu log_scale action behaviour advantage reference_mu reference_scale grad_mu grad_scale "
    "partial"
)
TOKEN_POINTERS = "logits behaviour advantage reference grad log_sums partial"
KERNELS = {
    "attention.attention_fwd_kernel": (
        attention(names(BF16, "out") | names(F32, "lse"), "scale"),
        ATTENTION,
    ),
    "attention.attention_bwd_delta_kernel": (
        names(BF16, "out", "grad") | names(F32, "delta") | names("i32", "heads", "n", "dim"),
        {"BLOCK_M": 64, "BLOCK_D": 64},
    ),
    "attention.attention_bwd_query_kernel": (
        attention(SAVED | names(BF16, "grad_q"), "scale", "plain_scale"),
        ATTENTION,
    ),
    "attention.attention_bwd_key_kernel": (
        attention(SAVED | names(BF16, "grad_k", "grad_v"), "scale", "plain_scale"),
        ATTENTION,
    ),
    "frame_attention.frame_attention_fwd_kernel": (
        names(BF16, "q", "k", "v", "cache_k", "cache_v", "out")
        | names(I32, "table", "cached")
        | names("i32", *STRIDES, "heads", "groups", "slots", "tokens", "dim")
        | names("fp32", "scale"),
        {"PRECISION": "tf32", **TILES},
    ),
    "adaln.modulated_norm_fwd_kernel": (
        names(BF16, "x", "shift", "scale", "out")
        | names(F32, "mean", "rstd")
        | names("i32", "share", "width")
        | names("fp32", "eps"),
        {"BLOCK": 1024},
    ),
    "adaln.modulated_norm_bwd_kernel": (
        names(BF16, "x", "scale", "grad", "grad_x")
        | names(F32, "mean", "rstd", "part_shift", "part_scale")
        | names("i32", "share", "width", "chunk", "chunks"),
        {"BLOCK": 1024},
    ),
    "norm_rotary.norm_rotary_fwd_kernel": (
        names(BF16, "x", "out")
        | names(F32, "weight", "rotary")
        | names("i32", "turns", "stride", "width", "dim")
        | names("fp32", "eps"),
        {"BLOCK": 512},
    ),
    "norm_rotary.norm_rotary_bwd_kernel": (
        names(BF16, "grad", "x", "grad_x")
        | names(F32, "weight", "rotary", "part")
        | names("i32", "turns", "rows", "chunk", "stride", "width", "dim")
        | names("fp32", "eps"),
        {"BLOCK": 512},
    ),
    "action_loss.action_loss_fwd_kernel": (
        names(F32, *LOSS_POINTERS.split())
        | names(BOOL, "mask")
        | names(I64, "count")
        | names("i32", "rows", "chunk", "dims")
        | names("fp32", "clip_low", "clip_high", "kl_weight", "entropy_weight"),
        {"GAUSSIAN": False, "HAS_MU": True, "HAS_SCALE": True, "BLOCK": 64, "BLOCK_A": 8},
    ),
    "token_loss.token_loss_fwd_kernel": (
        names(F32, *TOKEN_POINTERS.split())
        | names(BOOL, "mask")
        | names(I64, "action", "count")
        | names("i32", "chunk", "dims", "vocabulary")
        | names("fp32", "clip_low", "clip_high", "kl_weight", "entropy_weight"),
        {"HAS_REFERENCE": True, "BLOCK": 256},
    ),
}


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", KERNELS)
def test_kernel_compiles(name, capability):
    module, kernel = name.split(".")
    function = getattr(importlib.import_module(f"worldenv.kernels.{module}"), kernel)
    arguments, constants = KERNELS[name]
    signature = {n: arguments.get(n, "constexpr") for n in function.arg_names}
    assert {n for n, kind in signature.items() if kind == "constexpr"} == set(constants)
    source = ASTSource(function, signature=signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assert compiled.asm["cubin"]
    assert f"sm_{capability}" in compiled.asm["ptx"]
    if capability == 90 and "attention_fwd" in kernel:
        assert "wgmma" in compiled.asm["ptx"]
