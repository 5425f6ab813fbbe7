"""What is alive in each stage, and when: the stages' code in bytes.

The sizes of pieces come from `stages.plan_costs`. On a CPU a batch is cut into shards that threads
share (`runtime.parallel`): those at work hold their activations, those that are done a gradient.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch

from worldenv.config import Config
from worldenv.runtime import parallel
from worldenv.stages import reality
from worldenv.stages.estimate import IMAGINED, LENGTH
from worldenv.stages.plan_costs import Costs, Line, Model
from worldenv.stages.plan_data import recorded

REPLAYED = 16  # sequences that are replayed side by side
KEPT = 0.1  # of what a step holds on a CPU: freed between steps, and not in one piece any more


@dataclass(frozen=True)
class Machine:
    """What is planned for."""

    device: torch.device
    memory: int  # bytes
    own: int  # bytes that the process, or CUDA, has for itself
    threads: int
    widened: bool  # whether frozen bfloat16 is multiplied in float32
    absent: bool = False  # whether it is a GPU that is not here
    ranks: int = 1  # that work together, each on such a device

    @property
    def shards(self) -> int:
        """Pieces of a batch."""
        return parallel.shards(self.device)

    @property
    def busy(self) -> int:
        """Pieces in work at a time."""
        return min(self.threads, self.shards)

    @property
    def cpu(self) -> bool:
        """Whether everything lies in one memory."""
        return self.device.type == "cpu"


@dataclass(frozen=True)
class Moment:
    """What is alive, by kind, bytes."""

    what: str
    parts: dict[str, int] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """All of it."""
        return sum(self.parts.values())


def highest(found: list[Moment]) -> Moment:
    """Of a stage's moments."""
    return max(found, key=lambda moment: moment.bytes)


def moments(config: Config, costs: Costs, here: Machine) -> dict[str, list[Moment]]:
    """Of every stage that computes on the device."""
    world = {
        "simulator": _simulator,
        **({"distill": _distill} if config.distill.on else {}),
        "reflector": _reflector,
    }
    learned = world if config.learned else {}
    stages = {"sft": _imitation, **learned, "posttrain": _posttrain}
    found = {name: list(of(config, costs, here)) for name, of in stages.items()}
    if here.cpu:
        found = {name: [_kept(moment, here) for moment in of] for name, of in found.items()}
        # From the first exploration on the benchmark's processes wait for more to do.
        beside = {"real benchmark": config.env.workers * reality.benchmark(config).process_bytes}
        for name in found.keys() - {"sft"}:
            found[name] = [replace(moment, parts=beside | moment.parts) for moment in found[name]]
    return found


def _kept(moment: Moment, here: Machine) -> Moment:
    """A moment with what the allocator keeps of earlier ones (`runtime.parallel` asks it to)."""
    kept = int(KEPT * (moment.bytes - here.own))
    return replace(moment, parts=moment.parts | {"kept by the allocator": kept})


