"""Train the world simulator on demonstrations and policy episodes (World-Env section 3.3)."""

import copy
from collections import Counter

import torch
from torch import Tensor

from worldenv.config import Config
from worldenv.data.episode import Episode
from worldenv.data.windows import FrameSequence, FrameWindows, chunk_sequences
from worldenv.models.distillation import clip_loss, conversion_loss
from worldenv.models.simulator import World
from worldenv.models.tokenizer import AutoencoderTokenizer
from worldenv.runtime import sharding
from worldenv.runtime.seeds import derive, generator
from worldenv.stages import store, training
from worldenv.stages.collect import load_round
from worldenv.stages.run import Run, Stage, data_up_to


def run(run: Run, mark: str, number: int) -> dict:
    """Stage `simulator-N`: writes checkpoints/simulator-N.safetensors.

    Later rounds continue from the weights of the round before, on all episodes so far. WoVR's is
    taken as it is.
    """
    config, part, name = run.config, run.config.simulator, f"simulator-{number}"
    path = run.path("checkpoints", f"{name}.safetensors")
    episodes = training_episodes(run, number)
    sequences = chunk_sequences(episodes, config.env.chunk)
    weights = balanced(sequences) if part.balance else None
    windows = FrameWindows(sequences, part.frames + 1, weights, padded=False).to(run.device)
    simulator: World = training.begin(run, "simulator", number, episodes)
    if part.kind == "wovr":
        store.save("simulator", simulator, path)
        return {"windows": 0, "parameters": 0}
    teacher, reached = None, {}
    if not number:
        _train_tokenizer(run, mark, simulator, windows)
    simulator = sharding.shard(simulator, "simulator" in config.fsdp)
    if not number and config.distill.clip_steps:
        teacher, reached = _clip_teacher(run, mark, simulator, windows)
    steps = part.refresh_steps if number else part.steps
    begin_self_history = 0 if number else int(part.self_history_start * steps)

    size = training.shard_size(run, part.batch)
    transitions = training.shard_size(run, part.dynamics_batch)

    luck = derive(config.seed, "luck", part.luck) if part.luck else config.seed
    batches = training.Batches(windows, size, steps, luck, "simulator", number)

    def loss_at(step: int, shard: int) -> tuple[Tensor, dict[str, Tensor]]:
        g, batch = batches(step, shard)
        draw = torch.rand((), generator=generator(config.seed, "own history", number, step))
        own = step >= begin_self_history and float(draw) < part.self_history
        loss, metrics = simulator.loss(batch, g, own)
        motion = simulator.dynamics_loss(windows.transitions(g, transitions))
        loss, metrics["dynamics_loss"] = loss + motion, motion.detach()
        if teacher is not None and config.distill.clip_weight:
            g = generator(config.seed, "conversion", step, shard)
            taught = conversion_loss(simulator, teacher, batch, g)
            loss, metrics["conversion"] = (
                loss + config.distill.clip_weight * taught,
                taught.detach(),
            )
        return loss, metrics

    tail = training.train(run, name, mark, simulator, loss_at, steps=steps, lr=part.lr, ema=True)
    simulator = sharding.gathered(simulator)
    store.save("simulator", simulator, path, config.env)
    for log in ("clip", name):
        training.finish(run, log)
    parameters = sum(p.numel() for p in simulator.parameters())
    return {"windows": len(windows), "parameters": parameters, **tail, **reached}


STAGE = Stage(
    "simulator",
    run,
    settings=lambda config, n: (
        config.simulator,
        *store.digests(config.simulator),
        *_conversion(config, n),
    ),
    needs=lambda config, n: (*data_up_to(n), *((f"simulator-{n - 1}",) if n else ())),
    wanted=lambda config: config.learned,
    makes=("checkpoints/simulator-{n}.safetensors",),
    logs=lambda name, n: (name,) if n else (name, "tokenizer", "clip"),
)


def training_episodes(run: Run, number: int) -> list[Episode]:
    """What the simulator of a round may learn from."""
    demonstrations, explored, _ = load_round(run, number)
    return [*demonstrations, *explored] if run.config.simulator.explored else demonstrations


def balanced(sequences: list[FrameSequence]) -> list[float]:
    """Weights as if there were as many failures as successes, within each task; a task without
    either counts as much as any other."""
    kinds = [(s.task, bool(s.success.any())) for s in sequences]
    count, outcomes = Counter(kinds), Counter(task for task, _ in set(kinds))
    return [1 / (count[kind] * outcomes[kind[0]]) for kind in kinds]


def _conversion(config: Config, number: int) -> tuple:
    """Settings of the causal conversion, where there is one."""
    part = config.distill
    return () if number or not part.clip_steps else (part.clip_steps, part.clip_weight)


def _clip_teacher(
    run: Run, mark: str, simulator: World, windows: FrameWindows
) -> tuple[World, dict[str, float]]:
    """Train the simulator on whole clips first; a frozen copy of the result, and its metrics."""
    seed, size = run.config.seed, training.shard_size(run, run.config.simulator.batch)
    steps, lr = run.config.distill.clip_steps, run.config.simulator.lr
    batches = training.Batches(windows, size, steps, seed, "clip")

    def loss_at(step: int, shard: int) -> tuple[Tensor, dict[str, Tensor]]:
        g, batch = batches(step, shard)
        return clip_loss(simulator, batch, g)

    tail = training.train(run, "clip", mark, simulator, loss_at, steps=steps, lr=lr, ema=True)
    with sharding.whole(simulator) as world:
        teacher = copy.deepcopy(world).requires_grad_(False)
    return teacher, {f"clip_{key}": value for key, value in tail.items()}


def _train_tokenizer(run: Run, mark: str, simulator: World, windows: FrameWindows) -> None:
    """Fit the autoencoder tokenizer, if the configuration names it, and freeze it."""
    tokenizer, config = simulator.tokenizer, run.config
    if not isinstance(tokenizer, AutoencoderTokenizer):
        return
    tokenizer.requires_grad_(True)

    size = training.shard_size(run, config.simulator.batch)
    steps = config.simulator.tokenizer_steps
    batches = training.Batches(windows, size, steps, config.seed, "tokenizer")

    def loss_at(step: int, shard: int) -> tuple[Tensor, dict[str, Tensor]]:
        _, batch = batches(step, shard)
        loss = tokenizer.loss(batch["image"][:, -1])
        return loss, {"loss": loss.detach()}

    training.train(run, "tokenizer", mark, tokenizer, loss_at, steps=steps, lr=2e-3)
    training.finish(run, "tokenizer")
    tokenizer.requires_grad_(False)
