"""Regions about trained policies: the default's seeds, their worlds and times, earlier runs, lost
ones, and the suite of ten tasks."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.results.runs import (
    Trained,
    difference,
    gain,
    groups,
    listed,
    over_seeds,
    points,
    processor,
    prose,
    rate,
    read,
    seeds,
    table,
    trained,
)
from worldenv.report.statistics import Interval, wilson

NOT_YET = "Not yet run."
_WORK = {  # what stages, by the beginning of their names, are called below the table of times
    "real episodes": ("demonstrations", "explore", "evaluate"),
    "imitation": ("sft",),
    "the world's training": ("simulator", "distill"),
    "the judge's training": ("reflector",),
    "post-training": ("posttrain",),
}


# --- real episodes


def spent(run: Trained) -> dict[str, int]:
    """Real episodes by what they were used for."""
    stages = run.results["stages"]
    shown, attempts = (
        sum(s["episodes"] for name, s in stages.items() if name.startswith(kind))
        for kind in ("demonstrations", "explore")
    )
    checks = sum(stage.get("check_episodes", 0) for stage in stages.values())
    practised = sum(stage.get("rl_episodes", 0) for stage in stages.values())
    other = run.results["real_episodes_used"] - shown - attempts - checks - practised
    return {
        "demonstrations": shown,
        "attempts that the world is learned from": attempts,
        "checks of policies on tuning starts": checks,
        "in which the policy itself was post-trained": practised,
        "others": other,
    }


def _spent_in_words(runs: Sequence[Trained]) -> str:
    """One sentence for all runs that used the same."""
    alike: dict[tuple, list[Trained]] = {}
    for run in runs:
        alike.setdefault((*spent(run).items(), ("held out", len(run.pairs))), []).append(run)
    sentences = []
    for (*uses, (_, episodes)), those in alike.items():
        used = [f"{number} {use}" for use, number in uses if number]
        who = "each seed" if len(alike) == 1 else seeds(those)
        total = sum(number for _, number in uses)
        sentences.append(
            f"Real episodes of {who}: {total}, namely {listed(used)}; besides, to measure, "
            f"{episodes} held-out ones of either policy."
        )
    return prose(*sentences)


# --- the default


def default(results: Path) -> str:
    """Every group of runs in results/default: what was spent, successes, differences, the mean."""
    parts = []
    found = groups(trained(results, "default"))
    for name, runs in found.items():
        if len(found) > 1:
            parts.append(f"`results/{name}`:")
        parts += [_spent_in_words(runs), _outcomes(runs), _verdict(runs)]
    return "\n\n".join(parts) or NOT_YET


def _outcomes(runs: Sequence[Trained]) -> str:
    rows = [
        (
            run.seed,
            *(f"{run.successes(policy)} of {len(run.pairs)}" for policy in (0, 1)),
            gain(run.difference),
            f"{run.changed.gained}, {run.changed.lost}",
            ", ".join(run.without_oracle(policy) for policy in (0, 1)),
            f"`{run.commit}`",
        )
        for run in runs
    ]
    head = ("seed", "imitation", "post-trained", "difference (95% interval)", "won, lost")
    return table((*head, "without oracle", "commit"), rows)


def _verdict(runs: Sequence[Trained]) -> str:
    """What the table says, seeds that lost included."""
    lost = [run for run in runs if run.difference.mean < 0]
    above = sum(run.difference.low > 0 for run in runs)
    old = [run for run in runs if not _judged_by_real_threshold(run)]
    mean = over_seeds(runs)
    return prose(
        f"Mean of {len(runs)} seeds: {gain(mean)}, clustered by seed." if mean else "",
        f"The interval lies above zero in {above} of {len(runs)} seeds.",
        f"Fewer successes after post-training: {seeds(lost)}." if lost else "",
        "Without oracle: the reflector ends the episodes of both policies, not the benchmark's word"
        + (f"; in {seeds(old)} still by imagination's threshold." if old else "."),
    )


def _judged_by_real_threshold(run: Trained) -> bool:
    stages = run.results["stages"]
    return any("real_threshold" in s for name, s in stages.items() if name.startswith("reflector"))


def world(results: Path) -> str:
    """The last world of each of the default's seeds, on its held-out episodes."""
    runs = trained(results, "default")
    if not runs:
        return NOT_YET
    head = ("seed", "frames 1 / 4 / 8 chunks ahead, dB", "a still picture, dB", "hand 1 / 8, cm")
    head += ("verdict on replays agrees", "missed, false stops")
    stages = [named for run in runs for named in run.results["stages"].items()]
    sizes = {made["parameters"] for name, made in stages if name.startswith("simulator")}
    rows = [(_named(run, runs), *_world(run.results)) for run in runs]
    gaps = [run.results["fidelity"].get("closed_loop_gap") for run in runs]
    checked = any(gap is not None for gap in gaps)
    if checked:
        head += ("imagined − real success",)
        told = ("not checked" if gap is None else f"{points(gap, 0)} points" for gap in gaps)
        rows = [(*row, gap) for row, gap in zip(rows, told, strict=True)]
    said = prose(
        f"On {listed(sorted({run.results['fidelity']['episodes'] for run in runs}))} held-out",
        "episodes of each seed, by a simulator of",
        f"{listed([f'{size / 1e6:.1f}M' for size in sorted(sizes)])} parameters. Missed: real",
        "successes that the reflector does not see; false stops: of all episodes.",
        "Imagined minus real success: of the kept policy, in its last check." if checked else "",
    )
    return f"{table(head, rows)}\n\n{said}"


