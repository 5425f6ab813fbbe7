"""How far to trust the learned world, measured on held-out episodes before any RL in it.

Per horizon: PSNR of replayed real actions against the real frames, beside copying the first frame,
and the end-effector's error. Outcomes: does the reflector say of an imagined replay what happened
in reality? Reflector on real frames: ROC, false stops. Whether that is enough to train in, the gate
says (gate.py), by the tasks that are trained in where they are not all.
"""

from collections.abc import Container

import torch
from torch import Tensor

from worldenv.data.windows import FrameSequence, chunk_sequences, from_first_step
from worldenv.models.reflector import Reflector
from worldenv.models.simulator import Simulator
from worldenv.report.statistics import roc_curve, wilson
from worldenv.runtime.errors import UserError
from worldenv.runtime.seeds import derive
from worldenv.stages import gate, measures, store, thresholds
from worldenv.stages.collect import load_round
from worldenv.stages.measures import HORIZONS, auc, by_task, decibels
from worldenv.stages.reflector import rewards, score
from worldenv.stages.replay import replay
from worldenv.stages.run import Run, Stage, data_up_to, world_of
from worldenv.stages.scene import World

STILL, FEW_LEADS = 8, (1, 4)  # what takes seconds; all of it, and more, is a trial's (trial.py)


def run(run: Run, mark: str, number: int) -> dict:
    """Stage `fidelity-N`: returns the measurements."""
    checkpoints = run.path("checkpoints")
    simulator: Simulator = store.load(
        "simulator", checkpoints / f"{world_of(run.config, number)}.safetensors", run.device
    )
    reflector: Reflector = store.load(
        "reflector", checkpoints / f"reflector-{number}.safetensors", run.device
    )
    measured = measure(run, number, simulator, reflector)
    tasks = gate.tasks(run, number)
    if 0 < len(tasks) < len(run.config.env.tasks):
        measured["trained_in"] = measure(run, number, simulator, reflector, tasks)
    for horizon, value in measured["psnr_per_horizon"].items():
        run.logger.log(f"fidelity-{number}", int(horizon), psnr=value)
    return measured


def measure(
    run: Run,
    number: int,
    simulator: Simulator,
    reflector: Reflector,
    tasks: Container[int] | None = None,
) -> dict:
    """The measurements of a world on the episodes held out up to a round, or on those of some
    tasks."""
    config, real = run.config, held_out(run, number, tasks)
    steps = config.sampling_steps(number)
    imagined = replay(simulator, real, steps, derive(config.seed, "fidelity", number))
    world = World(config, run.embodiment, simulator, reflector, real, number, imagined)
    return {
        "episodes": len(real),
        "sampling_steps": steps,
        **horizon_errors(real, imagined),
        **outcome_agreement(reflector, real, imagined),
        **world.frames(STILL),
        "event": {"placing": world.placings(FEW_LEADS)},
        "reflector": reflector_quality(reflector, real),
        "false_stops": false_stops(run, number, reflector, real, tasks),
    }


STAGE = Stage(
    "fidelity",
    run,
    settings=lambda config, n: (config.sampling_steps(n), config.posttrain.task_gap),
    needs=lambda config, n: (*data_up_to(n), world_of(config, n), f"reflector-{n}"),
    wanted=lambda config: config.learned,
)


def held_out(run: Run, number: int, tasks: Container[int] | None = None) -> list[FrameSequence]:
    """The round's episodes (of some tasks) kept from training, from their first steps. UserError if
    none."""
    _, _, episodes = load_round(run, number, tasks)
    if not episodes:
        raise UserError(
            "fidelity: no held-out episodes. Raise collect.episodes or collect.held_out."
        )
    return from_first_step(chunk_sequences(episodes, run.config.env.chunk))


