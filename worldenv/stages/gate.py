"""Is a learned world fit to train in? Decided by what the fidelity stage measured of it.

RL in a poor world ends below imitation (World-Env, table 4), so post-training begins with `check`.
Each of the `MEASURES` is there for a kind of world (results/gate), judged by the bound of its 95%
interval that speaks against the world: that it can be trusted is to be shown, and twenty held-out
episodes show less than two hundred. What cannot be measured, for want of a success or a failure
among them, has not been shown either. `--force` goes on regardless; it changes no fingerprint, so
nothing is measured or made again.

One world of several tasks may be right about some alone: a policy is trained in those (`tasks`).
"""

from collections.abc import Callable
from dataclasses import dataclass

from worldenv.gate import GateConfig
from worldenv.report.statistics import area_interval
from worldenv.runtime.errors import UserError
from worldenv.stages.measures import Figure
from worldenv.stages.run import Run

NEAR, FAR = "1", "8"  # chunks ahead


@dataclass(frozen=True)
class Measure:
    """One thing that is asked of a world."""

    limit: str
    """Field of `GateConfig` that bounds it."""
    what: str
    unit: str
    least: bool
    """Whether the limit is the least that it may be; else the most."""
    figure: Callable[[dict], Figure]
    """From the record of the fidelity stage."""
    mend: str


def _gain(record: dict) -> Figure:
    """Of the worse view."""
    views = [view[NEAR] for view in record["psnr"]["gain"].values() if NEAR in view]
    return min(views, key=lambda f: (f["low"] is not None, f["low"]), default=_area(None, 0, 0))


def _area(auc: float | None, won: int, lost: int) -> Figure:
    if auc is None:
        return {"value": None, "low": None, "high": None, "n": won + lost}
    found = area_interval(auc, won, lost)
    return {"value": auc, "low": round(found.low, 4), "high": round(found.high, 4), "n": won + lost}


def _judge(record: dict) -> Figure:
    won = record["reflector"]["successes"]
    return _area(record["reflector"]["episode_auc"], won, record["episodes"] - won)


MORE = "more explored episodes (collect.episodes)"
MEASURES = (
    Measure(
        "held_out",
        "held-out episodes",
        "",
        True,
        lambda record: dict.fromkeys(("value", "low", "high", "n"), record["episodes"]),
        "raise collect.episodes or collect.held_out",
    ),
    Measure(
        "gain_db",
        "moving pixels over a still picture, 1 chunk ahead",
        "dB",
        True,
        _gain,
        "train the simulator longer (simulator.steps)",
    ),
    Measure(
        "hand_cm",
        "end-effector error, 8 chunks ahead",
        "cm",
        False,
        lambda record: record["hand_error_cm"].get(FAR, _area(None, 0, 0)),
        f"train the simulator longer (simulator.steps), on {MORE}",
    ),
    Measure(
        "judge_auc",
        "outcomes told apart on real frames (AUC)",
        "",
        True,
        _judge,
        f"train the reflector longer (reflector.steps), on {MORE}",
    ),
    Measure(
        "false_stops",
        "explored episodes stopped without success",
        "",
        False,
        lambda record: record["false_stops"],
        f"train the reflector longer (reflector.steps), on {MORE}",
    ),
)


def judged(record: dict, part: GateConfig) -> list[dict]:
    """A row for each measure, for records and reports: its figure, limit, and whether it passes."""
    rows = []
    for measure in MEASURES:
        limit, figure = getattr(part, measure.limit), measure.figure(record)
        bound = figure["low"] if measure.least else figure["high"]
        passed = bound is not None and (bound >= limit if measure.least else bound <= limit)
        said = {"measure": measure.limit, "what": measure.what, "unit": measure.unit}
        rows.append({**said, "least": measure.least, "limit": limit, **figure, "passed": passed})
    return rows


def tasks(run: Run, number: int) -> tuple[int, ...]:
    """Those that a policy is post-trained in: where the one that explored succeeds in imagination
    about as often as it really did (`posttrain.task_gap`). All, where that was not asked: of a
    single task, or by a judge that this run has not calibrated."""
    every = run.config.env.tasks
    if len(every) == 1:
        return every
    rates = run.record(f"reflector-{number}").get("success_by_task") or {}
    gaps = {t: abs(r["imagined"]["value"] - r["real"]["value"]) for t, r in rates.items()}
    return tuple(t for t in every if gaps.get(str(t), 0.0) <= run.config.posttrain.task_gap)


def check(run: Run, number: int) -> dict:
    """What the record of `posttrain-N` says of the gate: how it was passed ("verdict": passed,
    forced or off), the rows of `judged`, of the tasks that are trained in alone, and these where
    they are not all. UserError if the world fails and nothing goes on regardless, or if no task is
    left."""
    part, trained, every = run.config.gate, tasks(run, number), run.config.env.tasks
    if not trained:
        raise UserError(
            f"the world of round {number} is right about none of the tasks: in each the policy "
            f"that explored succeeds in imagination by more than {run.config.posttrain.task_gap:g} "
            f"more or less often than it did (stages/reflector-{number}.json, success_by_task). "
            f"To mend it, {MORE}, or a longer simulator.steps; or raise posttrain.task_gap."
        )
    record, left = run.record(f"fidelity-{number}"), {}
    if len(trained) < len(every):
        record, left = record["trained_in"], {"tasks": list(trained)}
        without = ", ".join(str(t) for t in every if t not in trained)
        print(f"posttrain-{number}: tasks {without} are left out, of which the world is not right")
    rows = judged(record, part)
    failed = [row for row in rows if not row["passed"]]
    if failed and part.on and not run.force:
        raise UserError(refusal(number, failed))
    verdict = "passed" if not failed else "forced" if part.on else "off"
    if failed:
        print(f"posttrain-{number}: goes on ({verdict}) in a world that fails: {_names(failed)}")
    return {"verdict": verdict, "measures": rows, **left}


def _names(rows: list[dict]) -> str:
    return ", ".join(row["measure"] for row in rows)


def refusal(number: int, failed: list[dict]) -> str:
    """Which measures failed, by how much, and what mends it."""
    mends = {measure.limit: measure.mend for measure in MEASURES}
    lines = [
        f"the world of round {number} is not fit to train in (stages/fidelity-{number}.json):",
        *(f"  {_told(row)}. To mend it, {mends[row['measure']]}." for row in failed),
        "Or lower the limits (gate.* in worldenv-train --help), or go on regardless with --force.",
    ]
    return "\n".join(lines)


def _told(row: dict) -> str:
    """A failure in words: expected, got, by how much."""
    unit = row["unit"]
    side, end, far = ("least", "low", "little") if row["least"] else ("most", "high", "much")
    asked = f"{row['what']}: expected at {side} {_number(row['limit'], unit)}"
    if row[end] is None:
        return f"{asked}, got no figure with an interval (n = {row['n']}): nothing is shown"
    short = _number(abs(row["limit"] - row[end]), unit)
    around = f"95% {row['low']:.4g} to {row['high']:.4g}, n = {row['n']}"
    return f"{asked}, got {_number(row['value'], unit)} ({around}): {short} too {far}"


def _number(value: float, unit: str) -> str:
    return f"{value:.4g} {unit}".strip()
