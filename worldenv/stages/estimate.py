"""How long a run will take on this machine, from a calibration of a few seconds.

A step of each model and a batch of imagined frames are timed on all threads, at the configuration's
own sizes on random pictures, and a few chunks of the real benchmark; the rest is arithmetic.
Fetching batches and writing files, a twentieth of the profiled run, are left out (results/profile).
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from worldenv.config import Config
from worldenv.data.embodiment import Embodiment
from worldenv.models.policy import Policy
from worldenv.models.reflector import Reflector
from worldenv.models.simulator import Simulator
from worldenv.runtime import parallel
from worldenv.runtime.seeds import generator
from worldenv.stages import store
from worldenv.stages.reality import Reality

LENGTH = 0.8  # of max_chunks that an episode lasts, on average
IMAGINED = 0.6  # of max_chunks: contexts begin in mid-episode, and some are drawn twice


@dataclass(frozen=True)
class Costs:
    """Seconds on all threads of what a run consists of."""

    sample: float  # of imitation
    window: float  # a step of the simulator's training
    judged: float  # a step of the reflector's
    frame: float  # imagined, acted on and judged, in one row
    chunk: float  # of a real episode, decided on and executed


def calibrate(config: Config, reality: Reality) -> Costs:
    """Time the models of a configuration, on the CPU, and its benchmark."""
    policy, simulator = store.build("policy", config), store.build("simulator", config)
    reflector = store.build("reflector", config)
    trained = config.simulator.kind != "wovr"
    n = parallel.SHARDS
    rows = max(1, config.posttrain.rows // n)
    samples, windows, judged = (
        part.batch // n for part in (config.sft, config.simulator, config.reflector)
    )
    imagination = [lambda: imagine(simulator, reflector, policy, config, rows)] * n
    return Costs(
        _step(policy, lambda: policy_loss(policy, samples)) / config.sft.batch,
        _step(simulator, lambda: simulator_loss(simulator, windows)) if trained else 0.0,
        _judged(reflector, judged),
        _seconds(lambda: parallel.run(imagination)) / (rows * n),
        reality.pace(policy),
    )


def estimate(config: Config, cost: Costs) -> dict[str, float]:
    """Seconds that each stage of a run will take on this machine's threads, in their order."""
    sft, sim, ref, rl = config.sft, config.simulator, config.reflector, config.posttrain
    tasks, chunks = len(config.env.tasks), LENGTH * config.max_chunks
    real = chunks * cost.chunk
    decisions = rl.contexts * rl.group * IMAGINED * config.max_chunks
    iteration = decisions * (cost.frame + rl.epochs * cost.sample)
    if not config.learned:
        episode = real + chunks * rl.epochs * cost.sample
        iteration = rl.contexts * rl.group * episode
    held_out = (config.evaluate.starts[1] - config.evaluate.starts[0]) * tasks
    scripted = 0 if config.data.paths else config.collect.demonstrations
    stages = {
        "demonstrations": scripted * tasks * 2 * real,
        "sft": sft.steps * sft.batch * cost.sample,
    }
    explored = 0
    for n in range(rl.rounds):
        new = tasks * (config.collect.refresh_episodes if n else config.collect.episodes)
        explored += new
        iterations = rl.refresh_iterations if n else rl.iterations
        checks = iterations // rl.real_check_every + 1 if rl.real_check_every else 0
        checks -= bool(checks and n and not rl.restart)  # the first one's outcome is known
        steps = (sim.refresh_steps, ref.refresh_steps) if n else (sim.steps, ref.steps)
        clips = 0 if n else config.distill.clip_steps
        world = {
            f"explore-{n}": new * real,
            f"simulator-{n}": (steps[0] + clips) * cost.window,
            # Replays of all episodes to train on, and new ones to calibrate the threshold.
            f"reflector-{n}": steps[1] * cost.judged + (explored + 2 * new) * chunks * cost.frame,
        }
        if config.distill.on:
            world[f"distill-{n}"] = _distillation(config) * cost.window
        tuning = checks * rl.real_check_episodes * tasks * real
        stages |= {
            **(world if config.learned else {}),
            f"posttrain-{n}": iterations * iteration + tuning,
        }
    passes = 2 * (1 + config.evaluate.sampled)  # of both policies
    stages["evaluate"] = passes * held_out * len(config.evaluate.fixture_seeds) * real
    return stages