def horizon_errors(real: list[FrameSequence], imagined: list[FrameSequence]) -> dict:
    """PSNR in dB over all views, the same for copying the first frame, eef error in cm."""
    psnr: dict[str, float] = {}
    copied: dict[str, float] = {}
    effector: dict[str, float] = {}
    for h in HORIZONS:
        pairs = [(r, i) for r, i in zip(real, imagined, strict=True) if len(r) > h]
        if not pairs:
            continue
        psnr[str(h)] = _psnr([_mse(i.images[h], r.images[h]) for r, i in pairs])
        copied[str(h)] = _psnr([_mse(r.images[0], r.images[h]) for r, _ in pairs])
        errors = [(i.proprio[h, :3] - r.proprio[h, :3]).norm() * 100 for r, i in pairs]
        effector[str(h)] = round(float(torch.stack(errors).mean()), 3)
    return {
        "psnr_per_horizon": psnr,
        "psnr_copy_per_horizon": copied,
        "eef_error_cm_per_horizon": effector,
    }


def outcome_agreement(
    reflector: Reflector,
    real: list[FrameSequence],
    imagined: list[FrameSequence],
) -> dict:
    """Do imagined replays end as the real episodes did, by the reflector's word?

    Flattering where later actions betray the outcome (a retry follows a miss): see closed_loop_gap.
    """
    top = [float(s.max()) for s in score(reflector, imagined)]
    truth = [bool(r.success.any()) for r in real]
    threshold = float(reflector.threshold)
    agreed = [(t > threshold) == y for t, y in zip(top, truth, strict=True)]
    return {
        "outcome_agreement": round(sum(agreed) / len(agreed), 4),
        "outcome_auc": auc(top, truth),
        "outcome_agreement_by_task": by_task([r.task for r in real], {"agreement": agreed}),
    }


def reflector_quality(reflector: Reflector, real: list[FrameSequence]) -> dict:
    """Frame-wise ROC on real frames, whether the highest reward of an episode tells its outcome,
    and by the threshold for real frames: the share of episodes that are stopped without having
    succeeded, that of successes that are never noticed.

    The threshold was put by the episodes trained on, so those held out may judge it.
    """
    eta, scores = thresholds.of_reality(reflector), score(reflector, real)
    frames = torch.cat(scores).tolist()
    labels = torch.cat([r.success for r in real]).tolist()
    found = thresholds.peaks(scores, real)
    false_stops, missed = found.rates(eta)
    successes = int(found.won.sum())
    curve = {}
    if 0 < sum(labels) < len(labels):
        fpr, tpr = roc_curve(frames, labels)
        curve = {"fpr": fpr.round(5).tolist(), "tpr": tpr.round(5).tolist()}
    return {
        "auc": auc(frames, labels),
        "episode_auc": auc(found.top.tolist(), found.won.tolist()),
        "false_stop_rate": round(false_stops, 4),
        "false_stop_interval": _wilson(false_stops, len(real)),
        "missed_success_rate": None if missed is None else round(missed, 4),
        "missed_success_interval": _wilson(missed, successes),
        "successes": successes,
        "episodes": len(real),
        "frames": len(frames),
        "roc": curve,
    }


def false_stops(
    run: Run,
    number: int,
    reflector: Reflector,
    real: list[FrameSequence],
    tasks: Container[int] | None = None,
) -> measures.Figure:
    """By the threshold for real frames, of all explored episodes (of some tasks). Those trained on
    are among them: a reflector that has learned from them makes few."""
    _, explored, _ = load_round(run, number, tasks)
    own = from_first_step(chunk_sequences(explored, run.config.env.chunk))
    scores = [*rewards(run, reflector, own), *score(reflector, real)]
    found = thresholds.peaks(scores, [*own, *real])
    return measures.rate((found.false > thresholds.of_reality(reflector)).tolist())


def _wilson(rate: float | None, count: int) -> list[float] | None:
    """95% interval of a share of `count`, None where there is no share."""
    if rate is None:
        return None
    around = wilson(round(rate * count), count)
    return [round(around.low, 4), round(around.high, 4)]


def _mse(a: Tensor, b: Tensor) -> float:
    return float(((a.float() - b.float()) / 255).square().mean())


def _psnr(errors: list[float]) -> float:
    return round(decibels(sum(errors) / len(errors)), 3)
