"""Finished runs as `results/` keeps them, and how their figures are written in Markdown."""

import json
import re
import textwrap
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from worldenv.report.statistics import Interval, McNemar, mcnemar, paired_difference
from worldenv.runtime.errors import UserError


@dataclass(frozen=True)
class Trained:
    """A results.json: a policy before and after post-training, on the same N held-out episodes.

    folder: below `results/`; variant: what its file is called beyond "seed-N", or its whole name.
    """

    folder: str
    variant: str
    results: dict[str, Any]

    @property
    def seed(self) -> int:
        return self.results["seed"]

    @property
    def commit(self) -> str:
        return self.results["commit"][:7]

    @property
    def name(self) -> str:
        """The group it belongs to: seeds of one folder that differ in nothing else."""
        return "/".join(part for part in (self.folder, self.variant) if part)

    @cached_property
    def pairs(self) -> list[tuple[dict, dict]]:
        """Episodes of both policies with the same task, start and fixture seed."""
        before, after = (
            {(e["task"], e["start"], e["seed"]): e for e in self.results["evaluation"][policy]}
            for policy in ("sft", "posttrained")
        )
        if before.keys() != after.keys():
            raise UserError(
                f"results/{self.name}, seed {self.seed}: expected both policies on the same "
                f"episodes, got {len(before.keys() ^ after.keys())} that only one has. Let "
                "worldenv-train evaluate the run again."
            )
        return [(before[key], after[key]) for key in sorted(before)]

    def of_task(self, task: int) -> "Trained":
        """The same run, of one task's episodes only."""
        kept = {
            policy: [e for e in episodes if e["task"] == task]
            for policy, episodes in self.results["evaluation"].items()
        }
        return self._with(kept)

    @property
    def noisy(self) -> "Trained | None":
        """The same run, its policies acting with the noise of post-training, where they were asked
        to."""
        sampled = self.results.get("sampled")
        return self._with(sampled["evaluation"]) if sampled else None

    def _with(self, evaluation: dict[str, list[dict]]) -> "Trained":
        return Trained(self.folder, self.variant, self.results | {"evaluation": evaluation})

    def successes(self, policy: int) -> int:
        """Of the imitated policy (0) or the post-trained one (1)."""
        return sum(bool(pair[policy]["success"]) for pair in self.pairs)

    def without_oracle(self, policy: int) -> str:
        """Successes where the reflector ends episodes; "-" where that was not asked."""
        outcomes = [pair[policy].get("success_no_oracle") for pair in self.pairs]
        return "-" if None in outcomes else str(sum(outcomes))

    @property
    def refused(self) -> list[str]:
        """What of its worlds is beyond the gate's limits, where it trained in them nevertheless."""
        return [row["what"] for g in self._gates for row in g["measures"] if not row["passed"]]

    @property
    def verdict(self) -> str:
        """The gate's, in words; in the benchmark itself there is nothing to judge."""
        if not self._gates:
            return "no world"
        return f"refuses: {listed(self.refused)}" if self.refused else "passes"

    @property
    def trained_in(self) -> list[int]:
        """The tasks that a round was post-trained in; nothing if in all of them."""
        return sorted({task for gate in self._gates for task in gate.get("tasks", ())})

    @property
    def _gates(self) -> list[dict]:
        return [stage["gate"] for stage in self.results["stages"].values() if "gate" in stage]

    @cached_property
    def difference(self) -> Interval:
        """Post-trained minus imitated, paired, errors clustered by task and start."""
        return difference([self])

    @cached_property
    def changed(self) -> McNemar:
        return mcnemar(*([pair[i]["success"] for pair in self.pairs] for i in (0, 1)))


def difference(runs: Sequence[Trained]) -> Interval:
    """Paired difference over all episodes of the runs, errors clustered by run, task and start:
    what holds of these very policies."""
    return _difference(runs, lambda run, episode: (run, episode["task"], episode["start"]))