def _world(results: dict[str, Any]) -> tuple[str, ...]:
    made, judge = results["fidelity"], results["reflector"]
    decibels = (made[k] for k in ("psnr_per_horizon", "psnr_copy_per_horizon"))
    agreed = round(made["outcome_agreement"] * made["episodes"])
    return (
        *(" / ".join(f"{ahead[h]:.1f}" for h in ("1", "4", "8")) for ahead in decibels),
        " / ".join(f"{made['eef_error_cm_per_horizon'][h]:.2f}" for h in ("1", "8")),
        rate(wilson(agreed, made["episodes"])),
        f"{judge['missed_success_rate']:.0%}, {judge['false_stop_rate']:.0%}",
    )


def _named(run: Trained, runs: Sequence[Trained]) -> str:
    """A seed, and its group where there are several."""
    return f"{run.seed}, `{run.name}`" if len(groups(runs)) > 1 else str(run.seed)


def times(results: Path) -> str:
    """How long the default's runs took, and the share of each kind of work."""
    runs = trained(results, "default")
    if not runs:
        return NOT_YET
    rows = [
        (
            _named(run, runs),
            processor(run.results["machine"]),
            run.results["machine"]["threads"],
            f"{run.results['total_seconds'] / 60:.0f}",
            f"{run.results['frames_per_second']:.0f}",
            f"{run.results['peak_memory_bytes'] / 1e9:.1f} GB",
        )
        for run in runs
    ]
    head = ("seed", "processor", "threads", "minutes", "imagined frames a second", "memory")
    return "\n\n".join((table(head, rows), _shares(runs), *_neighbours(results)))


def _shares(runs: Sequence[Trained]) -> str:
    """A sentence about what the time of all runs went into."""
    took = [(name, made["seconds"]) for run in runs for name, made in run.results["stages"].items()]
    parts = {w: sum(s for name, s in took if name.startswith(k)) for w, k in _WORK.items()}
    total = sum(parts.values())
    largest = sorted(parts, key=lambda what: -parts[what])
    shares = listed([f"{what} {parts[what] / total:.0%}" for what in largest])
    return prose(f"Of all their time: {shares}.")


def _neighbours(results: Path) -> list[str]:
    """What a busy neighbour costs (`bench.steady`), of each machine."""
    said = []
    for path in sorted((results / "bench").glob("steady-*.json")):
        found = read(path)
        ratios = [row["ratio"] for row in found["work"]]
        said.append(
            prose(
                f"Beside a busy neighbour every kind of work takes {min(ratios):.1f} to",
                f"{max(ratios):.1f} times as long ({processor(found['machine'])}).",
            )
        )
    return said


# --- what else was run


def earlier(results: Path) -> str:
    """Every other run of one task, a row for those that differ in their seed alone."""
    rows = [
        (
            f"`{name.removeprefix('earlier/')}`",
            ", ".join(str(task["id"]) for task in runs[0].results["tasks"]),
            listed([run.seed for run in runs]),
            ", ".join(f"{run.successes(0)} → {run.successes(1)}" for run in runs),
            gain(over_seeds(runs) or difference(runs)),
            f"{sum(run.difference.low > 0 for run in runs)} of {len(runs)}",
        )
        for name, runs in groups(trained(results, "earlier")).items()
    ]
    head = ("`results/earlier/`", "task", "seeds", "successes before → after", "difference")
    return table((*head, "intervals above zero"), rows) if rows else NOT_YET


