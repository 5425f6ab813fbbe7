"""The reward read from the simulator's own tokens, against the reflector, and both together.

    python -m bench.heads RUN... [--work DIR] [--out FILE]

Of each finished run the first round's world is driven by the real actions of its explored episodes,
twice, from their first frames; a head is trained on what the denoiser's last layer holds of every
generated frame, to say whether the real episode had succeeded by then. Head, reflector and the mean
of their logits are then asked about 100 fresh real episodes of the imitated policy, imagined again
whole and in branches about the placing. Each has the threshold at which as many of the explored
episodes' replays succeed as of the episodes. The run folders are only read.
"""

import argparse
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.__main__ import origin
from bench.worlds import fresh
from worldenv.config import load
from worldenv.data.windows import FrameSequence, chunk_sequences, from_first_step
from worldenv.models.reflector import Reflector
from worldenv.models.simulator import Simulator
from worldenv.runtime.seeds import derive, generator
from worldenv.stages import measures, store
from worldenv.stages.collect import load_round
from worldenv.stages.measures import LEADS
from worldenv.stages.reflector import NEAR, score
from worldenv.stages.replay import replay
from worldenv.stages.run import Run, world_of, write_json

ROOT = Path(__file__).parents[1]
GROUP = 16  # sequences that are imagined together
NOISES = 2  # replays of each episode to train on
STEPS, BATCH, DROPOUT = 600, 48, 0.3


