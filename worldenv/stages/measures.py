"""How far a learned world can be trusted, as numbers: each with its n and a 95% interval.

Pure functions of real sequences of frames and of their imagined twins (same first frame, same
actions). Means have bootstrap intervals over episodes, rates Wilson's. A figure is a dict {"value",
"low", "high", "n"}; a bound is None where nothing can be said about it (n < 2).

Moving pixels are those that differ from the *first* frame in the real episode: a still picture gets
none of them right, and what was moved and then let go of counts on, as it does not if a frame is
compared with the one before it. What a world makes up where nothing moved shows in all pixels.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from worldenv.data.embodiment import Embodiment
from worldenv.data.windows import FrameSequence
from worldenv.report.statistics import (
    Interval,
    area_under_curve,
    bootstrap_mean,
    difference_of_rates,
    paired_difference,
    pearson,
    spearman,
    wilson,
)

HORIZONS = (1, 2, 4, 8, 12, 16)
LEADS = (1, 2, 3, 4)  # chunks before an event
DRIFT = 32  # chunks without motion
MOVED = 8  # of 255: more than what shadows at rest differ by
LEFT = 0.06  # m that the hand has gone from where it closed: by then an object is held or is not
CARRIED = 3.0  # cm that an object has gone by then, if it is held
JUMP = 5.0  # cm beside its place: no error of a measurement
Figure = dict[str, float | int | None]


def estimate(values: Sequence[float], convert: Callable[[float], float] = float) -> Figure:
    """The mean of one value per episode; convert: to the unit it is told in, monotone."""
    if not values:
        return {"value": None, "low": None, "high": None, "n": 0}
    if len(values) < 2:
        return {"value": round(convert(values[0]), 4), "low": None, "high": None, "n": 1}
    found = bootstrap_mean(values)
    low, high = sorted((convert(found.low), convert(found.high)))
    return _figure(Interval(convert(found.mean), low, high), len(values))


def rate(hits: Sequence[bool]) -> Figure:
    """The share of what is true."""
    if not hits:
        return {"value": None, "low": None, "high": None, "n": 0}
    return _figure(wilson(sum(map(bool, hits)), len(hits)), len(hits))


def by_task(tasks: Sequence[int], hits: Mapping[str, Sequence[bool]]) -> dict[str, dict]:
    """Shares of what is true of each task's episodes, by task and name; nothing of a single task:
    it is the whole."""
    every = sorted(set(tasks))
    return {
        str(task): {
            name: rate([h for t, h in zip(tasks, values, strict=True) if t == task])
            for name, values in hits.items()
        }
        for task in (every if len(every) > 1 else ())
    }


def _figure(found: Interval, n: int) -> Figure:
    said = {"value": found.mean, "low": found.low, "high": found.high}
    return {**{k: round(v, 4) if math.isfinite(v) else None for k, v in said.items()}, "n": n}


# ---------------------------------------------------------------- frames


def pixel_errors(
    real: list[FrameSequence], imagined: list[FrameSequence], views: Sequence[str]
) -> dict[str, dict[str, dict[str, Figure]]]:
    """PSNR in dB by "all" and "moving" pixels ("moving_copy": of the first frame, for comparison),
    by view and by horizon. The mean is of the squared errors, as in any PSNR. "gain": dB over the
    first frame on moving pixels, the mean of each episode's own.
    """
    said: dict[str, dict[str, dict[str, Figure]]]
    said = {"all": {}, "moving": {}, "moving_copy": {}, "gain": {}}
    for v, view in enumerate(views):
        found: dict[str, dict[str, list[float]]] = {kind: {} for kind in said}
        for r, i in zip(real, imagined, strict=True):
            for h in HORIZONS:
                if len(r) <= h:
                    continue
                first, true, shown = (x.float() for x in (r.images[0, v], r.images[h, v],
                                                          i.images[h, v]))  # fmt: skip
                moved = (true - first).abs().amax(-1) > MOVED
                error = ((shown - true) / 255).square().mean(-1)
                still = ((first - true) / 255).square().mean(-1)
                found["all"].setdefault(str(h), []).append(float(error.mean()))
                if moved.any():
                    ours, copied = float(error[moved].mean()), float(still[moved].mean())
                    found["moving"].setdefault(str(h), []).append(ours)
                    found["moving_copy"].setdefault(str(h), []).append(copied)
                    gained = decibels(ours) - decibels(copied)
                    found["gain"].setdefault(str(h), []).append(gained)
        for kind, horizons in found.items():
            unit = float if kind == "gain" else decibels
            said[kind][view] = {h: estimate(e, unit) for h, e in horizons.items()}
    return said


def decibels(error: float) -> float:
    """PSNR of a mean squared error of images in [0, 1]."""
    return -10 * math.log10(max(error, 1e-10))


def hand_errors(
    real: list[FrameSequence], imagined: list[FrameSequence], robot: Embodiment
) -> dict[str, Figure]:
    """Distance of the end effector from where it really was, in cm, by horizon."""
    at = list(robot.entries("position"))
    return {
        str(h): estimate(
            [
                float((i.proprio[h, at] - r.proprio[h, at]).norm()) * 100
                for r, i in zip(real, imagined, strict=True)
                if len(r) > h
            ]
        )
        for h in HORIZONS
        if any(len(r) > h for r in real)
    }


def motionless(real: list[FrameSequence], robot: Embodiment, chunks: int) -> list[FrameSequence]:
    """What should happen from each first frame if nothing is done and the gripper is kept as it
    is: nothing."""
    made = []
    for s in real:
        action = torch.zeros(chunks, *s.actions.shape[1:])
        opened = robot.opening(s.proprio[0].tolist()) > robot.gripper_open
        action[..., list(robot.actions("grip"))] = float(robot.gripper_closes * (1 - 2 * opened))
        same = [x[:1].expand(chunks + 1, *x.shape[1:]) for x in (s.images, s.proprio)]
        won = s.success[:1].expand(chunks + 1)
        steps = torch.arange(chunks + 1) * s.actions.shape[1]
        made.append(replace(s, images=same[0], proprio=same[1], actions=action, success=won,
                            steps=steps))  # fmt: skip
    return made


def drift(still: list[FrameSequence], imagined: list[FrameSequence]) -> dict[str, Figure]:
    """PSNR in dB to the first frame, all views, by chunks without motion."""
    errors = [
        ((i.images[1:].float() - s.images[:1].float()) / 255).square().flatten(1).mean(1)
        for s, i in zip(still, imagined, strict=True)
    ]
    return {
        str(k + 1): estimate([float(e[k]) for e in errors], decibels) for k in range(len(errors[0]))
    }


# ---------------------------------------------------------------- things


@dataclass(frozen=True)
class Places:
    """Where K things are in the F frames of one camera. pixels [F, K, 2] (column, row); scale
    [F, K]: cm a pixel at their distance; seen [F, K] bool, all of them if it is the truth."""

    pixels: Tensor
    scale: Tensor
    seen: Tensor

    def apart(self, true: "Places") -> Tensor:
        """Distance [F, K] in cm from the true places, across the line of sight."""
        return (self.pixels - true.pixels).norm(dim=-1) * true.scale

    def gone(self, begin: int, end: int, thing: int = 0) -> float:
        """cm that a thing has moved between two frames."""
        way = self.pixels[end, thing] - self.pixels[begin, thing]
        return float(way.norm() * self.scale[begin, thing])


def thing_errors(true: list[Places], found: list[Places], thing: int) -> dict:
    """Of one thing by horizon: error_cm where it is seen, and the share of episodes in which it has
    vanished or jumped (is seen more than JUMP cm beside its place)."""
    said: dict[str, dict[str, Figure]] = {"error_cm": {}, "vanished": {}, "jumped": {}}
    for h in HORIZONS:
        pairs = [(t, f) for t, f in zip(true, found, strict=True) if len(t.seen) > h]
        if not pairs:
            continue
        seen = [bool(f.seen[h, thing]) for _, f in pairs]
        apart = [float(f.apart(t)[h, thing]) for t, f in pairs]
        errors = [a for a, s in zip(apart, seen, strict=True) if s]
        said["error_cm"][str(h)] = estimate(errors)
        said["vanished"][str(h)] = rate([not s for s in seen])
        said["jumped"][str(h)] = rate([s and a > JUMP for a, s in zip(apart, seen, strict=True)])
    return said


# ---------------------------------------------------------------- events


@dataclass(frozen=True)
class Moment:
    """An event in the chunk after frame `frame` of a sequence; its outcome shows at frame `end`."""

    sequence: int
    frame: int
    end: int


def grasps(real: list[FrameSequence], robot: Embodiment) -> list[Moment]:
    """The last closing of the gripper of each episode before it succeeded that can be judged: the
    hand has gone LEFT from there by `end`. Nothing after that is shown, for what the policy does
    next tells whether it holds something.
    """
    at, grip = list(robot.entries("position")), robot.actions("grip")[0]
    found = []
    for k, s in enumerate(real):
        closed = (s.actions[..., grip] * robot.gripper_closes > 0).flatten()
        steps = (closed[1:] & ~closed[:-1]).nonzero()[:, 0] + 1
        last = int(s.success.float().argmax()) if bool(s.success.any()) else len(s) - 1
        for frame in reversed((steps // s.actions.shape[1]).tolist()):
            away = (s.proprio[frame + 1 : last + 1, at] - s.proprio[frame, at]).norm(dim=-1)
            if bool((away > LEFT).any()):
                found.append(Moment(k, frame, frame + 1 + int((away > LEFT).float().argmax())))
                break
    return found


def placings(real: list[FrameSequence], scores: list[Tensor]) -> list[Moment]:
    """Where each episode succeeded; in a failure, where it looked most like it: the real frame of
    the highest of scores [F]. Shown up to a chunk later, for imagination may be a little late.
    """
    found = []
    for k, (s, score) in enumerate(zip(real, scores, strict=True)):
        won = bool(s.success.any())
        at = int(s.success.float().argmax()) if won else 1 + int(score[1:].argmax())
        found.append(Moment(k, at - 1, min(at + 1, len(s) - 1)))
    return found


@dataclass(frozen=True)
class Branch:
    """Real frames from one before `begin` to a moment's end."""

    moment: Moment
    begin: int
    frames: FrameSequence


