"""Regions about single experiments: a line each, its figures from the experiment's own JSON."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.results.defaults import NOT_YET
from bench.results.runs import gain, listed, points, processor, prose, read, table
from worldenv.report.statistics import difference_of_rates, wilson


def _rates(rows: list[dict[str, Any]], wrong: str, of: str) -> str:
    """ "37 of 377 (9.8%, 7.2 to 13.2)" over rows that count both."""
    found = wilson(sum(row[wrong] for row in rows), sum(row[of] for row in rows))
    counts = f"{sum(row[wrong] for row in rows)} of {sum(row[of] for row in rows)}"
    return f"{counts} ({100 * found.mean:.1f}%, {100 * found.low:.1f} to {100 * found.high:.1f})"


def _thresholds(folder: Path) -> str:
    content = read(folder / "results.json")
    played = {name: run["reality"] for name, run in content["runs"].items() if "reality" in run}
    both = [policy for run in played.values() for policy in run.values()]
    now, was = ([row[rule] for row in both] for rule in ("the stage's", "imagined, as it was"))
    where = listed([content["runs"][name]["seed"] for name in played])
    return (
        "A threshold of its own for real frames: false stops in "
        f"{_rates(now, 'false_stops', 'episodes')} episodes instead of "
        f"{sum(row['false_stops'] for row in was)}; "
        f"{_rates(now, 'missed', 'oracle')} successes missed instead of "
        f"{sum(row['missed'] for row in was)} (seeds {where}, both policies)."
    )


def _false_stops(folder: Path) -> str:
    content = read(folder / "results.json")
    base = content["without"]["trained"]
    said = [f"{base['successes']} of {base['episodes']} at rate 0"]
    for name, found in content["rates"].items():
        change = difference_of_rates(
            *(wilson(x["successes"], x["episodes"]) for x in (found, base))
        )
        said.append(f"{found['successes']} at rate {name}, {gain(change)}")
    return (
        "False stops injected in training, real successes after "
        f"{len(content['without']['imagined_success'])} iterations: {listed(said)} "
        f"(seed {content['seed']})."
    )


def _action_map(folder: Path) -> str:
    content = read(folder / "results.json")
    errors = (("all pixels", "mse"), ("the fixed camera", "mse_view_0"))
    found = {(row["from"], row["ahead"], row["error"]): row for row in content["all"]}
    said = []
    for what, error in errors:
        mean, low, high = found["mid-episode", 1, error]["over_runs_percent"]["map"]
        said.append(f"{what} {mean:+.1f}% ({low:+.1f} to {high:+.1f})")
    return (
        "The paper's action map, squared error one chunk ahead from mid-episode: "
        f"{listed(said)}, over {len(content['by_run'])} seeds; off by default."
    )


def _distill(folder: Path) -> str:
    content = read(folder / "results.json")
    seed, run = next(iter(content["runs"].items()))
    reached = next(stage for name, stage in run.items() if name.startswith("distill"))["reached"]
    said = [
        f"{arm.replace('_', ' ')} {figures['psnr_per_horizon']['8']:.2f}"
        for arm, figures in reached.items()
    ]
    return (
        f"Distilled to one pass a frame, dB to real frames eight chunks ahead: {listed(said)} "
        f"({seed.replace('-', ' ')}); off by default."
    )


def _measures(folder: Path) -> str:
    """A sentence about the worlds that `worldenv-eval --simulator` measured, one of each seed."""
    worlds = [read(path) for path in sorted(folder.glob("seed-*.json"))]

    def each(figure: Callable[[dict], dict], say: Callable[[float], str]) -> str:
        return listed([say(figure(world)["value"]) for world in worlds])

    def called(what: str) -> str:
        return each(lambda world: world["event"][what]["1"], "{:.0%}".format)

    def apart(who: str) -> str:
        return each(lambda world: world["closed_loop"][who]["difference"], whole)

    def gained(where: str) -> str:
        return each(lambda world: world["gain"]["on its mean"][where], whole)

    def whole(share: float) -> str:
        return points(share, 0)

    order = each(lambda world: world["ranking"]["pearson"], "{:.2f}".format)
    seeds = listed([world["seed"] for world in worlds])
    return (
        f"The default's world in seeds {seeds}, {worlds[0]['episodes']['n']} fresh episodes each: "
        f"one chunk before, the grasp is called rightly in {called('grasp')} and the placing in "
        f"{called('placing')}; imagined minus real success of the policy that explored is "
        f"{apart('explored_with_noise')} points, of the post-trained one {apart('posttrained')}; "
        f"of the {gained('imagined')} points that post-training gains in imagination "
        f"{gained('real')} are real; Pearson of {worlds[0]['ranking']['pearson']['n']} policies "
        f"{order}."
    )


DRAWN: dict[str, Callable[[Path], str]] = {
    "action-map": _action_map,
    "distill": _distill,
    "false-stops": _false_stops,
    "measures": _measures,
    "thresholds": _thresholds,
}


def experiments(results: Path) -> str:
    """A line for each folder of `results/` with a README.md: drawn by a function above, else its
    paragraph that begins "In short: ", else its title."""
    lines = []
    for page in sorted(results.glob("*/README.md")):
        folder, text = page.parent, page.read_text(encoding="utf-8")
        short = re.search(r"^In short: (.*?)(?:\n\n|\Z)", text, re.DOTALL | re.MULTILINE)
        if folder.name in DRAWN:
            said = DRAWN[folder.name](folder)
        else:
            said = " ".join(short[1].split()) if short else text.splitlines()[0].lstrip("# ")
        link = f"[`results/{folder.name}`](results/{folder.name}/README.md)"
        lines.append("- " + prose(f"{said.rstrip('.')}: {link}").replace("\n", "\n  "))
    return "\n".join(lines) or NOT_YET


def full_size(results: Path) -> str:
    """Random models in published sizes on a CPU: `bench.full_size`."""
    does = {
        "openvla-oft": "decides in",
        "wan": "imagines a chunk in",
        "wovr": "imagines a chunk in",
    }
    rows = []
    for path in sorted((results / "bench").glob("full-size-*.json")):
        found = read(path)
        rows.append(
            (
                f"`{found['case']}`",
                f"{found['weight_bytes'] / 1e9:.1f} GB",
                f"{found['peak_bytes_loaded'] / found['weight_bytes']:.2f}",
                f"{found['peak_over_weights']:.2f}",
                f"{does.get(found['case'], 'takes')} {found['use_seconds']:.0f} s",
                processor(found["machine"]) + f", {found['machine']['threads']} threads",
            )
        )
    head = ("case", "weights", "peak ÷ weights, loading", "in use", "time", "processor")
    return table(head, rows) if rows else NOT_YET
