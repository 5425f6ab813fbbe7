"""Rollouts of post-training in the benchmark itself: what a learned world is compared with.

The same groups, rewards and updates (`posttrain.world` "real") with physics in the world's place: G
episodes from each start, which differ by their actions alone, rewarded by the benchmark's word.
All of them are real, so there are few; and none begins in mid-episode, as imagined ones can.
"""

from worldenv.rl.rollout import Trajectories, join
from worldenv.rl.update import Learner
from worldenv.runtime import progress
from worldenv.runtime.seeds import derive
from worldenv.stages.collect import exploration_start
from worldenv.stages.reality import Watcher
from worldenv.stages.run import Run


class _Counting(Watcher):
    """Shows how many episodes are over, and how many of them succeeded."""

    def __init__(self, bar: progress.Bar) -> None:
        self.bar, self.won = bar, 0

    def finish(self, episode: int, info: dict) -> None:
        self.won += bool(info["success"])
        self.bar.advance(successes=self.won)


def real_groups(run: Run, learner: Learner, key: tuple[int, ...]) -> Trajectories:
    """G consecutive real episodes from each of `contexts` starts, the tasks taking turns.

    key: (round, iteration, draw) of this draw, the last left out where it is 0. The starts are
    those that the stage explore would begin with, each used once.
    """
    config, rl, tasks = run.config, run.config.posttrain, run.config.env.tasks
    number, step, draw = (*key, 0)[:3]
    first = (step * (1 if rl.critic else rl.draws) + draw) * rl.contexts
    pairs = [(c, n) for c in range(rl.contexts) for n in range(rl.group)]
    starts = [
        exploration_start(config, tasks[k % len(tasks)], number, k // len(tasks))
        for k in (first + c for c, _ in pairs)
    ]
    device = next(learner.policy.parameters()).device
    with progress.bar(len(starts), f"real episodes {number}.{step}") as bar:
        counting = _Counting(bar)
        try:
            done = run.reality.roll_out(
                learner.policy.to(run.acting),
                starts,
                lambda env: counting,
                seeds=[derive(config.seed, "action", *key, c, n) for c, n in pairs],
                noise=learner.noise,
                terminate="success",
                images=True,
                features=learner.features,
            )
        finally:
            learner.policy.to(device)
    return join(done).to(run.device)