def _distillation(config: Config) -> float:
    """The stage distill, in steps of the simulator's training: those make six passes over their
    frames (two of history, one of their own, three forward and backward)."""
    part, sim = config.distill, config.simulator
    frames = part.batch * part.frames / (sim.batch * sim.frames)
    return (part.steps + part.self_forcing_steps) * frames * (part.teacher_steps + 6) / 6


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


def _judged(reflector: Reflector, batch: int) -> float:
    """A step of a reflector's training. A head learns from kept features in no time: what those
    cost is in the price of a frame."""
    if reflector.frozen:
        return 0.0
    return _step(reflector, lambda: reflector_loss(reflector, batch))


def _step(module: nn.Module, loss: Callable[[], Tensor]) -> float:
    """Of a training step in shards, each of this loss."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    pieces = [lambda: (loss(), None)] * parallel.SHARDS
    return _seconds(lambda: parallel.gradients(parameters, pieces))


def _seconds(work: Callable[[], object]) -> float:
    """Of the fastest of a few, after one that warms up."""
    work()
    best, begun = float("inf"), time.perf_counter()
    for _ in range(3):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
        if time.perf_counter() - begun > 1.0:
            break
    return best


def _pictures(robot: Embodiment, *shape: int) -> Tensor:
    shape = (*shape, robot.V, robot.image_size, robot.image_size, 3)
    return torch.randint(256, shape, generator=generator("pictures")).byte()


def policy_loss(policy: Policy, batch: int) -> Tensor:
    """Of imitation, on B random samples."""
    robot = policy.embodiment
    seen = {"image": _pictures(robot, batch), "proprio": torch.zeros(batch, robot.P)}
    outputs = policy({**seen, "instruction": ["go"] * batch})
    return sum(x.square().mean() for x in outputs if x is not None)


def simulator_loss(simulator: Simulator, batch: int) -> Tensor:
    """Of the simulator, on B random windows whose history is its own."""
    robot, frames = simulator.embodiment, simulator.config.frames + 1
    windows = {
        "image": _pictures(robot, batch, frames),
        "reference": _pictures(robot, batch),
        "proprio": torch.zeros(batch, frames, robot.P),
        "action": torch.zeros(batch, frames, robot.chunk, robot.A),
        "previous_proprio": torch.zeros(batch, robot.P),
        "previous_action": torch.zeros(batch, robot.chunk, robot.A),
    }
    return simulator.loss(windows, generator("windows"), True)[0]


def reflector_loss(reflector: Reflector, batch: int) -> Tensor:
    """Of the reflector, on B random pairs of frames."""
    robot, words = reflector.embodiment, ["go"] * batch
    proprio = torch.zeros(batch, 2, robot.P)
    return reflector(_pictures(robot, batch, 2), proprio, words).square().mean()


@torch.no_grad()
def imagine(
    simulator: Simulator, reflector: Reflector, policy: Policy, config: Config, rows: int
) -> None:
    """One decision, frame and verdict in each of B imagined episodes."""
    state, live = simulator.start(rows), torch.ones(rows, dtype=torch.bool)
    action = torch.zeros(rows, *simulator.chunk)
    image, proprio = simulator.step(state, action, config.sampling_steps(0), live.numpy())
    policy({"image": image, "proprio": proprio, "instruction": ["go"] * rows})
    reflector.onlooker(rows).watch(image, proprio, ["go"] * rows, live)
