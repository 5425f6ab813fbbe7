"""Configuration of where episodes come from: the benchmark, demonstrations, the policy itself."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from worldenv.fields import Items, Range
from worldenv.ranges import Count, Episodes, Factor, Fraction, FromZero, Noise, Tasks


@dataclass(frozen=True)
class EnvConfig:
    """The real benchmark."""

    benchmark: str = "libero"
    """Which one: a registered name, module:name, or the path of a Python file that has a
    `benchmark` (docs/adding-a-benchmark.md)."""
    suite: str = "libero_spatial"
    """Of the benchmark's (LIBERO's: libero_spatial, libero_object, libero_goal, libero_10)."""
    tasks: Tasks = (8,)
    """Numbers of tasks within the suite (LIBERO's: 0-9)."""
    assets: Path | None = None
    """Folder with the benchmark's assets. LIBERO's may be `official`: those that `worldenv-doctor
    --fetch-assets` got; unset: WORLDENV_LIBERO_ASSETS, else libero_spatial's primitive pack, else
    the official ones."""
    image_size: Annotated[int, Range(8, 256, step=8)] = 64
    """Side of the square images the models see, in pixels: a multiple of simulator.patch, and of 8,
    for the encoders of the cameras end in a grid of eighths."""
    views: Annotated[int, Range(1, 16)] = 2
    """How many of the cameras models see: the third person's, and the hand's. Both are recorded."""
    chunk: Annotated[int, Range(1, 1000)] = 8
    """Actions executed open loop per policy decision."""
    max_steps: Annotated[int, Range(1, 100_000)] = 160
    """Control steps (20 Hz) after which an episode is truncated."""
    workers: Annotated[int, Range(1, 256)] = 2
    """Simulator processes."""


@dataclass(frozen=True)
class CollectConfig:
    """Demonstrations and self-explored episodes (paper section 3.2)."""

    demonstrations: Episodes = 5
    """Scripted demonstrations per task (starts 0, 1, ...)."""
    demonstration_noise: Noise = 0.25
    """Std of the correlated action noise added while demonstrating, relative to the action."""
    episodes: Episodes = 240
    """Policy episodes per task in the first round."""
    refresh_episodes: Episodes = 80
    """Policy episodes per task in each later round."""
    record_every: Count = 4
    """Control steps between recorded frames of policy episodes (a divisor of env.chunk). Each chunk
    can begin at any of them, so that the world learns from more poses of the same episodes."""
    push: Noise = 0.053
    """Exploration noise: Laplace scale of a push, the same for all actions of a chunk (1 moves the
    hand by about a centimetre a step). The world must have seen what such pushes lead to. Without
    one (0), noise in every action by itself."""
    scale: Factor = 1.5
    """Without a push: multiple of the policy's Laplace scale."""
    temperature: Factor = 1.0
    """Of tokens: what their logits are divided by."""
    fresh: Fraction = 1.0
    """Fraction of policy episodes from freshly sampled placements; the others use starts 0-19. With
    half from those twenty starts the policy improved less on others."""
    hold_chunks: FromZero = 1
    """Chunks recorded after success first fires: the world must see what success looks like."""
    held_out: Annotated[float, Range(0, 0.5, above=True)] = 0.125
    """Fraction of policy episodes kept from training, to measure simulator and reflector on."""


@dataclass(frozen=True)
class DataConfig:
    """Recorded demonstrations, in place of scripted ones: LIBERO's HDF5 layout, LeRobotDatasets."""

    paths: Annotated[tuple[Path, ...], Items(least=0), arg(name="")] = ()
    """Files, folders or repositories of the hub (user/name@revision): LIBERO's demonstrations,
    openvla's regenerated ones, our own, LeRobotDatasets (v2.1, v3.0), in any mixture."""
    episodes: Episodes | None = None
    """Demonstrations per task at most; unset: all."""
    memory: Annotated[float, Range(0, 10**6)] = 2.0
    """GiB of recorded frames that each folder of the run may hold in memory (explored ones too, and
    copies of them count besides); more are read from the disk as they are drawn. Results do not
    depend on it."""
    no_ops: Literal["keep", "drop"] = "keep"
    """What to do with actions that ask for nothing (openvla-oft's rule)."""
    observations: Literal["detect", "before", "after"] = "detect"
    """Whether observations were taken before or after each action (LIBERO's own writer)."""
    images: Literal["detect", "raw", "upright", "flipped", "mirrored"] = "detect"
    """How images lie: raw (upside down and mirrored, as LIBERO's and openvla's files have them),
    upright, or with rows (mirrored) or columns (flipped) the wrong way round."""
    cameras: Annotated[tuple[str, ...], Items(least=0)] = ()
    """LeRobot: keys of the cameras, the third person's first, then the hand's; unset: by name."""
    state: str | None = None
    """LeRobot: key of the robot's state; unset: observation.state, else state."""
    action: str | None = None
    """LeRobot: key of the actions; unset: action, else actions."""
    gripper: Literal["detect", "one-closes", "one-opens"] = "detect"
    """LeRobot: what a gripper command of 1 does (-1, or 0 where none is below, does the other)."""
    rotation: Literal["detect", "axis-angle", "euler", "quaternion-xyzw", "quaternion-wxyz"] = (
        "detect"
    )
    """LeRobot: how the state says which way the hand is turned."""
    rate: Literal["detect", "steps", "label"] = "detect"
    """LeRobot: whether each row is one command of the robot, whatever frame rate its label claims
    (steps: LIBERO's sets say 10 and are commanded at 20 Hz), or the label must be the robot's."""
