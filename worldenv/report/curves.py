"""The curves of a report: post-training, the learned world, the reflector and the losses."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from worldenv.report.charts import Series, line_chart
from worldenv.report.parts import (
    absent,
    decimal,
    figure,
    grid,
    is_number,
    percent,
    signed_percent,
    text,
    tiles,
)

_BEFORE, _AFTER, _OTHER = "before", "accent", "second"
Metrics = dict[str, list[dict[str, Any]]]


def group_metrics(rows: list[dict[str, Any]]) -> Metrics:
    """Rows by stage, "posttrain-0" and "posttrain-1" being rounds of one stage.

    Each row gains `x`, its step counted on through the rounds. Checks in the real benchmark
    ("check-0") are placed on the iterations of post-training.
    """
    named = [re.fullmatch(r"(.*?)[-/. ]?(\d*)", str(row["stage"])).groups() for row in rows]
    lengths: dict[tuple[str, int], int] = {}
    for (stage, round_), row in zip(named, rows, strict=True):
        key = (stage, int(round_ or 0))
        lengths[key] = max(lengths.get(key, 0), int(row["step"]) + 1)
    grouped: Metrics = {}
    for (stage, round_), row in zip(named, rows, strict=True):
        clock = "posttrain" if stage == "check" else stage
        before = sum(n for (s, r), n in lengths.items() if s == clock and r < int(round_ or 0))
        grouped.setdefault(stage, []).append({**row, "x": row["step"] + before})
    return grouped


def _series(rows: list[dict], key: str, name: str | None = None, **style: Any) -> Series:
    """One metric of a stage's rows, in the order of their x."""
    points = sorted((row["x"], row[key]) for row in rows if is_number(row.get(key)))
    label = name or key.replace("_", " ")
    return Series(label, [x for x, _ in points], [y for _, y in points], **style)


def _keys(rows: list[dict], matches: Callable[[str], Any]) -> list[str]:
    """Names of numeric metrics that satisfy `matches`, in the order they first appear."""
    keys = {k: None for row in rows for k, v in row.items() if is_number(v)}
    return [k for k in keys if k not in ("step", "time", "x") and matches(k)]


_RL_CHARTS = (
    ("Reward", r"^(reward|reward_mean|mean_reward)$", False),
    ("KL divergence", r"(^|_)kl(_|$)", False),
    ("Clip fraction", r"^clip_fraction$", True),
    ("Probability ratio", r"^ratio", False),
    ("Change of the mean action", r"(^|_)mu(_|$)", False),
    ("Entropy", r"^entropy$", False),
    ("Groups with signal", r"^live_groups$", False),
    ("Imagined frames per second", r"^frames_per_second$", False),
)
_FROM_ZERO = ("KL divergence", "Clip fraction", "Change of the mean action", "Groups with signal")
_LOSS = re.compile(r"loss|accuracy|^l1$|mse|error")


def posttraining(metrics: Metrics) -> str:
    """Reward, success, KL, ratios and the rest over the iterations of post-training."""
    rows = metrics.get("posttrain", [])
    if not rows:
        return absent("post-training")
    figures = [_success_chart(rows, metrics.get("check", []))]
    for title, pattern, as_share in _RL_CHARTS:
        keys = _keys(rows, re.compile(pattern).search)
        # A constant zero, such as the KL to a reference that is not used, says nothing.
        series = [s for s in (_series(rows, k) for k in keys) if any(s.y)]
        if series:
            zero = title in _FROM_ZERO
            chart = line_chart(title, series, "iteration", percent=as_share, from_zero=zero)
            figures.append(figure(title, chart))
    return grid(figures)


def _success_chart(rows: list[dict], checks: list[dict]) -> str:
    """Imagined success while exploring, and deterministic checks in both worlds."""
    series = [
        _series(rows, "imagined_success", "exploring", colour=_BEFORE),
        _series(rows, "real_success", "exploring in reality", colour=_BEFORE),
        _series(checks, "imagined", "imagined", colour=_AFTER),
        _series(checks, "real", "real", colour=_OTHER),
    ]
    title = "Success, imagined against real"
    return figure(title, line_chart(title, series, "iteration", percent=True, y_range=(0.0, 1.0)))


def losses(metrics: Metrics) -> str:
    """Losses of every trained model."""
    figures = []
    for stage, rows in metrics.items():
        keys = _keys(rows, _LOSS.search)
        groups = [keys] if len(keys) <= 4 else [keys[i : i + 4] for i in range(0, len(keys), 4)]
        for group in groups if keys else []:
            chart = line_chart(f"Losses of {stage}", [_series(rows, key) for key in group])
            figures.append(figure(stage, chart))
    if not figures:
        return absent("training of models")
    return grid(figures)


