"""The learned world of a run, and one player's episode in it.

`World` is what players share: models, and the places of the run's episodes that one can begin at.
A `Session` is driven one chunk of actions at a time: what is held, the same in every action of the
chunk, alone or on top of what the episode itself did from there (`follow`), which keeps a hand near
what the world has learned from. It may have the real benchmark beside it, brought to the same place
and given the same actions. Nothing here is asynchronous; a session is for one thread at a time.
"""

import threading
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from worldenv.config import Config
from worldenv.data.embodiment import Embodiment
from worldenv.data.episode import Episode
from worldenv.data.windows import FrameSequence, chunk_sequences, from_first_step
from worldenv.envs.imagined import (
    Context,
    ImaginedVectorEnv,
    RewardModel,
    WorldModel,
    first_frames,
    middle_frames,
)
from worldenv.envs.start import Start
from worldenv.play.controls import Control, controls, reaches
from worldenv.runtime.errors import UserError
from worldenv.runtime.seeds import derive
from worldenv.stages import pipeline, store
from worldenv.stages.collect import load_round
from worldenv.stages.reality import benchmark, make_env
from worldenv.stages.run import Run, read_record, world_of

LONGEST = 1000  # chunks of an episode: what is recorded lies in memory until it is saved


@dataclass(frozen=True)
class Origin:
    """An episode of the run, as places to begin at: its frames before success, but the last."""

    name: str
    won: bool
    sequence: FrameSequence
    first: int
    """Index of its first frame's context among the world's."""
    places: int
    """How many of its frames one can begin at."""
    start: Start | None
    """How the real benchmark comes to its first frame; None where that is not known."""
    exact: bool
    """Whether its actions are what was executed, so that they lead the real benchmark along."""


class World:
    """What the players of a round share."""

    def __init__(
        self,
        config: Config,
        robot: Embodiment,
        simulator: WorldModel,
        reflector: RewardModel,
        recorded: Sequence[tuple[str, Episode]],  # and what each is called
        number: int,
    ) -> None:
        self.config, self.robot, self.number = config, robot, number
        self.simulator, self.reflector = simulator, reflector
        self.threshold, self.passes = float(reflector.threshold), config.sampling_steps(number)
        self.contexts: list[Context] = []
        self.origins: list[Origin] = []
        episodes = [episode for _, episode in recorded]
        for sequence in from_first_step(chunk_sequences(episodes, robot.chunk)):
            name, episode = recorded[sequence.episode]
            found = [*first_frames([sequence]), *middle_frames([sequence], robot.chunk)]
            shown = episode.source == "demonstration"
            start = Start(episode.task, episode.start, episode.seed)
            known = None if shown and config.data.paths else start
            first = len(self.contexts)
            origin = Origin(name, episode.success, sequence, first, len(found), known, not shown)
            self.contexts += found
            self.origins.append(origin)
        self.controls: list[Control] = controls(robot)
        self.reaches = reaches(robot, [episode.actions for episode in episodes])
        alone = simulator.device.type == "cuda"
        self.turn = threading.Lock() if alone else nullcontext()
        """Held by whoever imagines: a GPU records its graphs while nobody else is at work on it."""

    @property
    def rate(self) -> float:
        """Frames a second at which the robot itself lives through its chunks."""
        return self.robot.control_hz / self.robot.chunk


def open_world(run: Run, number: int | None = None) -> World:
    """The world of a run's round, by default the last that has one. UserError where there is none.

    A run of an older version, or of settings that have changed since, is played in as it is.
    """
    config = run.config
    if not config.learned:
        raise UserError(
            f"{run.dir}: expected a run with a learned world, got one of posttrain.world real. "
            "Name another run."
        )
    if number is None:
        number = max(filter(partial(_made, run), range(config.posttrain.rounds)), default=0)
    pipeline.check_round(config, number)
    simulator, reflector = (
        store.load(kind, run.dir / "checkpoints" / f"{name}.safetensors", run.device, config)
        for kind, name in _makers(config, number).items()
        if run.record(name)
    )
    shown, explored, held_out = load_round(run, number)
    attempts = [*explored, *held_out]
    attempts.sort(key=lambda e: not e.success)  # those that succeeded first
    recorded = [(f"attempt {k + 1}", e) for k, e in enumerate(attempts)]
    recorded += [(f"demonstration {k + 1}", e) for k, e in enumerate(shown)]
    world = simulator.for_generation()
    return World(config, run.embodiment, world, reflector, recorded, number)


