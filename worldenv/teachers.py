"""Fields of the configuration that say what the simulator learns from other simulators.

`config.py` takes them into `Config`; everything is checked there.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

from worldenv.fields import Range
from worldenv.published import Rule
from worldenv.ranges import FromZero, Passes, Rate, Shards, Weight


@dataclass(frozen=True)
class DistillConfig:
    """Other simulators as teachers: one that sees whole clips, one of many passes a frame."""

    clip_steps: FromZero = 0
    """Optimiser steps, before the first round's simulator, of a bidirectional one: a published Wan
    as it is, learning the commands. The causal one begins with its weights. 0: none."""
    clip_weight: Weight = 0.5
    """Weight of the velocities of that teacher in the training of the causal simulator."""
    steps: FromZero = 0
    """Optimiser steps of the ODE warm-up: where the many passes of the round's simulator end,
    learned by one of posttrain.sampling_steps passes, after real frames. 0: none."""
    self_forcing_steps: FromZero = 0
    """Optimiser steps of the same after the learner's own frames. 0: none."""
    teacher_steps: Passes = 16
    """Denoising steps per frame of the teacher."""
    batch: Shards = 8
    """Windows per step."""
    frames: Annotated[int, Range(2, 1000)] = 4
    """Target frames per window: what self-forcing rolls out, in chunks."""
    lr: Rate = 5e-4
    """Peak learning rate of warm-up and self-forcing."""

    @property
    def on(self) -> bool:
        """Whether there is a stage distill."""
        return bool(self.steps or self.self_forcing_steps)

    def fits(self, kind: str, passes: set[int]) -> Iterator[Rule]:
        """What it requires of the simulator's kind, and of the passes that it distills to."""
        for name in ("clip_steps", "steps", "self_forcing_steps"):
            holds = kind != "wovr" or not getattr(self, name)
            yield holds, f"distill.{name}", "0 for a WoVR, which is taken as it is"
        for few in sorted(passes) if self.on else ():
            multiple = f"a multiple of the {few} passes it is distilled to"
            yield self.teacher_steps % few == 0, "distill.teacher_steps", multiple