def lost(results: Path) -> str:
    """Every run in `results/` that ends with fewer successes than it began with."""
    rows = [
        (
            f"`{run.name}`",
            run.seed,
            f"{run.successes(0)} → {run.successes(1)} of {len(run.pairs)}",
            gain(run.difference),
            f"{run.changed.gained}, {run.changed.lost}",
        )
        for run in trained(results, ".")
        if run.difference.mean < 0
    ]
    if not rows:
        return "No run in `results/` ended with fewer successes than it began with."
    return table(("`results/`", "seed", "success", "difference", "won, lost"), rows)


def suite(results: Path, folder: str = "libero_spatial") -> str:
    """The tasks of a suite: a row for each, all seeds pooled; then a row for each arm, beside the
    runs of the same seeds as they are."""
    found, parts = trained(results, folder), []
    for name, runs in groups(run for run in found if not run.variant).items():
        tasks = {t["id"]: t["instruction"] for run in runs for t in run.results["tasks"]}
        rows = [
            _suite_row(
                f"{task}. {tasks[task]}", [run.of_task(task) for run in runs if _has(run, task)]
            )
            for task in sorted(tasks)
        ]
        head = ("task", "imitation", "post-trained", "difference (95% interval)", "won, lost")
        rows.append(_suite_row("all", runs))
        if noisy := [run.noisy for run in runs if run.noisy]:
            rows.append(_suite_row("all, acting with the noise of post-training", noisy))
        parts += [f"`results/{name}`, {seeds(runs)}:", _spent_in_words(runs), table(head, rows)]
        parts.append(_suite_verdict(runs, noisy, tasks))
    if arms := [run for run in found if run.variant]:
        of = {run.seed for run in arms}
        whole = [run for run in found if not run.variant and run.seed in of]
        parts.append(_arms([*whole, *arms]))
    return "\n\n".join(parts) or NOT_YET


def _arms(runs: Sequence[Trained]) -> str:
    """The ablation, and post-training in the benchmark itself: `bench.arms`."""
    rows = []
    for run in runs:
        below = [
            str(task["id"])
            for task in run.results["tasks"]
            if run.of_task(task["id"]).difference.high < 0
        ]
        quiet = "-"
        if said := run.results.get("no_oracle"):
            change = Interval(*(said["paired_difference"][k] for k in ("mean", "low", "high")))
            quiet = f"{run.without_oracle(0)} → {run.without_oracle(1)}, {gain(change)}"
        rows.append(
            (
                run.variant or "full",
                run.seed,
                run.verdict,
                f"{run.successes(0)} → {run.successes(1)} of {len(run.pairs)}",
                gain(run.difference),
                quiet,
                listed(below) or "none",
            )
        )
    head = ("arm", "seed", "the gate", "successes", "difference")
    return table((*head, "without the benchmark's word", "tasks below imitation"), rows)


def _has(run: Trained, task: int) -> bool:
    return any(e["task"] == task for e in run.results["evaluation"]["sft"])


def _suite_row(name: str, runs: Sequence[Trained]) -> tuple[str, ...]:
    episodes = sum(len(run.pairs) for run in runs)
    won, fell = (sum(getattr(run.changed, k) for run in runs) for k in ("gained", "lost"))
    counts = (f"{sum(run.successes(i) for run in runs)} of {episodes}" for i in (0, 1))
    return (name, *counts, gain(difference(runs)), f"{won}, {fell}")


def _suite_verdict(runs: Sequence[Trained], noisy: Sequence[Trained], tasks: dict[int, str]) -> str:
    """Which tasks fell, and the spread over seeds."""
    changes = {t: difference([r.of_task(t) for r in runs if _has(r, t)]) for t in tasks}
    below = [task for task, change in changes.items() if change.high < 0]
    fell = [task for task, change in changes.items() if change.mean < 0]
    each, shaken = (
        listed([f"{points(run.difference.mean)} (seed {run.seed})" for run in some])
        for some in (runs, noisy)
    )
    minutes = listed([f"{run.results['total_seconds'] / 60:.0f}" for run in runs])
    forced = [f"seed {run.seed} ({listed(run.refused)})" for run in runs if run.refused]
    chosen = [f"{listed(run.trained_in)} (seed {run.seed})" for run in runs if run.trained_in]
    return prose(
        f"Points by seed: {each}{f'; with noise: {shaken}' if noisy else ''}; minutes: {minutes}.",
        "Errors clustered by seed, task and start.",
        f"The gate refused the world, and was overruled: {listed(forced)}." if forced else "",
        f"Post-trained in tasks {listed(chosen)} alone, where imagined and real success were alike."
        if chosen
        else "",
        f"Tasks with fewer successes than imitation: {listed(sorted(fell))}." if fell else "",
        f"Significantly below imitation: {listed(sorted(below))}."
        if below
        else "No task is significantly below imitation.",
    )
