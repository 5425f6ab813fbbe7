"""Advantages: exact zeros, ragged groups, masks, and the scan against the loop."""

from __future__ import annotations

import pytest
import torch

from worldenv.ops import backend as backends
from worldenv.ops import gae, group_normalized, leave_one_out

needs_cpp = pytest.mark.skipif(backends.NO_CPP is not None, reason=str(backends.NO_CPP))


@pytest.mark.parametrize("value", [0.1, 1.0, -3.7e5, 1e-30])
@pytest.mark.parametrize("group", [1, 3, 8])
def test_equal_groups_give_exactly_zero(value, group):
    reward = torch.full((24,), value)
    ids = torch.arange(24) % 5
    assert (leave_one_out(reward, group) == 0).all()
    assert (leave_one_out(reward, ids) == 0).all()
    assert (group_normalized(reward, group) == 0).all()


def test_leave_one_out_by_hand():
    reward = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.0])
    got = leave_one_out(reward, 3)
    torch.testing.assert_close(got, torch.tensor([1.0, -0.5, -0.5, 0.5, 0.5, -1.0]))
    shuffled = torch.tensor([9, 4, 9, 4, 4, 9])
    got = leave_one_out(reward, shuffled)
    torch.testing.assert_close(got, torch.tensor([1.0, -1.0, -0.5, 0.5, 0.5, -0.5]))
    torch.testing.assert_close(leave_one_out(torch.tensor([5.0]), 1), torch.tensor([0.0]))


def test_group_normalized_matches_its_definition():
    reward = torch.rand(4, 6)
    want = (reward - reward.mean(1, True)) / (reward.std(1, correction=0, keepdim=True) + 1e-6)
    torch.testing.assert_close(group_normalized(reward.flatten(), 6), want.flatten())


def episode_masks(steps, batch, generator):
    ends = torch.rand(steps, batch, generator=generator) < 0.1
    cut = torch.rand(steps, batch, generator=generator) < 0.5
    return ends & ~cut, ends & cut


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpp", marks=needs_cpp)])
def test_gae_of_a_lone_episode_by_hand(backend):
    reward = torch.tensor([[0.0], [1.0], [5.0]])
    value = torch.tensor([[0.5], [0.25], [2.0], [float("nan")]])
    over = torch.tensor([[False], [True], [True]])
    none = torch.zeros(3, 1, dtype=torch.bool)
    advantage, target = gae(reward, value, over, none, gamma=0.5, lam=0.5, backend=backend)
    # Step 1 terminates: no bootstrap, no trace from step 2.
    assert advantage[1].item() == 0.75
    assert advantage[0].item() == 0.5 * 0.25 - 0.5 + 0.25 * 0.75
    assert target[2].item() == 5.0
    _, target = gae(reward[:2], value[:3], none[:2], over[:2], gamma=0.5, lam=0.5, backend=backend)
    assert target[1].item() == 1.0 + 0.5 * 2.0  # truncated: bootstraps, trace stops


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1), (63, 5), (7, 1000), (0, 3), (3, 0)])
def test_gae_scan_matches_the_loop(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    reward = torch.randn(shape, generator=generator, dtype=dtype)
    value = torch.randn(shape[0] + 1, shape[1], generator=generator, dtype=dtype)
    masks = episode_masks(*shape, generator)
    want = gae(reward, value, *masks, backend="reference")
    got = gae(reward, value, *masks, backend="cpp")
    strided = gae(reward.t().contiguous().t(), value, *masks, backend="cpp")
    for w, g, s in zip(want, got, strided, strict=True):
        torch.testing.assert_close(g, w)
        torch.testing.assert_close(s, w)


@needs_cpp
@pytest.mark.parametrize("isa", [0, 1, 2], ids=["portable", "avx2", "avx512"])
def test_every_instruction_set_and_nan_after_an_end(isa):
    if isa > torch.ops.worldenv.best_isa():
        pytest.skip("this CPU has no such instructions")
    generator = torch.Generator().manual_seed(0)
    for batch in (1, 67, 130):
        reward = torch.randn(9, batch, generator=generator)
        value = torch.randn(10, batch, generator=generator)
        over, cut = episode_masks(9, batch, generator)
        over[4], value[5] = True, float("nan")  # what was never reached
        reward[5:], over[5:], cut[5:] = float("nan"), False, False
        reached = (reward[:5], torch.cat((value[:5], torch.zeros(1, batch))), over[:5], cut[:5])
        want = gae(*reached, backend="reference")
        got = torch.ops.worldenv.gae(reward, value, over, cut, 0.99, 0.95, isa)
        for w, g in zip(want, got, strict=True):
            torch.testing.assert_close(g[:5], w)


@needs_cpp
def test_gae_opcheck_and_compile():
    reward, value = torch.randn(4, 3), torch.randn(5, 3)
    masks = episode_masks(4, 3, torch.Generator().manual_seed(0))
    torch.library.opcheck(torch.ops.worldenv.gae.default, (reward, value, *masks, 0.9, 0.9))
    compiled = torch.compile(gae, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(reward, value, *masks), gae(reward, value, *masks))


def test_bad_arguments_are_named():
    reward = torch.zeros(6)
    mask = torch.zeros(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="group must be >= 1 and divide"):
        leave_one_out(reward, 4)
    with pytest.raises(ValueError, match="group ids"):
        group_normalized(reward, torch.zeros(5, dtype=torch.long))
    with pytest.raises(ValueError, match=r"value must be \[T\+1,B\]"):
        gae(reward.view(2, 3), torch.zeros(2, 3), mask, mask)
    with pytest.raises(TypeError, match="terminated must be bool"):
        gae(reward.view(2, 3), torch.zeros(3, 3), mask.float(), mask)
    with pytest.raises(ValueError, match="gamma"):
        gae(reward.view(2, 3), torch.zeros(3, 3), mask, mask, gamma=1.5)
