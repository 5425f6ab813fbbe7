"""How long a run will take on this machine, from a calibration of a few seconds.

A shard's gradient of each model and a batch of imagined frames are timed at the configuration's own
sizes on random pictures; the rest is arithmetic. The physics is not started for it: its cost
follows that of imitation by a ratio measured on two machines (results/profile).
Liberty: episodes are counted as if they used most of their time, so the estimate errs upward.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from worldenv.config import Config
from worldenv.models.layers import views_to_channels
from worldenv.models.policy import Policy
from worldenv.models.reflector import Judge, Reflector
from worldenv.models.simulator import Simulator
from worldenv.runtime import parallel
from worldenv.runtime.seeds import generator
from worldenv.stages import store

LENGTH = 0.8  # of max_chunks that an episode lasts, on average
# Chunks of 8 control steps with both cameras at 64 px, in gradients of the default policy on one
# sample (primitive pack; see results/profile).
REAL_CHUNK = 7.0


@dataclass(frozen=True)
class Costs:
    """Processor seconds on one thread of what a run consists of."""

    sample: float  # the policy's gradient, per sample
    window: float  # the simulator's, per shard of its batch
    judged: float  # the reflector's, per shard
    frame: float  # imagined, acted on and judged, per row


def calibrate(config: Config) -> Costs:
    """Time the models of a configuration, on the CPU."""
    policy, simulator = store.build("policy", config), store.build("simulator", config)
    reflector = store.build("reflector", config)
    n, rows = parallel.SHARDS, max(1, config.posttrain.rows // parallel.SHARDS)
    samples, windows, judged = (
        part.batch // n for part in (config.sft, config.simulator, config.reflector)
    )
    return Costs(
        _seconds(lambda: _gradient(policy, policy_loss(policy, config, samples))) / samples,
        _seconds(lambda: _gradient(simulator, simulator_loss(simulator, config, windows))),
        _seconds(lambda: _gradient(reflector, reflector_loss(reflector, config, judged))),
        _seconds(lambda: imagine(simulator, reflector, policy, config, rows)) / rows,
    )


def estimate(config: Config, cost: Costs) -> dict[str, float]:
    """Seconds that each stage of a run will take on this machine's threads, in their order."""
    shards, threads = parallel.SHARDS, min(parallel.threads(), parallel.SHARDS)
    sft, sim, ref, rl = config.sft, config.simulator, config.reflector, config.posttrain
    tasks, chunks = len(config.env.tasks), LENGTH * config.max_chunks
    frame, sample = cost.frame / threads, cost.sample / threads
    real = REAL_CHUNK * cost.sample * chunks / min(config.env.workers, parallel.threads())
    # Contexts begin in mid-episode; a critic is as large as the policy.
    decisions = rl.contexts * rl.group * 0.6 * chunks
    iteration = decisions * (frame + (2 if rl.critic else 1) * sample)
    held_out = (config.evaluate.starts[1] - config.evaluate.starts[0]) * tasks
    scripted = 0 if config.data.paths else config.collect.demonstrations
    stages = {
        "demonstrations": scripted * tasks * 2 * real,
        "sft": sft.steps * sft.batch * sample,
    }
    explored = 0
    for n in range(rl.rounds):
        new = tasks * (config.collect.refresh_episodes if n else config.collect.episodes)
        explored += new
        iterations = rl.refresh_iterations if n else rl.iterations
        checks = iterations // rl.real_check_every + 1 if rl.real_check_every else 0
        checks -= bool(checks and n and not rl.restart)  # the first one's outcome is known
        steps = (sim.refresh_steps, ref.refresh_steps) if n else (sim.steps, ref.steps)
        stages |= {
            f"explore-{n}": new * real,
            f"simulator-{n}": steps[0] * cost.window * shards / threads,
            # Replays of all episodes to train on, and new ones to calibrate the threshold.
            f"reflector-{n}": steps[1] * cost.judged * shards / threads
            + (explored + 2 * new) * chunks * frame,
            f"posttrain-{n}": iterations * iteration
            + checks * rl.real_check_episodes * tasks * real,
        }
    stages["evaluate"] = 2 * held_out * len(config.evaluate.fixture_seeds) * real
    return stages


def describe(stages: dict[str, float]) -> str:
    """One line: the whole, and the kinds of stage that take most of it."""
    kinds: dict[str, float] = {}
    for name, seconds in stages.items():
        kind = name.partition("-")[0]
        kinds[kind] = kinds.get(kind, 0.0) + seconds
    total = sum(kinds.values())
    long = [f"{k} {_minutes(v)}" for k, v in kinds.items() if v > max(30.0, 0.03 * total)]
    threads = parallel.threads()
    where = f"{threads} thread{'s' if threads > 1 else ''} of this machine"
    return f"about {_minutes(total)} on {where}" + (f": {', '.join(long)}" if long else "")


def _minutes(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds > 5400 else f"{max(1, round(seconds / 60))} min"


def _seconds(work: Callable[[], object]) -> float:
    """Processor time of the fastest of a few on one thread, after one that warms up: what a quiet
    machine takes."""
    work()
    best, begun = float("inf"), time.perf_counter()
    for _ in range(3):
        start = time.thread_time()
        work()
        best = min(best, time.thread_time() - start)
        if time.perf_counter() - begun > 0.5:
            break
    return best


def _pictures(config: Config, *shape: int) -> Tensor:
    size = config.env.image_size
    return torch.randint(256, (*shape, 2, size, size, 3), generator=generator("pictures")).byte()


def policy_loss(policy: Policy, config: Config, batch: int) -> Tensor:
    """Of imitation, on B random samples."""
    views = views_to_channels(_pictures(config, batch))
    mu, scale = policy.decode(views, torch.zeros(batch, 8), policy.words(["go"] * batch))
    return (mu + scale).square().mean()


def simulator_loss(simulator: Simulator, config: Config, batch: int) -> Tensor:
    """Of the simulator, on B random windows whose history is its own."""
    frames, chunk = config.simulator.frames + 1, config.env.chunk
    windows = {
        "image": _pictures(config, batch, frames),
        "reference": _pictures(config, batch),
        "proprio": torch.zeros(batch, frames, 8),
        "action": torch.zeros(batch, frames, chunk, 7),
        "previous_proprio": torch.zeros(batch, 8),
        "previous_action": torch.zeros(batch, chunk, 7),
    }
    return simulator.loss(windows, generator("windows"), True)[0]


def reflector_loss(reflector: Reflector, config: Config, batch: int) -> Tensor:
    """Of the reflector, on B random pairs of frames."""
    words = ["go"] * batch
    return reflector(_pictures(config, batch, 2), torch.zeros(batch, 2, 8), words).square().mean()


def _gradient(module: nn.Module, loss: Tensor) -> None:
    parameters = [p for p in module.parameters() if p.requires_grad]
    torch.autograd.grad(loss, parameters, allow_unused=True)


@torch.no_grad()
def imagine(
    simulator: Simulator, reflector: Reflector, policy: Policy, config: Config, rows: int
) -> None:
    """One decision, frame and verdict in each of B imagined episodes."""
    state, live = simulator.start(rows), torch.ones(rows, dtype=torch.bool)
    action = torch.zeros(rows, config.env.chunk, 7)
    image, proprio = simulator.step(state, action, config.sampling_steps(0), live.numpy())
    policy({"image": image, "proprio": proprio, "instruction": ["go"] * rows})
    Judge(reflector, rows).watch(image, proprio, ["go"] * rows, live)
