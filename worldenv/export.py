"""`worldenv-export`: recorded episodes as a LeRobotDataset. It stands beside cli.py, which starts
it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from worldenv.ranges import Episodes
from worldenv.sources import DataConfig
from worldenv.stages import export
from worldenv.words import parse


@dataclass(frozen=True)
class ExportArguments:
    """Write recorded episodes as a LeRobotDataset v3.0, successes and failures.

    Takes what `worldenv-train --data` takes: a run's own (RUN/data/demonstrations,
    RUN/data/explore-0), LIBERO's files, LeRobotDatasets of v2.1. The folder appears when it is
    whole. Of imagined episodes: `worldenv-imagine --lerobot FOLDER`."""

    to: Path = Path("lerobot")
    """Folder to make; it must not be there yet."""
    codec: Literal["av1", "h264"] = "av1"
    """Of the videos: AV1, as LeRobot has it, or H.264 for what cannot play that."""
    image_size: Episodes | None = None
    """Side in pixels to average pictures to; unset: as recorded."""
    data: Annotated[DataConfig, tyro.conf.arg(name="data")] = field(default_factory=DataConfig)

    def rules(self) -> Iterator[tuple[bool, str, str]]:
        """What is needed."""
        even = self.image_size is None or self.image_size % 2 == 0
        yield even, "image_size", "an even number of pixels"


def main() -> None:
    """worldenv-export"""
    told = parse(ExportArguments)
    print(export.export(told.data, told.to, told.codec, told.image_size))