class Head(nn.Module):
    """A success logit of a frame from the S tokens of width E that it was drawn from."""

    def __init__(self, tokens: int, width: int, each: int = 16, hidden: int = 128) -> None:
        super().__init__()
        self.each = nn.Linear(width, each)
        self.net = nn.Sequential(
            nn.Dropout(DROPOUT), nn.Linear(tokens * each, hidden), nn.SiLU(), nn.Linear(hidden, 1)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits `[...]` of tokens `[..., S, E]`."""
        return self.net(F.silu(self.each(tokens.float())).flatten(-2))[..., 0]


class Listening:
    """A simulator that keeps the tokens of every frame it generates."""

    def __init__(self, simulator: Simulator) -> None:
        self.simulator, self.seen, self.local = simulator, [], threading.local()
        simulator.norm.register_forward_hook(self._hear)

    def _hear(self, module: nn.Module, given: tuple, made: Tensor) -> None:
        vars(self.local).setdefault("passes", []).append(made)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.simulator, name)

    def for_generation(self) -> "Listening":
        """Itself."""
        return self

    def step(self, state: Any, action: Tensor, steps: int, active: np.ndarray) -> tuple:
        """As the simulator's; the tokens `[B, S, E]` of the last pass that drew are kept. With a
        window one more follows, which fills the cache."""
        self.local.passes = []
        made = self.simulator.step(state, action, steps, active)
        self.seen.append(self.local.passes[steps - 1][:, 0].half())
        return made


def imagined(
    listening: Listening, real: Sequence[FrameSequence], passes: int, seed: int, given: int = 1
) -> tuple[list[FrameSequence], list[Tensor]]:
    """Replays, and the tokens `[F - given, S, E]` of their generated frames."""
    order = sorted(range(len(real)), key=lambda k: len(real[k]))
    shown: dict[int, FrameSequence] = {}
    tokens: dict[int, Tensor] = {}
    for number, begin in enumerate(range(0, len(order), GROUP)):
        group = order[begin : begin + GROUP]
        chosen = [real[k] for k in group]
        listening.seen.clear()
        own = derive(seed, "group", number)
        made = replay(listening, chosen, passes, own, batch=len(group), given=given)
        heard = torch.stack(listening.seen, 1)
        for row, k in enumerate(group):
            shown[k], tokens[k] = made[row], heard[row, : len(real[k]) - given].clone()
    return [shown[k] for k in range(len(real))], [tokens[k] for k in range(len(real))]


def trained(seed: int, tokens: list[Tensor], real: list[FrameSequence]) -> Head:
    """On frames drawn as the reflector's are: a third successes, a third before one or before a
    failure's end, a third any failures."""
    labels = [s.success[1:] for s in real]
    near = [_near(label) for label in labels]
    every, won, close = torch.cat(tokens), torch.cat(labels), torch.cat(near)
    pools = [x.nonzero()[:, 0] for x in (won, close, ~won)]
    torch.manual_seed(derive(seed, "token head"))
    head = Head(*every.shape[1:]).train()
    optimizer = torch.optim.AdamW(head.parameters(), 1e-3, weight_decay=0.05)
    for step in range(STEPS):
        g = generator(seed, "token head batch", step)
        rows = torch.cat(
            [p[torch.randint(len(p), (BATCH // len(pools),), generator=g)] for p in pools]
        )
        loss = F.binary_cross_entropy_with_logits(head(every[rows]), won[rows].float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return head.eval()


def _near(won: Tensor) -> Tensor:
    """The frames before success, or before a failure's end, that are nearly one."""
    first = int(won.float().argmax()) if bool(won.any()) else len(won)
    place = torch.arange(len(won))
    return (place < first) & (place >= first - NEAR)


Judged = Callable[[list[FrameSequence], list[Tensor]], list[Tensor]]


def judges(head: Head, reflector: Reflector) -> dict[str, Judged]:
    """Logits of the generated frames of each sequence, by who is asked."""

    def seen(shown: list[FrameSequence], tokens: list[Tensor]) -> list[Tensor]:
        # The sequence's first frame is the real one that the reflector compares with.
        pairs = zip(score(reflector, shown), tokens, strict=True)
        return [torch.logit(r[-len(t) :].clamp(1e-6, 1 - 1e-6)) for r, t in pairs]

    @torch.no_grad()
    def heard(shown: list[FrameSequence], tokens: list[Tensor]) -> list[Tensor]:
        return [head(t) for t in tokens]

    def both(shown: list[FrameSequence], tokens: list[Tensor]) -> list[Tensor]:
        pairs = zip(seen(shown, tokens), heard(shown, tokens), strict=True)
        return [(a + b) / 2 for a, b in pairs]

    return {"reflector": seen, "tokens": heard, "both": both}


def highest(logits: list[Tensor]) -> list[float]:
    """Of each sequence."""
    return [float(x.max()) for x in logits]


def told(scores: list[float], above: float, truth: list[bool]) -> dict:
    """Agreement of the verdicts, and what any threshold could do."""
    said = [x > above for x in scores]
    return {**measures.agreement(said, truth), "auc": measures.auc(scores, truth)}


def measured(source: Path, work: Path) -> dict:
    """Of a run: by judge, the whole replays and the branches before the placing."""
    config = load(source / "config.json")
    run = Run(config, writes=False)
    folder, passes = run.dir / "checkpoints", config.sampling_steps(0)
    simulator = store.load("simulator", folder / f"{world_of(config, 0)}.safetensors")
    reflector = store.load("reflector", folder / "reflector-0.safetensors").eval()
    listening = Listening(simulator)
    _, explored, _ = load_round(run, 0)
    own = from_first_step(chunk_sequences(explored, config.env.chunk))
    again = [
        imagined(listening, own, passes, derive(config.seed, "token head", k))
        for k in range(NOISES)
    ]
    shown = [s for sequences, _ in again for s in sequences]
    tokens = [t for _, each in again for t in each]
    real = own * NOISES
    asked = judges(trained(config.seed, tokens, real), reflector)
    won = [bool(s.success.any()) for s in real]
    etas = {
        name: float(np.quantile(highest(judge(shown, tokens)), 1 - np.mean(won)))
        for name, judge in asked.items()
    }
    episodes = fresh(source, work, [source])
    truly = from_first_step(chunk_sequences(episodes, config.env.chunk))
    seed = derive(config.seed, "token head", "fresh")
    found: dict[str, dict] = {name: {} for name in asked}

    def ask(what: str, frames: list[FrameSequence], heard: list[Tensor], truth: list[bool]) -> None:
        for name, judge in asked.items():
            found[name][what] = told(highest(judge(frames, heard)), etas[name], truth)

    whole, heard = imagined(listening, truly, passes, seed)
    ask("whole", whole, heard, [bool(s.success.any()) for s in truly])
    moments = measures.placings(truly, score(reflector, truly))
    for lead in LEADS:
        cut = measures.branches(truly, moments, lead)
        frames = [b.frames for b in cut]
        made, heard = imagined(listening, frames, passes, derive(seed, lead), given=2)
        watched = [
            measures.after_first(truly[b.moment.sequence], s)
            for b, s in zip(cut, made, strict=True)
        ]
        ask(f"placing {lead}", watched, heard, [bool(f.success[-1]) for f in frames])
    run.close()
    return {"trained_on": {"frames": sum(map(len, tokens)), "won": int(sum(won))}, "judges": found}


def main() -> None:
    """Parses the command line, measures every run, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="finished runs of different seeds")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "worlds")
    parser.add_argument("--out", type=Path, default=ROOT / "results/heads/results.json")
    given = parser.parse_args()
    seeds = {}
    for source in given.runs:
        made = seeds[str(load(source / "config.json").seed)] = measured(source, given.work)
        for name, what in made["judges"].items():
            said = {k: (v["value"], v["auc"]) for k, v in what.items()}
            print(source.name, name, said, flush=True)
    write_json(given.out, {**origin("bench.heads"), "seeds": seeds})


if __name__ == "__main__":
    main()
