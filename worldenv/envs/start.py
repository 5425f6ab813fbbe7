"""Where an episode starts: the one value both environments are reset with."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Start:
    """A starting point of one episode.

    task: index of the task within its suite.
    index: benchmark init state 0..49; None asks for a freshly sampled placement. The imagined
        environment reads it as the row of its context bank.
    seed: seeds fixture poses (real) or the noise of the dynamics (imagined).
    noise: scale of the expert's action noise, 0 = none; policies ignore it.
    mistakes: seeds the false stops of the judge (imagined); None: it makes none.
    """

    task: int
    index: int | None
    seed: int
    noise: float = 0.0
    mistakes: int | None = None
