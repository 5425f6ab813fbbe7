"""Figures of worlds that are right, that stand still and that lose the block: known answers."""

import math
from dataclasses import replace

import pytest
import torch
from worlds import CARRY, PLACED, ROBOT, episode, frozen, where

from worldenv.stages import measures
from worldenv.stages.measures import Moment, Places

HELD = [True, True, False, True]
REAL = [episode(h, number=k) for k, h in enumerate(HELD)]
VIEWS = ROBOT.views


def places(held: bool, shift: float = 0.0, seen: bool = True, frames: int = 12) -> Places:
    """The block's true places at 1 cm a pixel, or `shift` pixels beside them after the first."""
    pixels = torch.tensor([where(f, held) for f in range(frames)]).float()[:, None]
    pixels[1:, :, 1] += shift
    there = torch.ones(frames, 1, dtype=torch.bool)
    there[1:] = seen
    return Places(pixels, torch.ones(frames, 1), there)


def test_a_world_that_is_right():
    psnr = measures.pixel_errors(REAL, REAL, VIEWS)
    for kind in ("all", "moving"):
        assert psnr[kind][VIEWS[0]]["8"] == {"value": 100.0, "low": 100.0, "high": 100.0, "n": 4}
    assert measures.hand_errors(REAL, REAL, ROBOT)["8"]["value"] == 0
    assert "12" not in measures.hand_errors(REAL, REAL, ROBOT)  # no episode is as long
    still = measures.motionless(REAL, ROBOT, 6)
    drift = measures.drift(still, still)
    assert list(drift) == [str(k) for k in range(1, 7)]
    assert drift["6"]["value"] == 100


def test_a_world_that_freezes_is_a_still_picture():
    imagined = [frozen(s) for s in REAL]
    psnr = measures.pixel_errors(REAL, imagined, VIEWS)
    view = VIEWS[1]
    assert psnr["moving"][view] == psnr["moving_copy"][view]
    assert "1" not in psnr["moving"][view]  # nothing has moved by then
    moved = (REAL[2].images[8, 1].float() - REAL[2].images[0, 1]).abs().amax(-1) > 0
    alone = measures.pixel_errors(REAL[2:3], imagined[2:3], VIEWS)
    error = ((REAL[2].images[8, 1].float() - REAL[2].images[0, 1])[moved] / 255).square().mean()
    assert alone["moving"][view]["8"]["value"] == pytest.approx(-10 * math.log10(error), abs=1e-3)
    assert alone["moving"][view]["8"]["low"] is None  # of one episode there is no interval
    share = moved.float().mean()  # in a failure only the hand has moved
    assert alone["all"][view]["8"]["value"] == pytest.approx(
        -10 * math.log10(error * share), abs=1e-3
    )
    assert measures.hand_errors(REAL, imagined, ROBOT)["8"]["value"] == pytest.approx(12.0)


def test_nothing_is_asked_of_the_motionless_robot_but_its_gripper():
    closed = replace(REAL[0], proprio=REAL[0].proprio.clone())
    closed.proprio[:, 6:] = 0
    opened, shut = measures.motionless([REAL[0], closed], ROBOT, 3)
    assert len(opened) == 4
    assert opened.actions.shape == (3, 8, 7)
    assert not opened.actions[..., :6].any()
    assert opened.actions[..., 6].unique().tolist() == [-1]
    assert shut.actions[..., 6].unique().tolist() == [1]


def test_lost_and_misplaced_things_are_told_apart():
    true = [places(h) for h in HELD]
    right = measures.thing_errors(true, true, 0)
    assert right["error_cm"]["4"]["value"] == 0
    assert right["vanished"]["4"]["value"] == right["jumped"]["4"]["value"] == 0
    gone = measures.thing_errors(true, [places(h, seen=False) for h in HELD], 0)
    assert gone["vanished"]["8"]["value"] == 1
    assert gone["jumped"]["8"]["value"] == 0
    assert gone["error_cm"]["8"] == {"value": None, "low": None, "high": None, "n": 0}
    aside = measures.thing_errors(true, [places(h, shift=6.0) for h in HELD], 0)
    assert aside["error_cm"]["8"]["value"] == 6
    assert aside["jumped"]["8"] == {**measures.rate([True] * 4)}
    assert aside["vanished"]["8"]["value"] == 0