def _imitation(config: Config, costs: Costs, here: Machine) -> Iterator[Moment]:
    sft, policy = config.sft, costs.policy
    pieces = max(here.shards, sft.batch // sft.micro_batch if sft.micro_batch else 0)
    line = costs.imitate(sft.batch // pieces)
    data = recorded(config)
    yield Moment(
        "a step",
        _held(here, policy=policy)
        | _step(here, line, sft.batch // pieces, pieces, policy.trained_bytes)
        # On a CPU beside the episodes that they are a copy of.
        | {"recorded frames": data.held(True) * _frame(config, costs) * (2 if here.cpu else 1)}
        | data.index(True),
    )


def _simulator(config: Config, costs: Costs, here: Machine) -> Iterator[Moment]:
    part, model = config.simulator, costs.simulator
    data = _windows(config, costs, here)
    if part.kind == "wovr":
        yield Moment("taken as it is", _held(here, simulator=model) | data)
        return
    size = part.batch // here.shards
    encode = costs.encode(size)
    if encode is not None:
        tokenizer = sum(p.nbytes for p in costs.world.tokenizer.parameters())
        own = _held(here, simulator=model) | data
        own["optimiser"] = 2 * tokenizer
        yield Moment("its autoencoder", own | _step(here, encode, size, here.shards, tokenizer, 0))
    line = costs.denoise(size, part.dynamics_batch // here.shards)
    teacher = {"teacher": model.state_bytes} if costs.clips else {}
    yield Moment(
        "a step",
        _held(here, simulator=model)
        | _step(here, line, size, here.shards, model.trained_bytes)
        | {"moving average": model.state_bytes}
        | teacher
        | data,
    )


def _distill(config: Config, costs: Costs, here: Machine) -> Iterator[Moment]:
    model = costs.simulator
    size = config.distill.batch // here.shards
    yield Moment(
        "a step",
        _held(here, simulator=model)
        | _step(here, costs.distil(size), size, here.shards, model.trained_bytes)
        | {"moving average": model.state_bytes, "teacher": model.state_bytes}
        | _windows(config, costs, here),
    )


def _reflector(config: Config, costs: Costs, here: Machine) -> Iterator[Moment]:
    part, model, judge = config.reflector, costs.reflector, costs.judge(config.posttrain.rows)
    size = part.batch // here.shards
    line = costs.learn(size)
    known = recorded(config)
    explored, frames = known.explored, known.held()
    # On a CPU episodes and sequences are copies.
    data = {"recorded frames": 2 * frames * _frame(config, costs)} if here.cpu else {}
    data |= known.index()
    if line is None:
        yield Moment("taken as it is", _held(here, reflector=model) | data)
    else:
        # With the padded batch as a third; replays come on top.
        imagined = explored * config.collect.record_every // config.env.chunk
        padded = int((known.demonstrated + explored + imagined) / LENGTH)
        count = padded * (not known.on_disk) + (2 * frames + imagined if here.cpu else 0)
        shown = {"recorded frames": count * _frame(config, costs)} | known.index()
        worlds = _worlds(config, costs, here, min(REPLAYED, config.posttrain.rows))
        yield Moment("replays", _held(here, simulator=costs.simulator) | worlds | shown)
        if judge.feature:
            seen = {"features": 2 * padded * judge.feature}
            work = {"activations": judge.watch(part.encode_batch)}
            yield Moment("features", _held(here, reflector=model) | work | shown | seen)
            shown = seen | data
        step = _step(here, line, size, here.shards, model.trained_bytes)
        yield Moment("a step", _held(here, reflector=model) | step | shown)
    if part.calibrate:
        everyone = _held(here, policy=costs.policy, simulator=costs.simulator, reflector=model)
        yield Moment("calibration", _imagine(config, costs, here, everyone) | data)


def _posttrain(config: Config, costs: Costs, here: Machine) -> Iterator[Moment]:
    rl, policy = config.posttrain, costs.policy
    world = {}
    if config.learned:
        world = {"simulator": costs.simulator, "reflector": costs.reflector}
    held = _held(here, policy=policy, **world)
    held["optimiser"] = 2 * policy.trained_bytes
    trained = policy.trained_bytes
    if rl.kl_weight:
        held["snapshot, reference"] = trained
    critic = 0
    if costs.critic is not None:
        critic = sum(p.nbytes for p in costs.critic.parameters())
        held["critic"] = 4 * critic  # weights, the last gradient, two moments
    if here.cpu and world:  # contexts are parts of sequences
        held["recorded frames"] = recorded(config).held() * _frame(config, costs)
        held |= recorded(config).index()
    decisions = rl.contexts * rl.group * config.max_chunks
    draws = 1 if rl.critic else rl.draws
    draw = decisions * costs.decision_bytes
    kept = {}
    if world:
        while_imagining = _imagine(config, costs, here, held) | {"gradients": trained}
        yield Moment("imagination", while_imagining | {"rollout buffer": draws * draw})
        kept = _worlds(config, costs, here, rl.rows, idle=True)
        kept["kept prefixes"] = rl.rows * costs.judge(-(-rl.rows // here.shards)).row
    # A recorder that ends holds its steps, their concatenation and that in order.
    ending = draw * (3 * here.busy + here.shards - here.busy) // here.shards
    copies = max(ending, 2 * draw) + (draws - 1) * draw
    if draws > 1:
        copies = max(copies, 2 * draws * draw)
    yield Moment("sorting", held | kept | {"gradients": trained, "rollout buffer": copies})
    buffer = {"rollout buffer": draws * draw}
    share = -(-min(rl.minibatch, decisions * draws) // here.shards)
    size = min(rl.micro_batch or share, share)
    pieces = here.shards * -(-share // size)
    step = _step(here, costs.improve(size), size, pieces, trained)
    before = {"snapshot, reference": held.get("snapshot, reference", 0) + 3 * trained}
    yield Moment("an update", held | kept | buffer | step | before)
    if costs.critic is not None:
        step = _step(here, costs.value(share), share, here.shards, critic, last=False)
        step["gradients"] += trained
        del step["optimiser"]
        yield Moment("the critic's", held | kept | buffer | step)


# ---------------------------------------------------------------- what stages have in common


def _held(here: Machine, **models: Model) -> dict[str, int]:
    """Models in memory, beside the process itself."""
    return {
        "the process": here.own,
        "weights, frozen": sum(m.frozen_bytes for m in models.values()),
        "weights, trained": sum(m.trained_bytes for m in models.values()),
    }


def _step(
    here: Machine, line: Line, size: int, pieces: int, trained: int, last: bool = True
) -> dict[str, int]:
    """Of a training step in `pieces` losses of `size` samples each; last: whether the step before
    has left its gradient."""
    several = pieces > here.shards
    gradients = here.shards + last + (2 * here.busy if several else 0)
    return {
        "optimiser": 2 * trained,
        "gradients": gradients * trained,
        "activations": here.busy * max(0, line.peak(size) - trained),
    }


def _worlds(
    config: Config, costs: Costs, here: Machine, rows: int, idle: bool = False
) -> dict[str, int]:
    """Of `rows` imagined rows; idle: between frames."""
    share = -(-rows // here.shards)
    found = costs.worlds(share, config.posttrain.sampling_steps)
    keeps = found.graphs and not here.cpu
    busy = 0 if idle and not keeps else here.busy
    return {
        "frame cache": rows * found.cache,
        "world state": rows * found.state,
        "VAE state": 0 if idle and not keeps else here.busy * share * found.vae,
        "activations of frames" if keeps else "activations": busy * found.frame.peak(share),
    }


def _imagine(config: Config, costs: Costs, here: Machine, held: dict[str, int]) -> dict[str, int]:
    """While a rollout's rows are imagined, acted in and judged, one after the other."""
    rows = config.posttrain.rows
    share = -(-rows // here.shards)
    judge = costs.judge(share)
    worlds = _worlds(config, costs, here, rows)
    others = here.busy * max(costs.act(share).peak(share), judge.watch(share))
    frame = worlds.get("activations", 0)
    return held | worlds | {"kept prefixes": rows * judge.row, "activations": max(others, frame)}


def _windows(config: Config, costs: Costs, here: Machine) -> dict[str, int]:
    """All frames so far as windows; on a CPU episodes and sequences are two copies more."""
    data = recorded(config)
    size = data.held() * _frame(config, costs) * (3 if here.cpu else 1)
    return {"recorded frames": size} | data.index()


def _frame(config: Config, costs: Costs) -> int:
    """Bytes of a recorded frame."""
    return costs.robot.V * config.env.image_size**2 * 3


def iteration_flops(config: Config, costs: Costs) -> dict[str, dict[str, float]]:
    """FLOPs of a step of each stage, and of an iteration of post-training, by what they are
    computed in."""
    policy = config.policy.precision if config.policy.large else "float32"
    simulator, rl = config.simulator, config.posttrain
    world = simulator.precision
    found: dict[str, dict[str, float]] = {}
    found["sft"] = {policy: config.sft.batch * costs.imitate(1).flops}
    trains = world if simulator.kind == "wan" else "float32"
    if config.learned and simulator.kind != "wovr":
        found["simulator"] = {trains: simulator.batch * costs.denoise(1, 1).flops}
    if config.learned and config.distill.on:
        found["distill"] = {trains: config.distill.batch * costs.distil(1).flops}
    learn = costs.learn(1) if config.learned else None
    if learn is not None:
        found["reflector"] = {"float32": config.reflector.batch * learn.flops}
    decisions = rl.contexts * rl.group * IMAGINED * config.max_chunks
    act, judge = costs.act(1).flops, costs.judge(1).flops
    frame = costs.worlds(1, rl.sampling_steps).frame.flops
    if not config.learned:  # physics is none of it
        frame, judge = 0.0, 0.0
    update = rl.epochs * costs.improve(1).flops
    if costs.critic is not None:
        update += rl.critic_epochs * costs.value(1).flops
    parts: dict[str, float] = {}
    seen = config.reflector.precision if config.reflector.kind != "small" else "float32"
    for kind, flops in ((world, frame), (policy, act + update), (seen, judge)):
        parts[kind] = parts.get(kind, 0.0) + decisions * flops
    found["posttrain"] = parts
    return found
