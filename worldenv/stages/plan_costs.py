"""Bytes and FLOPs of a configuration's work, piece by piece, before anything is built.

Every piece is the code that will run, a micro-batch of imitation, of an update, of a world's
training, a frame of a rollout, on models without weights (`models.blank`) and counted as
`runtime.costs` does. A piece is measured at its full size and at one sample; sizes between the two
are interpolated, which never says too little: what is alive grows by the same with every sample,
and where another moment becomes the highest, faster.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldenv.config import Config
from worldenv.models import blank
from worldenv.models.distillation import conversion_loss, distillation_loss
from worldenv.models.policy import ValueHead
from worldenv.models.published_sizes import image_text
from worldenv.models.simulator import World
from worldenv.models.tokenizer import AutoencoderTokenizer
from worldenv.rl.loss import imitation_loss, policy_loss
from worldenv.rl.noise import Noise, exploration
from worldenv.runtime.costs import Spent, measure
from worldenv.runtime.seeds import generator
from worldenv.stages.reality import embodiment
from worldenv.stages.reflector import _Pictures

INSTRUCTION = "pick up the black bowl between the plate and the ramekin and place it on the plate"
CONTEXT = 2  # frames that a world in the middle of an episode begins with
STREAMED = 4  # rows that videos are streamed for; more take as much more
_TOKENS = 256  # of an action


@dataclass(frozen=True)
class Model:
    """What is held of a model, in bytes and numbers."""

    source: str
    parameters: int
    trained: int  # of them
    frozen_bytes: int
    trained_bytes: int
    state_bytes: int  # of its state dict, which a moving average copies


@dataclass(frozen=True)
class Line:
    """A piece of work on 1..most samples."""

    most: int
    one: Spent
    all: Spent

    def peak(self, count: int) -> int:
        """Bytes alive at most."""
        return self._at(count, self.one.peak, self.all.peak)

    @property
    def flops(self) -> float:
        """Of a sample."""
        return self.all.flops / self.most

    def _at(self, count: int, one: int, most: int) -> int:
        share = (count - 1) / (self.most - 1) if self.most > 1 else 1.0
        return round(one + share * (most - one))


@dataclass(frozen=True)
class Worlds:
    """Imagined rows side by side."""

    frame: Line  # a step, or the contexts' frames if those need more
    cache: int  # bytes of a row
    state: int
    vae: int
    graphs: bool  # whether on a GPU a frame is a CUDA graph, which keeps its memory


@dataclass(frozen=True)
class Judge:
    """A reflector at work: bytes of its activations on a number of rows, what it keeps of a row,
    FLOPs of a judgement, bytes of a feature."""

    watch: Callable[[int], int]
    row: int
    flops: float
    feature: int = 0


class Costs:
    """Of one configuration and of those that differ from it in sizes of batches alone, smaller."""

    def __init__(self, config: Config, widened: bool) -> None:
        """widened: see `models.blank.policy`."""
        self.config, self.robot, self.widened = config, embodiment(config), widened
        self.net, source = blank.policy(config.policy, self.robot, widened)
        self.policy = weigh(self.net, source)
        self.world, source = blank.simulator(config.simulator, self.robot)
        self.simulator = weigh(self.world, source)
        rl = config.posttrain
        moves = self.robot.actions("translate")
        self.noise: Noise = exploration(self.net.distribution, rl, moves)
        self.critic: nn.Module | None = None
        if rl.critic:
            with torch.device("meta"):
                self.critic = ValueHead(self.net.feature_width)
        self._lines: dict[str, Line] = {}

    def line(self, name: str, most: int, work: Callable[[int], Callable[[], object]]) -> Line:
        """Measured once; later for as many samples or fewer."""
        if name not in self._lines or self._lines[name].most < most:
            every = measure(work(most))
            one = measure(work(1)) if most > 1 else every
            self._lines[name] = Line(most, one, every)
        return self._lines[name]

    # ------------------------------------------------------------ the policy

    def seen(self, count: int) -> dict:
        """An observation of `count` rows."""
        robot, size = self.robot, self.robot.image_size
        image = _meta(count, robot.V, size, size, 3, dtype=torch.uint8)
        return {
            "image": image,
            "proprio": _meta(count, robot.P),
            "instruction": [INSTRUCTION] * count,
        }

    def imitate(self, count: int) -> Line:
        """A loss of imitation on so many samples, and its gradient."""
        sft, robot = self.config.sft, self.robot

        def work(n: int) -> object:
            seen, noise = self.seen(n), _meta(robot.P)
            mu, scale = self.net.augmented(seen, generator("plan"), sft.shift, noise)
            target = self.net.normalise(_meta(n, robot.chunk, robot.A))
            return _gradient(self.net, imitation_loss(mu, scale, target, sft.scale_weight)[0])

        return self.line("imitate", count, lambda n: partial(work, n))

    def decision(self) -> dict[str, Tensor]:
        """What a rollout keeps of a decision, one of them, and what an update reads of it."""
        robot, how = self.robot, self.noise
        shape = (1, robot.chunk, robot.A)
        tokens = how.distribution == "categorical"
        mu = torch.zeros(*shape, _TOKENS) if tokens else torch.zeros(shape)
        scale = how.log_scale(None if tokens else torch.zeros(shape))
        action = how.greedy(mu)
        found = {"action": action, "logprob": how.logprob(mu, scale, action)}
        if not tokens:
            found |= {"mu": mu, "log_scale": scale}
        return found

    @property
    def decision_bytes(self) -> int:
        """Of a decision in the rollout buffer."""
        robot = self.robot
        image = robot.V * robot.image_size**2 * 3
        features = 0 if self.critic is None else 4 * self.net.feature_width
        own = sum(x.nbytes for x in self.decision().values())
        return image + 4 * robot.P + own + features + 8 + 8 + 4  # episode, step, reward

    def improve(self, count: int) -> Line:
        """The clipped loss on so many decisions, and its gradient."""
        rl = self.config.posttrain

        def work(n: int) -> object:
            shapes = self.decision()
            given = {k: _meta(n, *x.shape[1:], dtype=x.dtype) for k, x in shapes.items()}
            batch = {"observation": self.seen(n), "log_scale": None, **given}
            batch["advantage"] = _meta(n)
            if rl.kl_weight:
                with torch.no_grad():
                    batch["reference_mu"] = self.net(batch["observation"])[0]
            return _gradient(self.net, policy_loss(self.net, batch, self.noise, rl)[0])

        return self.line("improve" + " kl" * bool(rl.kl_weight), count, lambda n: partial(work, n))

    def act(self, count: int) -> Line:
        """A decision of so many rows."""

        def work(n: int) -> object:
            with torch.no_grad():
                return self.net.both(self.seen(n))

        return self.line("act", count, lambda n: partial(work, n))

    def value(self, count: int) -> Line:
        """The critic's loss on so many decisions, and its gradient."""
        wide = self.net.feature_width

        def work(n: int) -> object:
            value = self.critic(_meta(n, wide))
            return _gradient(self.critic, (value - _meta(n)).square().mean())

        return self.line("value", count, lambda n: partial(work, n))

    # ------------------------------------------------------------ the world

    def windows(self, n: int, targets: int) -> dict[str, Tensor]:
        """A batch of `n` windows of `targets` frames and the one before them."""
        robot, frames = self.robot, targets + 1
        pictures, chunk = (robot.V, *[robot.image_size] * 2, 3), (robot.chunk, robot.A)
        return {
            "image": _meta(n, frames, *pictures, dtype=torch.uint8),
            "reference": _meta(n, *pictures, dtype=torch.uint8),
            "proprio": _meta(n, frames, robot.P),
            "action": _meta(n, frames, *chunk),
            "previous_proprio": _meta(n, robot.P),
            "previous_action": _meta(n, *chunk),
        }

    def denoise(self, count: int, transitions: int) -> Line:
        """A loss of the world on so many windows, whose history is its own, and its gradient;
        beside a teacher of whole clips, if there is one."""
        robot, frames, clips = self.robot, self.config.simulator.frames, self.clips

        def work(n: int) -> object:
            m = max(1, transitions * n // count)
            poses = ("proprio", "previous_proprio", "next_proprio")
            motion = {name: _meta(m, robot.P) for name in poses}
            chunk = (robot.chunk, robot.A)
            motion |= {name: _meta(m, *chunk) for name in ("action", "previous_action")}
            batch, g = self.windows(n, frames), generator("plan")
            loss, _ = self.world.loss(batch, g, True)
            loss = loss + self.world.dynamics_loss(motion)
            if clips:
                loss = loss + conversion_loss(self.world, self.world, batch, g)
            return _gradient(self.world, loss)

        return self.line("denoise", count, lambda n: partial(work, n))

    @property
    def clips(self) -> bool:
        """Whether the world learns from one that sees whole clips."""
        return bool(self.config.distill.clip_steps)

    def distil(self, count: int) -> Line:
        """A loss of a world of few passes on so many windows, after its own frames, and its
        gradient."""
        part, few = self.config.distill, self.config.posttrain.sampling_steps

        def work(n: int) -> object:
            loss, _ = distillation_loss(
                self.world,
                self.world,
                self.windows(n, part.frames),
                generator("plan"),
                steps=few,
                refine=part.teacher_steps // few,
                own=bool(part.self_forcing_steps),
            )
            return _gradient(self.world, loss)

        return self.line("distil", count, lambda n: partial(work, n))

    def encode(self, count: int) -> Line | None:
        """A loss of the autoencoder that is trained before the world, and its gradient."""
        tokenizer, robot = self.world.tokenizer, self.robot
        if not isinstance(tokenizer, AutoencoderTokenizer):
            return None
        size = robot.image_size

        def work(n: int) -> object:
            loss = tokenizer.loss(_meta(n, robot.V, size, size, 3, dtype=torch.uint8))
            return _gradient(tokenizer, loss)

        tokenizer.requires_grad_(True)
        found = self.line("encode", count, lambda n: partial(work, n))
        tokenizer.requires_grad_(False)
        return found

    def worlds(self, rows: int, steps: int) -> Worlds:
        """Of `rows` rows side by side, `steps` denoising steps a frame."""
        world, robot = self.world, self.robot
        if isinstance(world, World):
            world = world.for_generation()
        size, chunk = robot.image_size, (robot.chunk, robot.A)
        vae = 0
        if not isinstance(world, World):  # WoVR streams whole videos
            from worldenv.models.vae import state_bytes  # a published model's library

            dtype = getattr(torch, self.config.simulator.tokenizer_precision)
            said = {k: v for k, v in world.tokenizer.vae.config.items() if k[0] != "_"}
            vae = robot.V * max(state_bytes(said, size, dtype))  # one after the other
            rows = min(rows, STREAMED)  # its pieces are all alike

        def begin(n: int) -> Callable[[], object]:
            state, everyone = world.start(n), np.ones(n, bool)
            image = _meta(n, CONTEXT, robot.V, size, size, 3, dtype=torch.uint8)
            context = (image, _meta(n, CONTEXT, robot.P), _meta(n, CONTEXT, *chunk))
            seeds = _meta(n, dtype=torch.int64)
            return lambda: world.prefill(state, everyone, *context, seeds)

        def go_on(n: int) -> Callable[[], object]:
            state, everyone = world.start(n), np.ones(n, bool)
            action = _meta(n, *chunk)
            return lambda: world.step(state, action, steps, everyone)

        first = self.line("begin", rows, begin)
        frame = self.line(f"frame {steps}", rows, go_on)
        start = world.start(1)
        cache = getattr(start, "cache", None)
        cached = cache.nbytes() if cache is not None else 0
        state = measure(lambda: world.start(1)).kept - cached
        peaks = (max(first.one.peak, frame.one.peak), max(first.all.peak, frame.all.peak))
        one, every = (
            Spent(max(0, peak - n * vae), 0, spent.flops)
            for peak, n, spent in zip(peaks, (1, frame.most), (frame.one, frame.all), strict=True)
        )
        line = Line(frame.most, one, every)
        return Worlds(line, cached, state, vae, isinstance(world, World))

    # ------------------------------------------------------------ the judge

    def judge(self, rows: int) -> Judge:
        """At work on `rows` rows."""
        part, robot = self.config.reflector, self.robot
        if part.kind in ("vlm", "prompted"):
            found = self.image_text
            batch = min(part.encode_batch, rows)
            # The prefixes of a batch lie beside each other while a layer reads them.
            watch = batch * (found.pass_bytes + 2 * found.row_bytes // found.layers)
            return Judge(lambda n: watch, found.row_bytes, found.flops, found.feature_bytes)
        model, _ = blank.reflector(part, robot)

        def work(n: int) -> Callable[[], object]:
            judge, seen = model.onlooker(n), self.seen(n)
            flags = torch.ones(n, dtype=torch.bool)
            return lambda: judge.watch(*seen.values(), flags)

        line = self.line("watch", rows, work)
        return Judge(line.peak, 4 * getattr(model, "size", 0), line.flops)

    @cached_property
    def image_text(self) -> Any:
        """Costs of the image-text model (`models.vlm_cost.Cost`)."""
        from worldenv.models import vlm_cost  # transformers takes seconds

        return vlm_cost.cost(self.config.reflector, self.robot, INSTRUCTION)

    @cached_property
    def reflector(self) -> Model:
        """What is held of the reflector, its image-text model included."""
        part = self.config.reflector
        if part.kind not in ("vlm", "prompted"):
            return weigh(*blank.reflector(part, self.robot))
        head, found = weigh(self._head, ""), self.image_text
        source = str(part.folder)
        if not part.folder.is_dir():
            source = f"{image_text(part.folder).name} as published; {source} is not there"
        return replace(
            head,
            source=source,
            parameters=head.parameters + found.parameters,
            frozen_bytes=head.frozen_bytes + found.weight_bytes,
        )

    @cached_property
    def _head(self) -> nn.Module:
        """The head on an image-text model's features; a prompted one has none."""
        from worldenv.models.vlm_reflector import ImageTextReflector  # transformers takes seconds

        text = SimpleNamespace(size=self.image_text.width, why_anew="", answers=lambda: (0, 1))
        text.model, text.layout = nn.Module(), lambda *_: None
        with torch.device("meta"):
            return ImageTextReflector(self.config.reflector, self.robot, text)

    def learn(self, count: int) -> Line | None:
        """A loss of the reflector on so many frames, and its gradient; None if nothing of it is
        trained."""
        part, robot = self.config.reflector, self.robot
        if part.kind in ("prompted", "wovr"):
            return None
        size = robot.image_size
        model = self._head if part.kind == "vlm" else blank.reflector(part, robot)[0]

        def work(n: int) -> object:
            g, keep = generator("plan"), _meta(n, part.width, dtype=torch.bool)
            if part.kind == "vlm":
                kind = getattr(torch, part.precision)
                features = _meta(n, self.image_text.width, dtype=kind)
                logits = model.judge(features, _meta(n, robot.P), keep)
            else:
                shape = (1, 2, robot.V, size, size, 3)
                data = {"images": _meta(*shape, dtype=torch.uint8), "instruction": [INSTRUCTION]}
                data["proprio"] = _meta(1, 2, robot.P)
                rows = torch.zeros(n, dtype=torch.int64)
                logits = _Pictures(data).judge(model, rows, rows, g)
            return _gradient(model, F.binary_cross_entropy_with_logits(logits, _meta(n)))

        return self.line("learn", count, lambda n: partial(work, n))


def weigh(module: nn.Module, source: str) -> Model:
    """What is held of a model."""
    parameters = [p for m in _whole(module) for p in m.parameters()]
    buffers = [b for m in _whole(module) for b in m.buffers()]
    trained = [p for p in parameters if p.requires_grad]
    held = sum(x.nbytes for x in (*parameters, *buffers))
    own = sum(p.nbytes for p in trained)
    return Model(
        source,
        sum(p.numel() for p in parameters),
        sum(p.numel() for p in trained),
        held - own,
        own,
        sum(x.nbytes for x in module.state_dict().values()),
    )


def _whole(module: nn.Module) -> Iterator[nn.Module]:
    """A model, and the frozen ones that it holds without being asked for their parameters."""
    yield module
    for part in module.modules():
        for held in getattr(part, "_held", ()):
            yield from _whole(held)


def _gradient(module: nn.Module, loss: Tensor) -> object:
    """As `runtime.parallel` makes it."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    return torch.autograd.grad(loss, parameters, allow_unused=True)


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