def world(results: dict[str, Any]) -> str:
    """Error of predicted frames over the horizon, against copying a frame."""
    fidelity = results.get("fidelity") or {}
    if not fidelity:
        return absent("fidelity check of the world")
    numbers = tiles(
        (
            ("Outcome agreement", percent(fidelity.get("outcome_agreement")), "replayed actions"),
            (
                "Closed-loop gap",
                signed_percent(fidelity.get("closed_loop_gap")),
                "imagined minus real success",
            ),
        )
    )
    views = (fidelity.get("psnr") or {}).get("moving") or {}
    moving = [_horizon(views, view, view) for view in views]
    hand = "hand_error_cm" if "hand_error_cm" in fidelity else "eef_error_cm_per_horizon"
    psnr = [
        _horizon(fidelity, "psnr_per_horizon", "world model", _AFTER),
        _horizon(fidelity, "psnr_copy_per_horizon", "copying a frame", _BEFORE, dashed=True),
    ]
    figures = [
        figure(title, line_chart(title, shown, "chunks ahead"))
        for title, lines in (
            ("PSNR of predicted frames, dB", psnr),
            *_distilled(results),
            ("PSNR of moving pixels, dB", moving),
            ("End-effector error, cm", [_horizon(fidelity, hand, "end effector", _AFTER)]),
        )
        if (shown := [line for line in lines if line.x])
    ]
    banded = any(line.band for line in moving)
    said = "<p>Bands: 95% intervals over the episodes.</p>" if banded else ""
    return numbers + grid(figures) + said + _by_task(results)


def _by_task(results: dict[str, Any]) -> str:
    """Several tasks in one world: how often the policy that explored succeeded in both, and how
    many held-out replays ended as they did in reality."""
    made = (_rounds(results, "reflector") or [{}])[-1].get("success_by_task") or {}
    agreed = (results.get("fidelity") or {}).get("outcome_agreement_by_task") or {}
    columns = (
        ("Explored, real", {t: v["real"] for t, v in made.items()}),
        ("Imagined", {t: v["imagined"] for t, v in made.items()}),
        ("Replays that agree", {t: v["agreement"] for t, v in agreed.items()}),
    )
    tasks = sorted({*made, *agreed}, key=int)
    if not tasks:
        return ""
    head = "".join(f"<th>{t}</th>" for t in ("Task", *(title for title, _ in columns)))
    rows = "".join(
        f"<tr><td>{text(t)}</td>{''.join(_share(shares.get(t)) for _, shares in columns)}</tr>"
        for t in tasks
    )
    return f'<div class="scroll"><table><tr>{head}</tr>{rows}</table></div>'


def _share(figure: dict[str, Any] | None) -> str:
    """A cell with a share, its interval and its n."""
    if figure is None or figure["value"] is None:
        return "<td></td>"
    around = f"{figure['low']:.0%}–{figure['high']:.0%}, n = {figure['n']}"
    return f"<td>{figure['value']:.0%} <small>{around}</small></td>"


def _distilled(results: dict[str, Any]) -> list[tuple[str, list[Series]]]:
    """The last round's distillation, if there was one: the teacher, and one that makes few passes a
    frame as it was and as it became."""
    rounds = _rounds(results, "distill")
    if not rounds:
        return []
    reached = rounds[-1]["reached"]
    names = (("teacher", _OTHER), ("before", _BEFORE), (list(reached)[-1], _AFTER))
    lines = [
        _horizon(reached[arm], "psnr_per_horizon", arm.replace("_", " "), colour)
        for arm, colour in names
    ]
    return [("PSNR of few passes a frame, distilled, dB", lines)]


def _horizon(
    values: dict, key: str, name: str, colour: str | None = None, dashed: bool = False
) -> Series:
    """A {"1": number, "4": number, ...} entry as a line over the horizon, or one of measures
    ({value, low, high}) with its band."""
    entries = ((int(k), v) for k, v in (values.get(key) or {}).items())
    every = sorted((k, v if isinstance(v, dict) else {"value": v}) for k, v in entries)
    found = {k: v for k, v in every if is_number(v["value"])}
    band = [(v["low"], v["high"]) for v in found.values() if is_number(v.get("low"))]
    y = [v["value"] for v in found.values()]
    return Series(name, list(found), y, colour, dashed, band if len(band) == len(y) else ())


def _rounds(results: dict[str, Any], stage: str) -> list[dict]:
    """Records of a stage, a round each."""
    stages = (results.get("stages") or {}).items()
    return [v for k, v in stages if k.startswith(f"{stage}-") and isinstance(v, dict)]


def _bounds(record: dict, name: str) -> str:
    """An interval in words, of a record that may be older than it."""
    around = record.get(name) or ()
    return f"95% interval {' to '.join(str(decimal(x)) for x in around)}" if around else ""


def reflector(results: dict[str, Any]) -> str:
    """How well the reflector tells success from failure."""
    reflector = results.get("reflector") or {}
    made = (_rounds(results, "reflector") or [{}])[-1]
    if not reflector:
        return absent("check of the reflector")
    numbers = tiles(
        (
            ("AUC", decimal(reflector.get("auc")), "success against failure, real frames"),
            (
                "False stops",
                percent(reflector.get("false_stop_rate")),
                "real episodes ended too early",
            ),
            ("Missed", percent(reflector.get("missed_success_rate")), "successes never noticed"),
            *(
                (f"Threshold, {where}", decimal(made.get(name)), _bounds(made, f"{name}_interval"))
                for where, name in (("imagined", "threshold"), ("real", "real_threshold"))
            ),
        )
    )
    roc = reflector.get("roc") or {}
    if not roc.get("fpr"):
        return numbers
    title = "True against false positive rate"
    chart = line_chart(
        title,
        [
            Series("reflector", roc["fpr"], roc["tpr"], _AFTER),
            Series("chance", [0, 1], [0, 1], _BEFORE, dashed=True),
        ],
        "false positive rate",
        y_range=(0.0, 1.0),
        x_range=(0.0, 1.0),
        height=260,
    )
    return numbers + grid([figure(title, chart)])
