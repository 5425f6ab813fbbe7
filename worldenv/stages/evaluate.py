"""Success in the real benchmark: seeded, paired, with and without the benchmark's own word.

One rollout answers both questions. With oracle: the episode succeeds when the benchmark's signal
first fires. Without: it ends when the reflector says so (or at the last step), and counts if the
benchmark's signal has fired by then. Policies act on their mean.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from worldenv.envs.start import Start
from worldenv.models.policy import Policy
from worldenv.models.reflector import Judge, Reflector
from worldenv.rl.rollout import rollout
from worldenv.runtime import progress
from worldenv.stages import store
from worldenv.stages.collect import make_env
from worldenv.stages.run import Run, read_json, use_cores, write_json


def run(run: Run, mark: str, policies: dict[str, str]) -> dict:
    """Stage `evaluate`: policies maps a label to a checkpoint name; held-out starts, paired.

    Finished episodes are kept in evaluation/<label>.json, so an interrupted evaluation goes on.
    """
    config = run.config
    last = config.posttrain.rounds - 1
    starts = held_out_starts(run)
    reflector = store.load("reflector", run.path("checkpoints", f"reflector-{last}.safetensors"))
    outcomes = {}
    for label, name in policies.items():
        policy = store.load("policy", run.path("checkpoints", f"{name}.safetensors"))
        path = run.path("evaluation", f"{label}.json")
        stored = read_json(path) or {}
        done = stored["episodes"] if stored.get("mark") == mark else []
        have = {(e["task"], e["start"], e["seed"]) for e in done}
        left = [s for s in starts if (s.task, s.index, s.seed) not in have]

        def keep(episodes: list[dict], path=path, done: tuple[dict, ...] = tuple(done)) -> None:
            write_json(path, {"mark": mark, "episodes": [*done, *episodes]})

        more = evaluate_policy(run, policy, left, f"evaluate {label}", reflector, keep)
        outcomes[label] = sorted([*done, *more], key=lambda e: (e["task"], e["start"], e["seed"]))
    return {"outcomes": outcomes}


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
) -> list[dict]:
    """One deterministic episode per start: task, start, seed, success, steps and, with a
    reflector, success_no_oracle and stop_step.

    keep is called with all outcomes so far from time to time.
    """
    if not starts:
        return []
    device = policy.proprio_mean.device
    policy = policy.cpu().eval()
    env = make_env(run.config, terminate="success" if reflector is None else "never")
    ruling = _Ruling(env, reflector.cpu()) if reflector else None
    outcomes: list[dict] = []
    use_cores(1)  # the simulators need the cores
    try:
        with progress.bar(len(starts), label) as bar:

            def finish(episode: int, info: dict) -> None:
                start = starts[episode]
                outcome = {
                    "task": start.task,
                    "start": start.index,
                    "seed": start.seed,
                    "success": bool(info["success"]),
                    "steps": int(info["success_step"] if info["success"] else info["steps"]),
                }
                if ruling is not None:
                    outcome |= ruling.outcome(episode, outcome)
                outcomes.append(outcome)
                bar.advance(success=sum(o["success"] for o in outcomes) / len(outcomes))
                if keep is not None and len(outcomes) % 10 == 0:
                    keep(outcomes)

            rollout(
                env,
                policy,
                starts,
                seeds=[0] * len(starts),
                noise=None,
                stop=ruling.stop if ruling else None,
                on_finish=finish,
                on_step=ruling.note if ruling else None,
                images=False,
            )
    finally:
        env.close()
        policy.to(device)
        use_cores()
    if keep is not None:
        keep(outcomes)
    return outcomes


class _Ruling:
    """The reflector's verdicts during real episodes, which go on until both judges have spoken."""

    def __init__(self, env, reflector: Reflector) -> None:
        self.judge = Judge(reflector, env.num_envs)
        self.threshold = float(reflector.threshold)
        self.episode = np.full(env.num_envs, -1)
        self.verdicts: dict[int, dict] = {}

    def note(self, rows: np.ndarray, before: dict, action, after: dict, info: dict) -> None:
        """Show the reflector the frames before the first and after every chunk."""
        fresh = rows != self.episode
        if fresh.any():
            self.judge.reset(torch.as_tensor(fresh))
            self._watch(before, fresh & (rows >= 0))
            self.episode = rows.copy()
        live = rows >= 0
        reward = self._watch(after, live).numpy()
        for row in np.flatnonzero(live & (reward > self.threshold)):
            self.verdicts.setdefault(
                int(rows[row]),
                {
                    "success_no_oracle": bool(info["success"][row]),
                    "stop_step": int(info["steps"][row]),
                },
            )

    def _watch(self, view: dict, rows: np.ndarray) -> torch.Tensor:
        return self.judge.watch(
            view["image"], view["proprio"], view["instruction"], torch.as_tensor(rows)
        )

    def stop(self, observation: dict, info: dict, live: np.ndarray) -> np.ndarray:
        """Rows on which both the benchmark and the reflector have spoken."""
        spoken = np.array([int(e) in self.verdicts for e in self.episode])
        return live & spoken & info["success"]

    def outcome(self, episode: int, with_oracle: dict) -> dict:
        """Without the oracle an episode the reflector never ends runs to the last step."""
        never = {"success_no_oracle": with_oracle["success"], "stop_step": None}
        return self.verdicts.get(episode, never)
