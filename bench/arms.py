"""Arms of one comparison on the ten tasks of libero_spatial, and a table of what came of them.

    python -m bench.arms RUNS [--arms full real] [--seeds 0 1 2] [-- FLAG...]

Each arm is `worldenv-train --preset libero-spatial-small` with the flags of ARMS, in the folder
RUNS/seed-N-ARM; whatever follows `--` goes to all of them. The same command resumes. What two arms
have in common (demonstrations, imitation, with a learned world the first exploration and, where it
is trained alike, the simulator) is copied from the one of a seed that has most of it. Results are
kept in results/libero_spatial as seed-N-ARM.json (full: seed-N.json), and the table is of all that
lie there.

All arms use as many real episodes; in `real` those go to the policy itself, with about as many
optimiser steps as the learned world's larger iterations make.
"""

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.__main__ import RESULTS
from worldenv.report.statistics import paired_difference

KEPT = RESULTS.parent / "libero_spatial"
PRESET = "libero-spatial-small"
_NO_EXPLORED = ("--simulator.no-explored",)
_UNTRAINED = ("--reflector.no-explored", "--reflector.no-calibrate")
ARMS: dict[str, tuple[str, ...]] = {
    "full": (),
    "no-explored": (*_NO_EXPLORED, "--force"),
    "untrained-judge": (*_UNTRAINED, "--force"),
    "neither": (*_NO_EXPLORED, *_UNTRAINED, "--force"),
    "real": (
        *("--posttrain.world", "real", "--posttrain.rounds", "1", "--posttrain.epochs", "4"),
        *("--posttrain.iterations", "10", "--posttrain.contexts", "10", "--posttrain.group", "5"),
        *("--posttrain.draws", "1"),  # without a critic as many as with one
    ),
}
"""The ablation two by two (the world learned from explored episodes or from demonstrations alone,
the judge likewise; a world that the gate refuses is forced, which its results say), and
post-training in the benchmark itself."""
STARTED = ("data/demonstrations", "checkpoints/policy-sft.safetensors")
EXPLORED = ("data/explore-0",)
WORLD = ("checkpoints/simulator-0.safetensors",)


def arguments(arm: str, seed: int, folder: Path, more: Sequence[str] = ()) -> list[str]:
    """Of worldenv-train."""
    own = ["--preset", PRESET, "--seed", str(seed), "--run-dir", str(folder)]
    return [*own, *ARMS[arm], *more]


def common(arm: str, other: str) -> list[tuple[str, ...]]:
    """What two arms have in common, the most of it first; in each the stages' records last."""
    kinds = [(*STARTED, "stages/demonstrations.json", "stages/sft.json")]
    if "real" not in (arm, other):
        kinds.insert(0, (*EXPLORED, *kinds[0], "stages/explore-0.json"))
        alike = (_NO_EXPLORED[0] in ARMS[arm]) == (_NO_EXPLORED[0] in ARMS[other])
        if alike:
            kinds.insert(0, (*WORLD, *kinds[0], "stages/simulator-0.json"))
    return kinds


def share(runs: Path, seed: int, arm: str) -> None:
    """Copy that into an arm's new folder, if another arm of the seed has any."""
    target = runs / f"seed-{seed}-{arm}"
    found = [
        (source, names)
        for other in ARMS
        if other != arm
        for names in common(arm, other)
        if all(((source := runs / f"seed-{seed}-{other}") / name).exists() for name in names)
    ]
    if not found or (target / "stages").exists():
        return
    source, names = max(found, key=lambda pair: len(pair[1]))
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if (source / name).is_dir() else shutil.copy2
        copy(source / name, target / name)


def run(arm: str, seed: int, runs: Path, more: Sequence[str]) -> None:
    """Train an arm, and keep its results."""
    folder = runs / f"seed-{seed}-{arm}"
    share(runs, seed, arm)
    code = "import sys; from worldenv.entry import train; sys.argv[0] = 'worldenv-train'; train()"
    words = arguments(arm, seed, folder, more)
    subprocess.run([sys.executable, "-c", code, *words], check=True)
    KEPT.mkdir(parents=True, exist_ok=True)
    name = f"seed-{seed}.json" if arm == "full" else f"seed-{seed}-{arm}.json"
    shutil.copyfile(folder / "results.json", KEPT / name)


def rows(found: dict[str, dict]) -> list[tuple[str, ...]]:
    """Of the table; found: results by the name of their file."""
    made = []
    for name, results in found.items():
        sampled = results.get("sampled") or {}
        used = results["real_episodes"]
        made.append(
            (
                name,
                "\n".join(f"{count} {what}" for what, count in used.items() if count),
                _outcome(results),
                _outcome(results.get("no_oracle")),
                _outcome(sampled),
                _outcome(sampled.get("no_oracle")),
                ", ".join(_below(results["evaluation"])) or "none",
                f"{results['total_seconds'] / 60:.0f}",
            )
        )
    return made


def _outcome(success: dict | None) -> str:
    """Successes before and after, and the difference in points with its interval."""
    if not success:
        return "-"
    before, after, change = (success[k] for k in ("sft", "posttrained", "paired_difference"))
    counts = f"{before['successes']} -> {after['successes']} of {after['episodes']}"
    if change is None:
        return counts
    mean, low, high = (100 * change[k] for k in ("mean", "low", "high"))
    return f"{counts}\n{mean:+.1f} ({low:+.1f} to {high:+.1f})"


def _below(evaluation: dict[str, list[dict]]) -> list[str]:
    """Tasks that are significantly worse than imitation."""
    found = []
    for task in sorted({e["task"] for e in evaluation["sft"]}):
        before, after = (
            [e for e in evaluation[k] if e["task"] == task] for k in ("sft", "posttrained")
        )
        values = ([float(e["success"]) for e in each] for each in (before, after))
        if paired_difference(*values, [e["start"] for e in before]).high < 0:
            found.append(str(task))
    return found


def show(kept: Path, console: Console) -> None:
    """Print the table of all results in a folder."""
    found = {p.stem: json.loads(p.read_text()) for p in sorted(kept.glob("seed-*.json"))}
    table = Table(title="imitation -> post-trained, difference in points (95% interval)")
    heads = ("run", "real episodes", "greedy", "greedy, no oracle", "sampled")
    for head in (*heads, "sampled, no oracle", "tasks below imitation", "minutes"):
        table.add_column(head)
    for row in rows(found):
        table.add_row(*row)
    console.print(table)


def main() -> int:
    """Parses the command line, runs what is asked for, prints the table."""
    argv, more = sys.argv[1:], []
    if "--" in argv:
        cut = argv.index("--")
        argv, more = argv[:cut], argv[cut + 1 :]
    parser = argparse.ArgumentParser(
        prog="python -m bench.arms", description=__doc__.splitlines()[0]
    )
    parser.add_argument("runs", type=Path, metavar="RUNS", help="folder of the runs' folders")
    parser.add_argument("--arms", nargs="*", choices=ARMS, default=[*ARMS], help="default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    asked = parser.parse_args(argv)
    for seed in asked.seeds:
        for arm in asked.arms:
            run(arm, seed, asked.runs, more)
    show(KEPT, Console(width=200))
    return 0


if __name__ == "__main__":
    sys.exit(main())
