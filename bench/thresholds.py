"""Where a threshold on real frames belongs: rules compared on episodes that they did not see.

    python -m bench.thresholds RUN... [--reality] [--work DIR] [--out FILE]

Each round's reflector of finished runs scores the real episodes that it was trained on, those held
out, and (the first round's) all that the second round explored afterwards. Every rule puts a
threshold by some of them and is measured on the others. --reality: both policies play the held-out
starts, the reflector watching and stopping nothing; the scores stay in --work (what lies there is
used in any case), and say what any threshold would have cost. No rule is chosen by those. The run
folders are only read, and may be of versions before real frames had a threshold of their own.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bench.__main__ import origin
from worldenv.data.windows import FrameSequence, chunk_sequences, from_first_step
from worldenv.envs.start import Start
from worldenv.models.reflector import NOT_CALIBRATED, Reflector
from worldenv.report.statistics import wilson
from worldenv.runtime import checkpoint, progress
from worldenv.runtime.seeds import derive
from worldenv.stages import store
from worldenv.stages.collect import load_round
from worldenv.stages.evaluate import EVERY, held_out_starts
from worldenv.stages.reality import Watcher
from worldenv.stages.reflector import score
from worldenv.stages.run import Run, open_run, write_json
from worldenv.stages.thresholds import BOUNDS, Peaks, exceeded_by, interval, peaks, stopping

ROOT = Path(__file__).parents[1]
HOLD = 4  # chunks that are watched after success
Scored = tuple[list[Tensor], list[FrameSequence]]


def plain(scored: Scored, grace: int) -> Peaks:
    """As it is: a frame above the threshold speaks for itself."""
    return peaks(*scored, grace)


def twice(scored: Scored, grace: int) -> Peaks:
    """Two frames in a row must be above."""
    rewards, sequences = scored
    lower = [torch.cat([torch.zeros(2), torch.minimum(r[1:-1], r[2:])]) for r in rewards]
    return peaks(lower, sequences, grace)


def lowest(share: float) -> Callable[[Peaks], float]:
    """The lowest threshold with at most so many false stops."""
    return lambda found: float(np.clip(exceeded_by(found.false, share), *BOUNDS))


RULES: dict[str, tuple[Callable, int, str, Callable[[Peaks], float] | None]] = {
    "imagined, as it was": (plain, 0, "", None),
    "5% of trained": (plain, 0, "trained", lowest(0.05)),
    "2.5% of trained": (plain, 0, "trained", lowest(0.025)),
    "5% of held out": (plain, 0, "held out", lowest(0.05)),
    "twice, 5% of trained": (twice, 0, "trained", lowest(0.05)),
    "twice, 2.5% of trained": (twice, 0, "trained", lowest(0.025)),
    "grace, 5% of trained": (plain, 1, "trained", lowest(0.05)),
    "grace, 2.5% of trained": (plain, 1, "trained", lowest(0.025)),
    "grace, 5% of held out": (plain, 1, "held out", lowest(0.05)),
    "the stage's": (plain, 1, "trained", stopping),
}
"""How frames speak, the chunks of grace, whose episodes the threshold is put by, and how."""


def model(run: Run, kind: str, name: str) -> nn.Module:
    """A checkpoint of a run, of whatever version."""
    path = run.dir / "checkpoints" / f"{name}.safetensors"
    tensors, _ = checkpoint.load(path)
    if kind == "reflector":
        tensors.setdefault("real_threshold", torch.tensor(NOT_CALIBRATED))
    made = store.build(kind, run.config)
    checkpoint.load_module(made, tensors, path)
    return made.eval()


def scored(run: Run) -> Iterator[tuple[int, float, dict[str, Scored]]]:
    """(round, its threshold in imagination, rewards and sequences of each kind of episodes)."""
    rounds = [load_round(run, n)[1:] for n in range(run.config.posttrain.rounds)]
    for n, (trained, held) in enumerate(rounds):
        judge: Reflector = model(run, "reflector", f"reflector-{n}")
        kinds = {"trained": trained, "held out": held}
        if n + 1 < len(rounds):
            more = rounds[n + 1]
            kinds["later"] = [*more[0][len(trained) :], *more[1][len(held) :]]
        found = {}
        for kind, episodes in kinds.items():
            sequences = from_first_step(chunk_sequences(episodes, run.config.env.chunk))
            found[kind] = (score(judge, sequences), sequences)
        yield n, float(judge.threshold), found


def errors(found: Peaks, eta: float) -> np.ndarray:
    """False stops, episodes, missed successes, successes."""
    false, won = found.false > eta, found.won
    return np.array([false.sum(), len(found), (found.top[won] <= eta).sum(), won.sum()])


def by_rule(name: str, imagined: float, kinds: dict[str, Scored]) -> dict[str, Any]:
    """The threshold that a rule puts with its interval, and its errors on others' episodes. What is
    put by held-out ones is measured on each half of them with the threshold of the other half."""
    speaks, grace, source, rule = RULES[name]
    found = {kind: speaks(episodes, grace) for kind, episodes in kinds.items()}
    if rule is None:
        others = {kind: errors(p, imagined) for kind, p in found.items() if kind != "trained"}
        return {"threshold": round(imagined, 4), "errors": others}
    base = found[source]
    eta = rule(base)
    around = interval(len(base), lambda rows: rule(base[rows]), BOUNDS, derive("thresholds"))
    others = {kind: errors(p, eta) for kind, p in found.items() if kind not in ("trained", source)}
    if source == "held out":
        half = np.arange(len(base)) % 2 == 0
        pairs = ((half, ~half), (~half, half))
        others[source] = sum(errors(base[test], rule(base[put])) for put, test in pairs)
    return {"threshold": round(eta, 4), "interval": around, "errors": others}


class Onlooking(Watcher):
    """Scores every frame of an episode, until some chunks after success."""

    def __init__(
        self, starts: Sequence[Start], judge: Reflector, note: Callable[[dict], None], chunk: int
    ) -> None:
        self.starts, self.judge, self.note = starts, judge.onlooker(1), note
        self.hold, self.scores = HOLD * chunk, None

    def step(self, episode: int, before: dict, action: Any, after: dict, info: dict) -> None:
        """Note what the reflector says, and when the benchmark's signal fires."""
        if self.scores is None:
            self.scores, self.fired = [], None
            self.judge.reset(EVERY)
            self._see(before)
        self.scores.append(round(self._see(after), 5))
        if self.fired is None and bool(info["success"][0]):
            self.fired = len(self.scores) - 1

    def _see(self, view: dict) -> float:
        return float(self.judge.watch(view["image"], view["proprio"], view["instruction"], EVERY))

    def stop(self, observation: dict, info: dict, live: np.ndarray) -> np.ndarray:
        """Rows that have been watched long enough."""
        return info["success"] & (info["steps"] >= info["success_step"] + self.hold)

    def finish(self, episode: int, info: dict) -> None:
        """Keep the episode."""
        start = self.starts[episode]
        key = {"task": start.task, "start": start.index, "seed": start.seed}
        self.note({**key, "fired": self.fired, "scores": self.scores})
        self.scores = None