def _makers(config: Config, number: int) -> dict[str, str]:
    """Steps that make a round's world and judge, by kind; their checkpoints are called so too."""
    return {"simulator": world_of(config, number), "reflector": f"reflector-{number}"}


def _made(run: Run, number: int) -> bool:
    """Whether a round has a world and a judge."""
    names = _makers(run.config, number).values()
    return all(read_record(run.dir / "stages" / f"{name}.json") for name in names)


@dataclass(frozen=True)
class Frame:
    """What a player sees after a chunk, or on beginning."""

    number: int
    """Rises by one with every frame of a session."""
    image: np.ndarray  # [V, H, W, 3] uint8
    real: np.ndarray | None  # the same of the real benchmark, where it is beside
    facts: dict[str, Any]
    """Numbers for the page."""


class Session:
    """One player's episode. `begin` comes first."""

    def __init__(self, world: World) -> None:
        self.world, self.number, self.frame = world, 0, None
        self.env = ImaginedVectorEnv(
            world.simulator,
            world.reflector,
            world.contexts,
            1,
            max_chunks=2 * LONGEST,  # an episode is as long as the player likes
            sampling_steps=world.passes,
            terminate=False,
        )
        self._reality: Any = None
        self._beside: np.ndarray | None = None
        self._real_won = False

    def begin(self, origin: int, place: int) -> Frame:
        """A new episode from one of the places of the `origin`-th of the world's. The same place
        and actions give the same episode."""
        world = self.world
        self.origin, self.number_of_origin, self.place = world.origins[origin], origin, place
        index = self.origin.first + place
        context = world.contexts[index]
        seed = derive(world.config.seed, "play", index)
        with world.turn:
            seen, _ = self.env.reset(options={"starts": [Start(context.task, index, seed)]})
        self.actions: list[np.ndarray] = []
        self.followed = False
        self.rewards: list[float] = []
        self.images, self.poses = [_first(seen["image"])], [_first(seen["proprio"])]
        grips = list(world.robot.actions("grip"))
        self.grip = [-float(world.robot.gripper_closes) for _ in grips]
        if place:
            self.grip = self.origin.sequence.actions[place - 1, -1, grips].clamp(-1, 1).tolist()
        if self._beside is not None:
            try:
                self._bring_real()
            except UserError:
                self._beside = None
                self._note(0.0)
                raise
        return self._note(0.0)

    def advance(self, held: np.ndarray, follow: bool) -> Frame:
        """One chunk of `held` `[A]`; follow: on top of what the episode did from here, as long as
        there is any of it, and with its grip. UserError when the episode is full."""
        if len(self.actions) >= LONGEST:
            raise UserError(
                f"the episode: expected at most {LONGEST} chunks, got one more. Save it, or begin "
                "another."
            )
        chunk = np.repeat(np.asarray(held, np.float32)[None], self.world.robot.chunk, 0)
        own, at = self.origin.sequence.actions, self.place + len(self.actions)
        self.followed = follow and at < len(own)
        if self.followed:
            grips = list(self.world.robot.actions("grip"))
            chunk[:, grips] = 0
            chunk += own[at].numpy()
        chunk = chunk.clip(-1, 1)
        begun = time.perf_counter()
        with self.world.turn:
            seen, reward, *_ = self.env.step(torch.from_numpy(chunk[None]))
            image, pose, reward = _first(seen["image"]), _first(seen["proprio"]), float(reward[0])
        seconds = time.perf_counter() - begun
        self.actions.append(chunk)
        self.images.append(image)
        self.poses.append(pose)
        self.rewards.append(reward)
        self.grip = [float(chunk[-1, i]) for i in self.world.robot.actions("grip")]
        if self._beside is not None:
            self._step_real(chunk)
        return self._note(seconds)

    def show_real(self, on: bool) -> Frame:
        """Bring the real benchmark to where the episode is, or let it rest. UserError where it
        cannot come there."""
        if on:
            self._bring_real()
        else:
            self._beside = None
        return self._note(0.0)

    def episode(self) -> Episode:
        """What was done so far, as one imagined episode. UserError if that is nothing."""
        if not self.actions:
            raise UserError("the episode: expected at least one chunk, got none. Move the hand.")
        world, origin = self.world, self.origin
        size, count = world.robot.chunk, len(self.actions)
        dones = np.zeros(count * size, bool)
        dones[size - 1 :: size] = np.array(self.rewards) > world.threshold
        begins = {"episode": origin.name, "step": int(origin.sequence.steps[self.place])}
        told = {"imagined": True, "round": world.number, "begins": begins, "reward": self.rewards}
        return Episode(
            benchmark=benchmark(world.config).name,
            suite=world.config.env.suite,
            task=origin.sequence.task,
            instruction=origin.sequence.instruction,
            start=origin.start.index if origin.start else None,
            seed=origin.start.seed if origin.start else 0,
            source="play",
            actions=np.concatenate(self.actions),
            dones=dones,
            frame_steps=np.arange(count + 1) * size,
            images=np.stack(self.images),
            proprio=np.stack(self.poses),
            success=bool(dones.any()),
            meta=told,
        )

    def close(self) -> None:
        """End the real benchmark's process."""
        if self._reality is not None:
            self._reality.close()

    def _bring_real(self) -> None:
        origin = self.origin
        if origin.start is None:
            raise UserError(
                f"{origin.name}: expected an episode recorded in the benchmark here, got one from "
                "a file, of which the start is not known. Begin at one of the attempts."
            )
        if self.place and not origin.exact:
            raise UserError(
                f"{origin.name}: expected to begin at its first frame, got frame {self.place}. "
                "Noise that was not recorded led there: begin at its first frame or at an attempt."
            )
        if self._reality is None:
            self._reality = make_env(self.world.config)
            self._reality.max_steps = 4 * LONGEST * self.world.robot.chunk
            self._reality.terminate = "never"
        seen, _ = self._reality.reset(options={"starts": [origin.start]})
        self._beside, self._real_won = _first(seen["image"]), False
        for chunk in [*origin.sequence.actions[: self.place].numpy(), *self.actions]:
            self._step_real(chunk)

    def _step_real(self, chunk: np.ndarray) -> None:
        seen, *_, info = self._reality.step(chunk[None])
        self._beside, self._real_won = _first(seen["image"]), bool(info["success"][0])

    def _note(self, seconds: float) -> Frame:
        world, done = self.world, len(self.actions)
        self.number += 1
        facts = {
            "number": self.number,
            "reward": self.rewards[-1] if done else None,
            "won": any(reward > world.threshold for reward in self.rewards),
            "chunks": done,
            "followed": self.followed,
            "left": max(0, len(self.origin.sequence.actions) - self.place - done),
            "seconds": seconds,
            "hand": [float(self.poses[-1][i]) for i in world.robot.entries("position")],
            "grip": self.grip,
            "real_won": self._real_won if self._beside is not None else None,
            "origin": self.number_of_origin,
            "place": self.place,
        }
        self.frame = Frame(self.number, self.images[-1], self._beside, facts)
        return self.frame


def _first(row: Any) -> np.ndarray:
    """The only row of what an environment shows, on the host and its own."""
    return np.array(row[0].cpu() if isinstance(row, torch.Tensor) else row[0])
