"""Wan under its published names against diffusers, which defines it: whole, in both precisions."""

import pytest
import torch
from diffusers import WanTransformer3DModel

from worldenv.layouts import wan as fixture
from worldenv.models import wan_folder
from worldenv.models.layers import DenoiserBlock, Rotary3D
from worldenv.models.wan import from_tokens, full_attention, to_tokens


def theirs(folder, dtype=torch.float32) -> WanTransformer3DModel:
    return WanTransformer3DModel.from_pretrained(folder, torch_dtype=dtype).eval()


def relative(ours, reference) -> float:
    value = float((ours - reference).abs().max() / reference.abs().max())
    print(f"relative {value:.2e}")
    return value


def clip(frames=5, height=8, width=12):
    g = torch.Generator().manual_seed(2)
    z = torch.randn(2, 4, frames, height, width, generator=g)
    text = torch.zeros(2, 512, 24)
    text[:, :7] = torch.randn(2, 7, 24, generator=g)
    levels = 1000 * torch.rand(2, frames, generator=g)
    levels[:, 0] = 0  # a clean first frame, as TI2V has it
    return z, text, levels


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("wan") / "transformer"
    fixture.write(path)
    return path


@torch.no_grad()
@pytest.mark.parametrize("per_frame", [False, True])
def test_all_of_it_equals_diffusers(folder, per_frame):
    z, text, levels = clip()
    time = levels if per_frame else levels[:, 1]
    tokens = levels.repeat_interleave(z.shape[3] * z.shape[4] // 4, 1) if per_frame else time
    reference = theirs(folder)(z, tokens, text, return_dict=False)[0]
    ours = wan_folder.load(folder, "wan", False, "float32")
    assert relative(ours.video(z, time, text), reference) < 2e-6
    assert relative(ours.video(z, time, text[:, :7]), reference) < 2e-6  # one key for the padding


@torch.no_grad()
def test_an_empty_text_is_one_vector_a_layer(folder):
    z, text, levels = clip()
    nothing = torch.zeros_like(text)
    tokens = levels.repeat_interleave(z.shape[3] * z.shape[4] // 4, 1)
    reference = theirs(folder)(z, tokens, nothing, return_dict=False)[0]
    full = wan_folder.load(folder, "wan", False, "float32")
    constant = wan_folder.load(folder, "wan", True, "float32")
    assert relative(constant.video(z, levels), reference) < 2e-6
    assert relative(full.video(z, levels), reference) < 2e-6
    assert relative(full.video(z, levels, text), reference) > 1e-2  # texts matter
    sizes = [sum(p.numel() for p in m.parameters()) for m in (constant, full)]
    assert sizes[0] < 0.8 * sizes[1]


@torch.no_grad()
def test_half_the_precision_is_as_good_as_diffusers(folder):
    z, text, levels = clip()
    tokens = levels.repeat_interleave(z.shape[3] * z.shape[4] // 4, 1)
    reference = theirs(folder)(z, tokens, text, return_dict=False)[0]
    low = theirs(folder, torch.bfloat16)
    half = low(z.bfloat16(), tokens, text.bfloat16(), return_dict=False)[0].float()
    ours = wan_folder.load(folder, "wan", False, "bfloat16")
    assert ours.dtype == torch.bfloat16
    assert ours.blocks[0].scale_shift_table.dtype == torch.float32
    got = ours.video(z, levels, text)
    assert got.dtype == torch.float32

    def error(x):
        return float((x - reference).norm() / reference.norm())

    print(error(got), error(half))
    assert 0 < error(got) <= 2 * error(half)


@torch.no_grad()
def test_our_block_reads_texts_as_theirs(folder):
    """`DenoiserBlock`, whose weights are named and fused otherwise."""
    wan = wan_folder.load(folder, "wan", False, "float32")
    theirs, ours = wan.blocks[0], DenoiserBlock(128, 4, 160 / 128, text=True)
    own = {n: p for n, p in theirs.named_parameters() if n.startswith(("norm2.", "attn2."))}
    for kind in ("weight", "bias"):
        qkv = (theirs.attn1.to_q, theirs.attn1.to_k, theirs.attn1.to_v)
        own[f"qkv.{kind}"] = torch.cat([getattr(layer, kind) for layer in qkv])
        own[f"out.{kind}"] = getattr(theirs.attn1.to_out[0], kind)
        own[f"up.{kind}"] = getattr(theirs.ffn.net[0].proj, kind)
        own[f"down.{kind}"] = getattr(theirs.ffn.net[2], kind)
        own[f"action.{kind}"] = getattr(ours.action, kind)
    own |= {f"{n}.weight": getattr(theirs.attn1, n).weight for n in ("norm_q", "norm_k")}
    ours.load_state_dict(own | {"table": theirs.scale_shift_table[0]})
    x, time, action = torch.randn(2, 3, 8, 128), torch.randn(2, 3, 6, 128), torch.randn(2, 3, 128)
    rotary = Rotary3D(32, 1, (2, 4), exact=True)(torch.arange(3)[None])
    text = torch.randn(2, 5, 128)
    words = theirs.attn2.words(text, last=4)
    expected = theirs(x, time, None, rotary, full_attention, words)
    assert relative(ours(x, time, action, rotary, full_attention, words), expected) < 2e-6
    several = torch.cat([text, text[:, -1:].expand(-1, 3, -1)], 1)  # what the last stands for
    again = theirs(x, time, None, rotary, full_attention, theirs.attn2.words(several))
    assert relative(again, expected) < 2e-6
    off = ours(x, time, action, rotary, full_attention)
    assert relative(off, expected) > 1e-3


def test_tokens_are_two_by_two_latents():
    z = torch.randn(2, 3, 4, 6, 8)
    tokens = to_tokens(z)
    assert tokens.shape == (2, 4, 12, 12)
    assert torch.equal(tokens[0, 1, 5].view(3, 2, 2), z[0, :, 1, 2:4, 2:4])
    assert torch.equal(from_tokens(tokens, 6, 8), z)
