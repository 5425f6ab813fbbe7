"""Fields of the configuration that say when a learned world is fit to train in.

`config.py` takes them into `Config`; `stages/gate.py` decides by them, and results/gate says where
the numbers come from.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

from worldenv.fields import Range
from worldenv.published import Rule
from worldenv.ranges import Episodes, Fraction


@dataclass(frozen=True)
class GateConfig:
    """What the fidelity stage must have measured before a policy is post-trained in a world."""

    on: bool = True
    """Refuse a world that fails (worldenv-train --force goes on in it, which is recorded). Off:
    what would have been refused is recorded all the same."""
    held_out: Episodes = 16
    """Held-out episodes at least. Of 16 a share is known to within 22 points at worst."""
    gain_db: Annotated[float, Range(-100, 100)] = 2.0
    """Of pixels that move, dB over a still picture one chunk ahead, at least: the lower bound, in
    the worse view. Fails where the simulator draws nothing, or a blur."""
    hand_cm: Annotated[float, Range(0, 1000, above=True)] = 2.0
    """Error of the end effector eight chunks ahead in cm, at most: the upper bound. Fails where
    actions do not lead where they should."""
    judge_auc: Fraction = 0.5
    """Of real episodes, how often the reflector's highest reward is higher in one that succeeded
    than in one that failed, at least: the lower bound. Fails where it knows nothing."""
    false_stops: Fraction = 0.1
    """Of all explored episodes, those that the reflector would stop without success, at most: the
    upper bound. Fails where it has not learned from them."""

    def fits(self, episodes: int, fraction: float) -> Iterator[Rule]:
        """What it requires of the first round's episodes, a fraction of which is held out."""
        every, least = round(1 / fraction), self.held_out if self.on else 1
        enough = f"enough to hold out {least} of the first round's {episodes} episodes"
        mend = f"{enough} (or more collect.episodes, or a lower gate.held_out)"
        yield episodes // every >= least, "collect.held_out", mend if self.on else enough


def without_older(values: Any) -> Any:
    """What a config.json holds, without the fields of older ones: the gate stands for one, and a
    critic is always a head on the policy's features."""
    part = values.get("posttrain") if isinstance(values, dict) else None
    if isinstance(part, dict):
        for name in ("require_fidelity", "value"):
            part.pop(name, None)
    return values
