"""Above which reward an episode has succeeded: one threshold in imagination, another in reality.

Imagined frames: simulators differ in how readily they imagine success, and the real outcomes of the
explored episodes say how often it should be found (`imagined`).

Real frames: where the benchmark does not say when to stop, an episode goes on for `GRACE` chunks
after its first frame above the threshold, then stops. Too early, and a success is lost (most false
alarms come one chunk before success: results/thresholds); never, and steps are. So the share of
false stops comes first, and that of missed successes second (`real`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import scipy
import torch
from torch import Tensor

from worldenv.data.windows import FrameSequence, chunk_sequences
from worldenv.envs.imagined import first_frames, imagined_envs
from worldenv.envs.start import Start
from worldenv.models.policy import Policy
from worldenv.models.reflector import NOT_CALIBRATED, Reflector
from worldenv.models.simulator import Simulator
from worldenv.rl.rollout import rollout_shards
from worldenv.runtime.errors import UserError
from worldenv.runtime.seeds import derive
from worldenv.stages.collect import exploration_noise, load_round
from worldenv.stages.measures import by_task
from worldenv.stages.run import Run

GRACE = 1  # chunks
FALSE_STOPS = 0.025  # of the episodes trained on; others had twice as many, and 5% is wanted
MISSED = 0.10  # of successes
BOUNDS = (0.001, 0.999)  # as `ranges.Threshold`
CALIBRATION_EPISODES = 2  # imagined from every explored start
RESAMPLES = 1000


def imagined(
    run: Run, number: int, policy: Policy, simulator: Simulator, reflector: Reflector
) -> dict:
    """The eta at which the policy that explored succeeds in imagination, from the same first frames
    and with the same noise, as often as it did in reality; 95% interval over those episodes."""
    config = run.config
    _, earlier, _ = load_round(run, number - 1)
    explored = load_round(run, number)[1][len(earlier) :]
    contexts = first_frames(chunk_sequences(explored, config.env.chunk))
    envs = imagined_envs(
        simulator.for_generation(),
        reflector,
        contexts,
        config.posttrain.rows,
        max_chunks=config.max_chunks,
        sampling_steps=config.sampling_steps(number),
        terminate=False,
    )
    keys = [(c, n) for c in range(len(contexts)) for n in range(CALIBRATION_EPISODES)]
    starts = [Start(0, c, derive(config.seed, "calibration", number, c, n)) for c, n in keys]
    seeds = [derive(config.seed, "calibration action", number, c, n) for c, n in keys]
    noise = exploration_noise(config, policy)
    episodes = rollout_shards(envs, policy.eval(), starts, seeds=seeds, noise=noise, images=False)
    top = torch.zeros(len(starts), device=episodes.reward.device)
    top.scatter_reduce_(0, episodes.episode, episodes.reward, "amax")
    won = np.array([context.won for context in contexts])
    tops = top.cpu().view(len(contexts), CALIBRATION_EPISODES)
    eta = threshold_at(top, sum(e.success for e in explored) / len(explored))
    around = interval(
        len(contexts),
        lambda rows: threshold_at(tops[rows].flatten(), float(won[rows].mean())),
        (0.5, 0.99),
        derive(config.seed, "threshold interval", number),
    )
    # One eta serves all tasks: how well, one imagined episode a start says.
    success = {"real": won.tolist(), "imagined": (tops[:, 0] > eta).tolist()}
    return {
        "threshold": eta,
        "threshold_interval": around,
        "success_by_task": by_task([context.task for context in contexts], success),
    }


def threshold_at(top: Tensor, rate: float) -> float:
    """The threshold that a share `rate` of the highest rewards `[M]` exceed, within [0.5, 0.99].

    A world harsher than reality is not made up for by believing what is likelier no success.
    """
    return float(torch.quantile(top, 1 - rate).clamp(0.5, 0.99))


@dataclass(frozen=True)
class Peaks:
    """Of N real episodes: the highest reward at which a stop would be false (in a failure all are),
    the highest of all frames, and whether it succeeded. The first frame is not judged."""

    false: np.ndarray  # [N]
    top: np.ndarray  # [N]
    won: np.ndarray  # [N] bool

    def __len__(self) -> int:
        """Number of episodes N."""
        return len(self.won)

    def __getitem__(self, rows: np.ndarray) -> "Peaks":
        """Those of some episodes."""
        return Peaks(self.false[rows], self.top[rows], self.won[rows])

    def rates(self, eta: float) -> tuple[float, float | None]:
        """Share of the episodes that are stopped without having succeeded, and of the successes
        that are never noticed (None without successes)."""
        missed = float((self.top[self.won] <= eta).mean()) if self.won.any() else None
        return float((self.false > eta).mean()), missed


def peaks(
    scores: Sequence[Tensor], sequences: Sequence[FrameSequence], grace: int = GRACE
) -> Peaks:
    """What thresholds are put by, from the rewards `[F]` of each episode's frames."""
    false, top, won = [], [], []
    for score, sequence in zip(scores, sequences, strict=True):
        reward = score[1:].double().numpy()
        reached = sequence.success[1:].numpy()
        # By the time of the stop; at the last frame there is no time left.
        late = reached[np.minimum(np.arange(len(reached)) + grace, len(reached) - 1)]
        false.append(reward[~late].max(initial=0.0))
        top.append(reward.max(initial=0.0))
        won.append(bool(reached.any()))
    return Peaks(np.array(false), np.array(top), np.array(won))


