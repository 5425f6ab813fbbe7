"""Success in the real benchmark: seeded, paired, with and without the benchmark's own word.

One rollout answers both questions. With oracle: the episode succeeds when the benchmark's signal
first fires. Without: it ends when the reflector, by its threshold for real frames, has said so and
a short grace is over (or at the last step), and counts if the benchmark's signal has fired by then.
Policies act on their mean; with `evaluate.sampled` once more with the noise of post-training, the
same for both. What was post-trained in the benchmark itself has no reflector: with oracle alone.
"""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from worldenv.envs.start import Start
from worldenv.models.policy import Policy
from worldenv.models.reflector import Reflector
from worldenv.rl.noise import Noise, exploration
from worldenv.runtime import progress, ranks
from worldenv.runtime.seeds import derive
from worldenv.stages import store, thresholds
from worldenv.stages.collect import world
from worldenv.stages.reality import Watcher
from worldenv.stages.run import Run, Stage, acting, read_record, stage_before, write_record


def run(run: Run, mark: str, number: int = 0) -> dict:
    """Stage `evaluate`: the imitated and the last post-trained policy on held-out starts, paired.

    Finished episodes are kept in evaluation/<label>.json, so an interrupted evaluation goes on.
    """
    config, starts = run.config, held_out_starts(run)
    last = config.posttrain.rounds - 1
    reflector = None
    if config.learned:
        path = run.path("checkpoints", f"reflector-{last}.safetensors")
        reflector = store.load("reflector", path)
    moves = run.embodiment.actions("translate")
    found: dict[str, Any] = {}
    for kind in ("outcomes", "sampled")[: 1 + config.evaluate.sampled]:
        found[kind] = {}
        for label, name in (("sft", "policy-sft"), ("posttrained", f"policy-{last}")):
            path = run.path("checkpoints", f"{name}.safetensors")
            policy = store.load("policy", path, run.acting)
            noise, called = None, label
            if kind == "sampled":
                noise = exploration(policy.distribution, config.posttrain, moves)
                called = f"{label}-sampled"
            kept = run.path("evaluation", f"{called}.json")
            found[kind][label] = resumed(
                run, policy, starts, f"evaluate {called}", kept, mark, reflector, noise
            )
    return found | run.reality.assets


STAGE = Stage(
    "evaluate",
    run,
    settings=lambda config, n: (world(config), config.evaluate),
    needs=lambda config, n: (
        "sft",
        stage_before(config.posttrain.rounds),
        *((f"reflector-{config.posttrain.rounds - 1}",) if config.learned else ()),
    ),
    keeps=tuple(
        f"evaluation/{label}{kind}.json"
        for label in ("sft", "posttrained")
        for kind in ("", "-sampled")
    ),
    rounds=False,
)


def resumed(
    run: Run,
    policy: Policy,
    starts: Sequence[Start],
    label: str,
    path: Path,
    mark: str,
    reflector: Reflector | None = None,
    noise: Noise | None = None,
) -> list[dict]:
    """What `evaluate_policy` returns, in the order of task, start and seed. The episodes are kept
    in `path`, and those that are there under this mark are not repeated. Every rank keeps its own,
    in a file beside it."""

    def stored() -> list[dict]:
        """What an earlier attempt has left, then in one file."""
        found = [path, *sorted(path.parent.glob(f"{path.stem}.rank-*.json"))]
        records = [record for file in found if (record := read_record(file))]
        known = [e for record in records if record["mark"] == mark for e in record["episodes"]]
        unique = {(e["task"], e["start"], e["seed"]): e for e in known}
        if len(found) > 1:
            write_record(path, {"mark": mark, "episodes": [*unique.values()]})
        for file in found[1:]:
            file.unlink()
        return [*unique.values()]

    done = ranks.together(stored)
    have = {(e["task"], e["start"], e["seed"]) for e in done}
    left = [s for s in starts if (s.task, s.index, s.seed) not in have]
    own = path if ranks.lead() else path.with_suffix(f".rank-{ranks.number()}.json")
    before = done if ranks.lead() else []

    def keep(episodes: list[dict]) -> None:
        write_record(own, {"mark": mark, "episodes": [*before, *episodes]})

    more = evaluate_policy(run, policy, left, label, reflector, keep, noise)
    ranks.together(stored)  # from now on in one file
    return sorted([*done, *more], key=lambda e: (e["task"], e["start"], e["seed"]))


