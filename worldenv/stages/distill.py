"""Distil the world simulator to the few passes a frame that post-training can afford.

Optional (`distill.steps`, `distill.self_forcing_steps`). The teacher is the round's trained
simulator in `distill.teacher_steps` passes; see `models.distillation` for what is learned. Where
this stage runs, all later ones imagine in its world; the next round's simulator goes on from the
teacher. The record says what was reached on held-out episodes, before and after each part.
"""

from functools import partial

from torch import Tensor

from worldenv.data.windows import FrameSequence, FrameWindows, chunk_sequences
from worldenv.models.distillation import distillation_loss
from worldenv.runtime import sharding
from worldenv.runtime.seeds import derive
from worldenv.stages import fidelity, store, training
from worldenv.stages.replay import replay
from worldenv.stages.run import Run, Stage, data_up_to
from worldenv.stages.simulator import balanced, training_episodes

HORIZONS = ("1", "8")  # chunks ahead between which a closed loop's drift is measured


def run(run: Run, mark: str, number: int) -> dict:
    """Stage `distill-N`: writes checkpoints/distill-N.safetensors."""
    config, part = run.config, run.config.distill
    path = run.path("checkpoints", f"simulator-{number}.safetensors")
    teacher, student = (store.load("simulator", path, run.device) for _ in range(2))
    teacher.requires_grad_(False)
    student = sharding.shard(student, "simulator" in config.fsdp)
    sequences = chunk_sequences(training_episodes(run, number), config.env.chunk)
    weights = balanced(sequences) if config.simulator.balance else None
    windows = FrameWindows(sequences, part.frames + 1, weights, padded=False).to(run.device)
    real = fidelity.held_out(run, number)
    steps, seed = config.sampling_steps(number), derive(config.seed, "distill", number)
    many = replay(teacher, real, part.teacher_steps, seed)
    reached = {"teacher": measure(real, many, many)}
    reached["before"] = measure(real, replay(teacher, real, steps, seed), many)

    size = training.shard_size(run, part.batch)
    distilled = partial(
        distillation_loss, student, teacher, steps=steps, refine=part.teacher_steps // steps
    )

    def loss_at(
        batches: training.Batches, own: bool, step: int, shard: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        g, batch = batches(step, shard)
        return distilled(batch, g, own=own)

    tails = {}
    phases = {"warm_up": part.steps, "self_forcing": part.self_forcing_steps}
    names = dict(zip(phases, logs("", number)[1:], strict=True))
    for phase, count in phases.items():
        if count:
            name = names[phase]
            batches = training.Batches(windows, size, count, config.seed, name)
            loss = partial(loss_at, batches, phase == "self_forcing")
            tails[phase] = training.train(
                run, name, mark, student, loss, steps=count, lr=part.lr, ema=True
            )
            with sharding.whole(student) as world:
                reached[phase] = measure(real, replay(world, real, steps, seed), many)
    path = run.path("checkpoints", f"distill-{number}.safetensors")
    store.save("simulator", sharding.gathered(student), path, run.config.env)
    for name in names.values():  # only now: whoever is stopped in the second begins there
        training.finish(run, name)
    _log(run, f"distill-{number}", reached)
    given = {"sampling_steps": steps, "teacher_steps": part.teacher_steps, "episodes": len(real)}
    return {**given, "reached": reached, **tails}


def logs(name: str, number: int) -> tuple[str, ...]:
    """What the stage is called in the metrics: its measurements, and its two trainings."""
    return (name, f"warm-up-{number}", f"self-forcing-{number}")


STAGE = Stage(
    "distill",
    run,
    settings=lambda config, n: (config.distill, config.sampling_steps(n)),
    needs=lambda config, n: (*data_up_to(n), f"simulator-{n}"),
    makes=("checkpoints/distill-{n}.safetensors",),
    logs=logs,
    wanted=lambda config: config.distill.on and config.learned,
)


def measure(
    real: list[FrameSequence], imagined: list[FrameSequence], many: list[FrameSequence]
) -> dict:
    """How near imagined replays are to real episodes and to the teacher's replays `many` of the
    same noise, by chunks ahead; the decibels lost between one and eight (`drift_db`); and how sharp
    they are: differences of neighbouring pixels over those of real frames (1: as sharp)."""
    errors = fidelity.horizon_errors(real, imagined)
    psnr = errors["psnr_per_horizon"]
    known = all(h in psnr for h in HORIZONS)
    edges = [sum(map(_edges, frames)) for frames in (imagined, real)]
    return {
        "psnr_per_horizon": psnr,
        "eef_error_cm_per_horizon": errors["eef_error_cm_per_horizon"],
        "psnr_to_teacher_per_horizon": fidelity.horizon_errors(many, imagined)["psnr_per_horizon"],
        "drift_db": round(psnr[HORIZONS[0]] - psnr[HORIZONS[1]], 3) if known else None,
        "sharpness": round(edges[0] / edges[1], 4),
    }


def _edges(sequence: FrameSequence) -> float:
    """Summed over a sequence's frames, the first one, which is given, left out."""
    x = sequence.images[1:].float()
    return float(x.diff(dim=-2).abs().sum() + x.diff(dim=-3).abs().sum())


def _log(run: Run, name: str, reached: dict[str, dict]) -> None:
    run.logger.rewind(name, 0)
    for horizon in reached["teacher"]["psnr_per_horizon"]:
        values = {f"psnr_{arm}": r["psnr_per_horizon"][horizon] for arm, r in reached.items()}
        run.logger.log(name, int(horizon), **values)