def stopping(found: Peaks, false_stops: float = FALSE_STOPS, missed: float = MISSED) -> float:
    """The threshold on real frames, within `BOUNDS`.

    Of `low`, the lowest with at most that share of false stops, and `high`, the highest with at
    most that share of missed successes, it is the middle, as far as possible from either failing;
    where both cannot be had, low: a false stop loses a success, a missed one some steps. Where no
    success has been seen, one may get any reward: high is 1.
    """
    low = exceeded_by(found.false, false_stops)
    tops = found.top[found.won]
    high = -exceeded_by(-tops, missed) if len(tops) else 1.0
    return float(np.clip((low + max(low, high)) / 2, *BOUNDS))


def exceeded_by(values: np.ndarray, share: float) -> float:
    """The lowest number that at most a share of `values` exceed."""
    return float(np.sort(values)[len(values) - 1 - int(share * len(values))])


def real(found: Peaks, seed: int) -> dict:
    """The threshold on real frames, its 95% interval over the episodes, and what it comes to on
    them: fewer mistakes than on others, which stages/fidelity.py measures."""
    eta = stopping(found)
    false_stops, missed = found.rates(eta)
    return {
        "real_threshold": eta,
        "real_threshold_interval": interval(
            len(found), lambda rows: stopping(found[rows]), BOUNDS, seed
        ),
        "real_episodes": len(found),
        "real_false_stop_rate": round(false_stops, 4),
        "real_missed_success_rate": None if missed is None else round(missed, 4),
    }


def interval(
    count: int,
    statistic: Callable[[np.ndarray], float],
    bounds: tuple[float, float],
    seed: int,
    resamples: int = RESAMPLES,
) -> list[float]:
    """95% percentile bootstrap over `count` episodes of a statistic of their indices `[count]`;
    of a single episode the bounds."""
    if count < 2:
        return [*bounds]
    found = scipy.stats.bootstrap(
        (np.arange(count),),
        statistic,
        vectorized=False,
        method="percentile",
        n_resamples=resamples,
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return [round(float(found.low), 4), round(float(found.high), 4)]


def of_reality(reflector: Reflector) -> float:
    """Its threshold on real frames. UserError if it was not calibrated on any."""
    eta = float(reflector.real_threshold)
    if eta == NOT_CALIBRATED:
        raise UserError(
            "reflector: expected a threshold calibrated on real frames, got none: without the "
            "benchmark's word it cannot say when a real episode ends. Run worldenv-train reflector "
            "with reflector.calibrate, or name a reflector that a run of this version has made."
        )
    if not 0 < eta < 1:
        raise UserError(
            f"reflector: real_threshold: expected a number above 0 and below 1, got {eta:g}. Run "
            "worldenv-train reflector, which calibrates it."
        )
    return eta
