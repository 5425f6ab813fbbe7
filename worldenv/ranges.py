"""Kinds of numbers that fields of the configuration hold, with their bounds."""

from typing import Annotated, Literal

from worldenv.fields import Items, Pattern, Range

Preset = Literal[
    "default",
    "smoke",
    "published-tiny",
    "libero-spatial",
    "libero-object",
    "libero-goal",
    "libero-10",
    "libero-spatial-small",
    "metaworld",
    "openvla-oft-wan",
    "openvla-oft-wovr",
]

Count = Annotated[int, Range(1, 10**9)]
FromZero = Annotated[int, Range(0, 10**9)]
Width = Annotated[int, Range(1, 16384)]
Layers = Annotated[int, Range(1, 1000)]
Channels = Annotated[int, Range(8, 4096, step=8)]  # normalised in eight groups
Batch = Annotated[int, Range(1, 10**6)]
Shards = Annotated[int, Range(4, 10**6, step=4)]  # a batch cut in runtime.parallel.SHARDS
Fraction = Annotated[float, Range(0, 1)]
Threshold = Annotated[float, Range(0.001, 0.999)]  # beyond, everything or nothing is a success
Rate = Annotated[float, Range(0, above=True)]
Weight = Annotated[float, Range(0)]
Factor = Annotated[float, Range(0, 1000, above=True)]
Noise = Annotated[float, Range(0, 10)]
Passes = Annotated[int, Range(1, 1000)]
Sharded = Annotated[tuple[Literal["policy", "simulator", "reflector"], ...], Items(least=0)]
Tasks = Annotated[tuple[Annotated[int, Range(0, 10**6)], ...], Items()]
Episodes = Annotated[int, Range(1, 10**6)]
StartNumber = Annotated[int, Range(0, 10**6)]
StartRange = tuple[StartNumber, StartNumber]
FixtureSeeds = Annotated[tuple[Annotated[int, Range(0, 2**32 - 1)], ...], Items()]
Seed = Annotated[int, Range(0, 2**63 - 1)]
Device = Annotated[str, Pattern(r"auto|cpu|cuda(:\d{1,3})?", "auto, cpu, cuda or cuda:N")]