def branches(real: list[FrameSequence], moments: list[Moment], lead: int) -> list[Branch]:
    """Those that begin `lead` chunks before each moment; of one that comes too early there is none,
    for a branch is given two frames."""
    return [
        Branch(m, m.frame - lead, _cut(real[m.sequence], m.frame - lead - 1, m.end))
        for m in moments
        if m.frame - lead >= 1
    ]


def _cut(s: FrameSequence, first: int, last: int) -> FrameSequence:
    rows = slice(first, last + 1)
    parts = {name: getattr(s, name)[rows] for name in ("images", "proprio", "success", "steps")}
    return replace(s, **parts, actions=s.actions[first:last])


def after_first(real: FrameSequence, branch: FrameSequence) -> FrameSequence:
    """A branch as a judge sees it who has watched the episode from its first frame."""
    joined = {
        name: torch.cat([getattr(real, name)[:1], getattr(branch, name)[2:]])
        for name in ("images", "proprio", "success", "steps")
    }
    return replace(branch, **joined, actions=branch.actions[1:])


def agreement(said: Sequence[bool], truth: Sequence[bool]) -> dict[str, Figure]:
    """How often a verdict is right: in all, where the truth is yes, and where it is no. Of the
    whole, `majority` is what saying always the same would reach."""
    pairs = list(zip(said, truth, strict=True))
    yes = sum(t for _, t in pairs)
    return {
        **rate([s == t for s, t in pairs]),
        "of_yes": rate([s == t for s, t in pairs if t]),
        "of_no": rate([s == t for s, t in pairs if not t]),
        "majority": round(max(yes, len(pairs) - yes) / len(pairs), 4) if pairs else None,
    }