def played(run: Run, path: Path) -> dict:
    """Scores of both policies' episodes on the held-out starts, kept in `path`."""
    if path.exists():
        return json.loads(path.read_text())
    last = run.config.posttrain.rounds - 1
    judge, starts = model(run, "reflector", f"reflector-{last}"), held_out_starts(run)
    found: dict[str, Any] = {"eta": float(judge.threshold)}
    for label, name in (("sft", "policy-sft"), ("posttrained", f"policy-{last}")):
        episodes: list[dict] = []
        with progress.bar(len(starts), f"{run.dir.name} {label}") as bar:

            def note(episode: dict, episodes=episodes, bar=bar) -> None:
                episodes.append(episode)
                bar.advance()

            run.reality.roll_out(
                model(run, "policy", name),
                starts,
                lambda env, note=note: Onlooking(starts, judge, note, run.config.env.chunk),
                seeds=[0] * len(starts),
                noise=None,
                terminate="never",
            )
        found[label] = sorted(episodes, key=lambda e: (e["task"], e["start"], e["seed"]))
    write_json(path, found)
    return found


def verdicts(episodes: list[dict], eta: float, grace: int) -> np.ndarray:
    """Of each: (success by the benchmark's word, success where the reflector stops it, whether it
    is stopped too early or without success, whether its success is not noticed within HOLD)."""
    rows = []
    for episode in episodes:
        over = np.flatnonzero(np.array(episode["scores"]) > eta)
        won, end = episode["fired"] is not None, len(episode["scores"]) - 1
        stop = min(over[0] + grace, end) if len(over) else None
        lost = stop is not None and not (won and episode["fired"] <= stop)
        rows.append((won, won and not lost, lost, won and stop is None))
    return np.array(rows)