def over_seeds(runs: Sequence[Trained]) -> Interval | None:
    """The same with errors clustered by run: what other seeds may be expected to show. None for
    fewer than three."""
    return _difference(runs, lambda run, episode: run) if len(runs) > 2 else None


def _difference(
    runs: Sequence[Trained], cluster: Callable[[tuple[str, int], dict], Hashable]
) -> Interval:
    pairs = [((run.name, run.seed), *pair) for run in runs for pair in run.pairs]
    before, after = ([float(row[i]["success"]) for row in pairs] for i in (1, 2))
    return paired_difference(before, after, [cluster(run, first) for run, first, _ in pairs])


def read(path: Path) -> Any:
    """A JSON file. UserError where it is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(
            f"{path}: expected JSON, got {error}. Restore it: git checkout -- {path}"
        ) from error


def trained(results: Path, below: str) -> list[Trained]:
    """Every run in a folder of `results/` and in its subfolders, by folder, variant and seed; other
    JSON is passed over, an absent folder holds none."""
    found = []
    for path in sorted((results / below).rglob("*.json")):
        content = read(path)
        if isinstance(content, dict) and {"evaluation", "seed", "commit"} <= content.keys():
            seed = re.fullmatch(r"seed-\d+-?(.*)", path.stem)
            folder = path.parent.relative_to(results).as_posix()
            found.append(Trained(folder, seed[1] if seed else path.stem, content))
    return sorted(found, key=lambda run: (run.folder, run.variant, run.seed))


def groups(runs: Iterable[Trained]) -> dict[str, list[Trained]]:
    """Runs that differ in their seed alone, by name."""
    found: dict[str, list[Trained]] = {}
    for run in runs:
        found.setdefault(run.name, []).append(run)
    return found


# --- Markdown


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def prose(*sentences: str) -> str:
    """A paragraph of the README's width, no line of which begins as a list's would."""
    words = " ".join(sentence for sentence in sentences if sentence)
    words = re.sub(r" (?=(\d+[.)]|[-+*#>])(\s|$))", "\0", words)
    filled = textwrap.fill(words, 106, break_long_words=False, break_on_hyphens=False)
    return filled.replace("\0", " ")


def points(share: float, digits: int = 1) -> str:
    """A difference of shares in percentage points, with sign."""
    value = round(100 * share, digits)
    return f"{value:+.{digits}f}" if value else f"{0:.{digits}f}"


def gain(change: Interval) -> str:
    """A difference with its interval; bold where the interval lies above zero."""
    mean = f"{points(change.mean)} points"
    if change.low > 0:
        mean = f"**{mean}**"
    return f"{mean} ({points(change.low)} to {points(change.high)})"


def rate(share: Interval | dict[str, float]) -> str:
    """A share with its interval, of statistics.py or as a measure has it ({value, low, high})."""
    if isinstance(share, Interval):
        share = {"value": share.mean, "low": share.low, "high": share.high}
    return f"{share['value']:.0%} ({100 * share['low']:.0f} to {100 * share['high']:.0f})"


def listed(values: Sequence[object]) -> str:
    """ "1, 2 and 3"; "0 to 4" where whole numbers follow each other."""
    run = list(values)
    if len(run) > 2 and isinstance(run[0], int) and run == list(range(run[0], run[0] + len(run))):
        return f"{run[0]} to {run[-1]}"
    words = [str(value) for value in run]
    return " and ".join(", ".join(words[i:j]) for i, j in ((0, -1), (-1, None)) if words[i:j])


def seeds(runs: Sequence[Trained]) -> str:
    """ "seed 3", "seeds 0 to 4"."""
    return f"seed{'s' * (len(runs) > 1)} {listed([run.seed for run in runs])}"


def processor(machine: dict[str, Any]) -> str:
    """A processor's name without its marks."""
    name = re.sub(r"\((R|TM)\)|\bProcessor\b", "", machine.get("processor") or machine["cpu"])
    return " ".join(name.split()) + (", AMX" if machine.get("isa") == 4 else "")
