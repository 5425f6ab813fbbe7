"""A benchmark of one's own: a hand on rails puts a block on the pad, drawn with numpy.

    worldenv-train --preset smoke --env.benchmark examples/own_benchmark.py --run-dir runs/own

A simulator (one task, an episode at a time), the robot it is about, and its tasks: that is all. The
pipeline demonstrates, imitates, explores, learns the world and its judge, post-trains and evaluates
as it does in LIBERO. `worldenv.envs.benchmark` says what else can be said.
"""

from collections.abc import Iterator

import numpy as np

from worldenv.data.embodiment import Embodiment, Entry
from worldenv.envs.benchmark import Benchmark
from worldenv.envs.start import Start
from worldenv.sources import EnvConfig

COLOURS = {"red": (220, 50, 40), "blue": (40, 70, 220)}
SUITES = {"blocks": [f"put the {colour} block on the pad" for colour in COLOURS]}
DEFAULTS = {"views": 1, "max_steps": 48}  # of the configuration, where nobody says otherwise
PAD = np.array([0.85, 0.15])  # x to the right, y down, in metres
REACH = 0.05  # of the hand, and how far an action of 1 moves it
OPEN, CLOSED = 0.04, 0.0  # of the fingers


class Rails:
    """A block that lies somewhere on the left, a hand that can carry it, a pad to put it on."""

    def __init__(self, task: int, image_size: int) -> None:
        self.task, self.size = task, image_size
        self.colour = list(COLOURS.values())[task]

    def reset(self, start: Start) -> None:
        """A numbered start is drawn from its number, a fresh one from its seed."""
        fresh = start.index is None
        draw = np.random.default_rng([fresh, start.seed if fresh else start.index])
        self.hand = np.array([0.5, 0.5])
        self.block = draw.uniform([0.1, 0.2], [0.4, 0.9])
        self.fingers, self.held = OPEN, False

    def step(self, action: np.ndarray) -> bool:
        """Moves by the first two numbers, closes above 0 of the third."""
        action = np.clip(action, -1, 1)
        self.hand = np.clip(self.hand + REACH * action[:2], 0, 1)
        self.fingers = CLOSED if action[2] > 0 else OPEN
        near = np.abs(self.hand - self.block).max() < REACH
        self.held = action[2] > 0 and (self.held or near)
        if self.held:
            self.block = self.hand.copy()
        return not self.held and np.abs(self.block - PAD).max() < 0.1

    def observe(self) -> dict[str, np.ndarray]:
        """One camera from above."""
        image = np.full((self.size, self.size, 3), 200, np.uint8)
        for place, half, colour in (
            (PAD, 0.1, (250, 230, 90)),
            (self.block, 0.06, self.colour),
            (self.hand, 0.03 + self.fingers / 2, (30, 30, 30)),
        ):
            low, high = (((place + side) * self.size).astype(int) for side in (-half, half))
            (left, top), (right, bottom) = np.maximum(low, 0), high
            image[top:bottom, left:right] = colour
        proprio = np.array([*self.hand, self.fingers], np.float32)
        return {"image": image[None], "proprio": proprio, "objects": {"block": self.block}}

    def expert(self, attempt: int) -> Iterator[np.ndarray]:
        """To the block, close, to the pad, open."""
        for goal, grip in ((lambda: self.block, -1.0), (lambda: PAD, 1.0)):
            while np.abs(goal() - self.hand).max() > REACH / 2:
                yield np.append(np.clip((goal() - self.hand) / REACH, -1, 1), grip)
            for _ in range(2):
                yield np.array([0.0, 0.0, -grip])

    def close(self) -> None:
        """Nothing is held."""


class OnRails(Benchmark):
    """Two tasks of one suite."""

    name = "rails"
    suites, defaults = SUITES, DEFAULTS
    simulator, processes = Rails, False

    def embodiment(self, env: EnvConfig) -> Embodiment:
        """Two rails and a gripper, ten actions a second."""
        return Embodiment(
            name="hand on rails",
            views=("above",),
            proprio=(
                Entry("x", "position", 0.01),
                Entry("y", "position", 0.01),
                Entry("fingers", "gripper", 0.001),
            ),
            action=("translate", "translate", "grip"),
            image_size=env.image_size,
            render_size=env.image_size,
            rotation=0,
            chunk=env.chunk,
            control_hz=10.0,
            gripper_closes=1,
            gripper_open=0.02,
        )

    def arguments(self, env: EnvConfig) -> dict[str, int]:
        """What Rails is made with, beside the task."""
        return {"image_size": env.image_size}


benchmark = OnRails()