def in_reality(found: dict, thresholds: dict[str, float]) -> dict[str, dict]:
    """By policy and rule: counts of `verdicts`."""
    names = ("oracle", "no_oracle", "false_stops", "missed")
    return {
        label: {
            rule: dict(
                zip(names, verdicts(found[label], eta, RULES[rule][1]).sum(0).tolist(), strict=True)
            )
            | {"episodes": len(found[label])}
            for rule, eta in thresholds.items()
            if RULES[rule][0] is plain
        }
        for label in ("sft", "posttrained")
    }


def share(count: int, of: int) -> str:
    """A percentage with its 95% interval."""
    around = wilson(int(count), int(of))
    return f"{100 * around.mean:.1f} ({100 * around.low:.1f} to {100 * around.high:.1f})"


def table(runs: dict[str, dict]) -> str:
    """Markdown: errors of every rule, runs pooled."""
    rounds = sorted({key for run in runs.values() for key in run["rounds"]})
    pools = [(n, kind) for n in rounds for kind in ("held out", "later")]
    lines = []
    for rule in RULES:
        cells = []
        for n, kind in pools:
            parts = [
                run["rounds"][n][rule]["errors"][kind]
                for run in runs.values()
                if kind in run["rounds"][n][rule]["errors"]
            ]
            if parts:
                false, count, missed, won = np.sum(parts, 0)
                cells.append(f"{share(false, count)} / {share(missed, won)}")
        lines.append(f"| {rule} | {' | '.join(cells)} |")
    heads = [
        f"round {n}, {kind}"
        for n, kind in pools
        if kind in next(iter(runs.values()))["rounds"][n][rule]["errors"]
    ]
    return "\n".join([f"| rule | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|", *lines])


def each(runs: dict[str, dict]) -> str:
    """Markdown: both thresholds of every run and round, and the errors of the stage's."""
    lines = ["| run, round | imagined | real | held out | later |", "|---" * 5 + "|"]
    for name, run in runs.items():
        for n, rules in run["rounds"].items():
            own, was = rules["the stage's"], rules["imagined, as it was"]["threshold"]
            low, high = own["interval"]
            cells = [f"{own['threshold']:.3f} ({low:.3f} to {high:.3f})"]
            for kind in ("held out", "later"):
                of = own["errors"].get(kind)
                cells.append("" if of is None else "{} of {} / {} of {}".format(*of))
            lines.append(f"| {name}, {n} | {was:.3f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def real_table(runs: dict[str, dict]) -> str:
    """Markdown: what the threshold of imagination and the stage's come to in reality."""
    lines = [
        "| run, policy | successes | without oracle: imagined's, real's | false stops | missed |",
        "|---" * 5 + "|",
    ]
    for name, run in runs.items():
        for label, rules in run.get("reality", {}).items():
            was, own = rules["imagined, as it was"], rules["the stage's"]
            pairs = [f"{was[k]}, {own[k]}" for k in ("no_oracle", "false_stops", "missed")]
            head = f"| {name}, {label} | {was['oracle']} of {was['episodes']} | "
            lines.append(head + " | ".join(pairs) + " |")
    return "\n".join(lines)


def main() -> None:
    """Parses the command line, scores, plays, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="finished runs")
    parser.add_argument("--reality", action="store_true", help="play the held-out starts too")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "thresholds")
    parser.add_argument("--out", type=Path, default=ROOT / "results/thresholds/results.json")
    given = parser.parse_args()
    runs: dict[str, dict] = {}
    for folder in given.runs:
        run = open_run(folder)
        rounds = {}
        for n, imagined, kinds in scored(run):
            rounds[n] = {rule: by_rule(rule, imagined, kinds) for rule in RULES}
        runs[folder.name] = {"seed": run.config.seed, "rounds": rounds}
        path = given.work / f"{folder.name}.json"
        if given.reality or path.exists():
            found = played(run, path)
            last = rounds[max(rounds)]
            etas = {rule: last[rule]["threshold"] for rule in RULES}
            runs[folder.name]["reality"] = in_reality(found, etas)
        run.close()
    print(table(runs), each(runs), real_table(runs), sep="\n\n")
    for run in runs.values():
        for rules in run["rounds"].values():
            for rule in rules.values():
                rule["errors"] = {kind: e.tolist() for kind, e in rule["errors"].items()}
    report = {
        **origin("bench.thresholds"),
        "errors": "false stops, episodes, missed successes, successes",
        "runs": runs,
    }
    write_json(given.out, report)


if __name__ == "__main__":
    main()