def auc(scores: list[float], labels: list[bool]) -> float | None:
    """Area under the ROC curve, None where only one label occurs."""
    if not 0 < sum(labels) < len(labels):
        return None
    return round(area_under_curve(scores, labels), 4)


def held(true: Places, found: Places, branch: Branch) -> tuple[bool, bool]:
    """(whether a branch's last frame shows the thing carried off, whether it was).

    found: in the frames of the branch. A thing that vanished is the wrong answer, whatever the
    right one is.
    """
    begin, end = branch.begin, branch.moment.end
    carried = true.gone(begin, end) > CARRIED
    way = (found.pixels[-1, 0] - true.pixels[begin, 0]).norm() * true.scale[begin, 0]
    return (bool(way > CARRIED) if found.seen[-1, 0] else not carried), carried


# ---------------------------------------------------------------- policies


def gap(imagined: Sequence[bool], real: Sequence[bool]) -> dict:
    """Imagined and real success, and their difference with Newcombe's interval."""
    one, other = (wilson(sum(map(bool, x)), len(x)) for x in (imagined, real))
    difference = _figure(difference_of_rates(one, other), min(len(imagined), len(real)))
    return {"imagined": rate(imagined), "real": rate(real), "difference": difference}


def gained(before: Sequence[bool], after: Sequence[bool]) -> Figure:
    """What one policy succeeds in more often than another, from the same starts."""
    pair = ([float(x) for x in each] for each in (before, after))
    return _figure(paired_difference(*pair, range(len(before))), len(before))


def ranking(gaps: Mapping[str, dict]) -> dict:
    """Does imagination order policies as reality does? gaps: by policy, of `gap`."""
    pairs = [[g[w]["value"] for g in gaps.values()] for w in ("imagined", "real")]
    return {
        "pearson": _figure(pearson(*pairs), len(gaps)),
        "spearman": _figure(spearman(*pairs), len(gaps)),
    }