def held_out_starts(run: Run) -> list[Start]:
    """Every task, every held-out start, every fixture seed."""
    part = run.config.evaluate
    return [
        Start(task, index, seed)
        for task in run.config.env.tasks
        for seed in part.fixture_seeds
        for index in range(*part.starts)
    ]


def evaluate_policy(
    run: Run,
    policy: Policy,
    starts: Sequence[Start],
    label: str,
    reflector: Reflector | None = None,
    keep: Callable[[list[dict]], None] | None = None,
    noise: Noise | None = None,
) -> list[dict]:
    """One deterministic episode per start: task, start, seed, success, steps and, with a
    reflector, success_no_oracle and stop_step (None where it did not end the episode first).

    keep is called with all outcomes so far from time to time. noise: to act with, the same for
    every policy. UserError for a reflector that was not calibrated on real frames.
    """
    if not starts:
        return []
    if reflector is not None:  # an image-text model is large: for it the way to a GPU is short
        reflector = (reflector.to(run.device) if reflector.frozen else reflector.cpu()).eval()
    device = next(policy.parameters()).device
    policy = policy.to(acting(run.device, policy.config)).eval()
    outcomes: list[dict] = []
    with progress.bar(len(starts), label) as bar:

        def note(outcome: dict) -> None:
            outcomes.append(outcome)
            bar.advance(success=sum(o["success"] for o in outcomes) / len(outcomes))
            if keep is not None and len(outcomes) % 10 == 0:
                keep(outcomes)

        try:
            run.reality.roll_out(
                policy,
                starts,
                lambda env: _Ruling(starts, note, reflector),
                seeds=[
                    derive(run.config.seed, "sampled", s.task, str(s.index), s.seed) for s in starts
                ],
                noise=noise,
                terminate="success",
            )
        finally:
            policy.to(device)
            if keep is not None:
                keep(outcomes)
    return [*itertools.chain(*ranks.gather(outcomes))]


EVERY = torch.ones(1, dtype=torch.bool)  # the rows of an environment of one


class _Ruling(Watcher):
    """What came of each episode, by the benchmark's word and, if there is one, the reflector's.

    Once the benchmark's signal has fired nothing that follows changes either, so it is the end.
    """

    def __init__(
        self, starts: Sequence[Start], note: Callable[[dict], None], reflector: Reflector | None
    ) -> None:
        self.starts, self.note = starts, note
        self.judge = None if reflector is None else reflector.onlooker(1)
        self.threshold = None if reflector is None else thresholds.of_reality(reflector)
        self.begun, self.verdict = False, None
        self.grace: int | None = None  # chunks until the end, once the reflector has spoken

    def step(self, episode: int, before: dict, action: Any, after: dict, info: dict) -> None:
        """Show the reflector the frames before the first and after every chunk."""
        if self.judge is None:
            return
        if not self.begun:
            self.begun, self.verdict, self.grace = True, None, None
            self.judge.reset(EVERY)
            self._watch(before)
        if self.grace is not None:
            self.grace -= 1
        elif self._watch(after) > self.threshold:
            self.grace = thresholds.GRACE
        if self.grace == 0 and self.verdict is None:
            self.verdict = {
                "success_no_oracle": bool(info["success"][0]),
                "stop_step": int(info["steps"][0]),
            }

    def _watch(self, view: dict) -> float:
        seen = (view["image"], view["proprio"], view["instruction"])
        return float(self.judge.watch(*seen, EVERY))

    def finish(self, episode: int, info: dict) -> None:
        """Where the reflector has not ended it, it would later, or at the last step: the signal has
        fired by then, or never does.
        """
        start = self.starts[episode]
        outcome = {
            "task": start.task,
            "start": start.index,
            "seed": start.seed,
            "success": bool(info["success"]),
            "steps": int(info["success_step"] if info["success"] else info["steps"]),
        }
        if self.judge is not None:
            never = {"success_no_oracle": outcome["success"], "stop_step": None}
            outcome |= self.verdict or never
        self.begun = False
        self.note(outcome)
