"""Scripted demonstrations: a plan's actions, executed through noise, in one real episode.

A plan looks at the world it moves (places that no policy sees) and yields clean actions, each for
the present state. What is executed bears a disturbance that drifts; what is kept as the label does
not. Of several attempts the last one counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from worldenv.envs.server import Simulator
    from worldenv.envs.start import Start


@dataclass(frozen=True)
class ExpertResult:
    """One episode. actions [T, A] float32: the clean labels; executed [T, A]: with noise, clipped.

    attempt: which one it was, 0 = the first.
    """

    success: bool
    steps: int
    actions: np.ndarray
    executed: np.ndarray
    attempt: int = 0


Plan = Callable[[int], Iterator[np.ndarray]]
"""From an attempt's number, after the reset, to its clean actions [A]."""
Record = Callable[[dict[str, np.ndarray], np.ndarray, np.ndarray], None]


def demonstrate(
    simulator: Simulator,
    start: Start,
    plan: Plan,
    kinds: Sequence[str],
    *,
    noise: float = 0.0,
    rng: np.random.Generator,
    max_steps: int = 220,
    attempts: int = 1,
    record: Record | None = None,
) -> ExpertResult:
    """Resets `simulator` to `start` and follows `plan`; the last attempt's episode is returned.

    kinds: what each number of an action does (`Embodiment.action`).
    noise: std of the temporally correlated disturbance of executed actions, relative to the size of
        the commanded motion (0.25 gives useful diversity); labels stay clean.
    attempts: how many plans to try, each from a fresh reset of the same start, until one succeeds.
    record: called before each step with (observation, clean action [A], executed action [A]);
        rendering makes it slow. Of several attempts, the last `steps` calls are the result's.
    The episode ends when the goal first holds, with the plan, or after max_steps.
    """
    for attempt in range(attempts):
        simulator.reset(start)
        actions = islice(plan(attempt), max_steps)
        result = _execute(simulator, actions, kinds, noise, rng, attempt, record)
        if result.success:
            break
    return result


def _execute(
    simulator: Simulator,
    plan: Iterator[np.ndarray],
    kinds: Sequence[str],
    noise: float,
    rng: np.random.Generator,
    attempt: int,
    record: Record | None,
) -> ExpertResult:
    """Steps the plan's actions through the noise until success or its end."""
    moves, turns = ([i for i, k in enumerate(kinds) if k == kind] for kind in ("translate", "turn"))
    clean_actions, executed_actions = [], []
    drift = np.zeros(len(moves))
    success = False
    for clean in plan:
        # Noise in proportion to the motion: constant noise would keep the hand from settling.
        size = np.abs(clean[moves]).max(initial=0)
        drift = 0.8 * drift + 0.6 * noise * rng.standard_normal(len(moves))
        executed = clean.copy()
        executed[moves] += size * drift
        executed[turns] += size * 0.2 * noise * rng.standard_normal(len(turns))
        executed = np.clip(executed, -1.0, 1.0).astype(np.float32)
        if record is not None:
            record(simulator.observe(), clean, executed)
        success = simulator.step(executed)
        clean_actions.append(clean)
        executed_actions.append(executed)
        if success:
            break
    shape = (-1, len(kinds))
    return ExpertResult(
        bool(success),
        len(clean_actions),
        np.array(clean_actions, dtype=np.float32).reshape(shape),
        np.array(executed_actions, dtype=np.float32).reshape(shape),
        attempt,
    )