def test_grasps_end_as_soon_as_the_hand_has_left():
    found = measures.grasps(REAL, ROBOT)
    assert found == [Moment(k, CARRY, CARRY + 3) for k in range(4)]  # 4 cm a chunk, 8 > 6
    still = replace(REAL[0], proprio=REAL[0].proprio * 0)
    assert measures.grasps([still], ROBOT) == []
    # A later try that the episode's end cuts short is no grasp that can be judged.
    again = replace(REAL[2], actions=REAL[2].actions.clone())
    again.actions[-1, :2, -1] = -1
    assert measures.grasps([again], ROBOT) == [Moment(0, CARRY, CARRY + 3)]


def test_placings_are_where_it_succeeded_or_looked_most_like_it():
    scores = [torch.linspace(0, 1, 12), torch.zeros(12), torch.zeros(12), torch.zeros(12)]
    scores[2][5] = 0.3
    found = measures.placings(REAL, scores)
    assert found[0] == Moment(0, PLACED - 1, PLACED + 1)
    assert found[2] == Moment(2, 4, 6)


@pytest.mark.parametrize("lead", [1, 3])
def test_a_branch_is_given_two_frames_and_ends_with_the_event(lead):
    moments = [Moment(0, CARRY, CARRY + 3), Moment(1, lead, 3)]  # the second has one frame before
    both = measures.branches(REAL, [*moments, Moment(1, lead - 1, 3)], lead)
    assert [b.moment for b in both] == [moments[0]]
    branch = both[0]
    assert branch.begin == CARRY - lead
    assert branch.frames.steps.tolist() == [8 * f for f in range(CARRY - lead - 1, CARRY + 4)]
    assert torch.equal(branch.frames.actions, REAL[0].actions[CARRY - lead - 1 : CARRY + 3])
    watched = measures.after_first(REAL[0], branch.frames)
    assert watched.steps.tolist() == [0, *branch.frames.steps[2:].tolist()]
    assert len(watched.actions) == len(watched) - 1


@pytest.mark.parametrize("held", [True, False])
def test_what_is_held_moves(held):
    true = places(held)
    m = Moment(0, CARRY, CARRY + 4)
    branch = measures.branches([episode(held)], [m], 2)[0]
    cut = slice(branch.begin - 1, m.end + 1)

    def seen(p: Places) -> Places:
        return Places(p.pixels[cut], p.scale[cut], p.seen[cut])

    assert measures.held(true, seen(true), branch) == (held, held)
    assert measures.held(true, seen(places(not held)), branch) == (not held, held)
    assert measures.held(true, seen(places(held, seen=False)), branch) == (not held, held)


def test_agreement_says_where_it_comes_from():
    told = measures.agreement([True, True, False, True], [True, False, False, True])
    assert (told["value"], told["n"]) == (0.75, 4)
    assert (told["of_yes"]["value"], told["of_yes"]["n"]) == (1.0, 2)
    assert (told["of_no"]["value"], told["of_no"]["n"]) == (0.5, 2)
    assert told["majority"] == 0.5
    assert measures.agreement([], [])["value"] is None


def test_policies_in_both_worlds():
    gap = measures.gap([True] * 9 + [False], [True] * 4 + [False] * 6)
    assert gap["difference"]["value"] == 0.5
    assert 0 < gap["difference"]["low"] < 0.5 < gap["difference"]["high"] < 1
    same = measures.gap([True] * 10, [True] * 10)["difference"]
    assert same["value"] == 0
    assert same["low"] < -0.2  # ten episodes do not say more
    gaps = {
        str(k): measures.gap([True] * k + [False] * (10 - k), [True] * r + [False] * (10 - r))
        for k, r in ((1, 0), (4, 3), (6, 4), (7, 8), (9, 10))
    }
    ranked = measures.ranking(gaps)
    assert ranked["spearman"]["value"] == 1.0
    assert ranked["pearson"]["low"] < ranked["pearson"]["value"] < 1
    flat = {k: {**g, "real": {"value": 0.5}} for k, g in gaps.items()}
    assert measures.ranking(flat)["pearson"] == {"value": None, "low": None, "high": None, "n": 5}
