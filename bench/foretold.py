"""How well the outcome of a grasp can be foretold at all, and how many episodes that takes.

    python -m bench.foretold RUN... [--out FILE]

A small network is shown the frame before the last closing of the gripper in real episodes (or one
chunk earlier), and the real actions from there on, and learns whether the fingers then hold
something: what a world model has to get right, without having to draw it. It learns from a run's
own episodes, or from all RUNs', and is asked about every fifth episode of the run, which it has not
seen. What it cannot say from so many episodes, no simulator trained on them will draw reliably. The
run folders are only read; they may be of older versions.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.__main__ import origin
from worldenv.data.embodiment import Embodiment
from worldenv.data.windows import chunk_sequences
from worldenv.models.layers import views_to_channels
from worldenv.models.policy import augment
from worldenv.runtime.seeds import derive, generator
from worldenv.stages import measures
from worldenv.stages.collect import recorded
from worldenv.stages.run import open_run, write_json

ROOT = Path(__file__).parents[1]
LEADS = (0, 1)  # chunks before the frame at which the closing chunk begins
EMPTY = (
    0.0025  # m: fingers that closed on nothing are 1 to 2.2 mm apart, on a bowl's rim 2.9 and more
)
ASKED = 5  # every so many episodes see no training
STEPS, BATCH = 500, 48


@dataclass(frozen=True)
class Grasps:
    """n closings: image [n, V, H, W, 3], proprio [n, P], action [n, K*A], held [n], episode [n]."""

    image: Tensor
    proprio: Tensor
    action: Tensor
    held: Tensor
    episode: Tensor

    def only(self, rows: Tensor) -> "Grasps":
        """Some of them."""
        return Grasps(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))


def grasps(folder: Path, lead: int) -> Grasps:
    """All closings of a run's explored episodes that can be judged."""
    run = open_run(folder)
    robot: Embodiment = run.embodiment
    rows: list[tuple] = []
    for number in range(run.config.posttrain.rounds):
        episodes = recorded(run, f"explore-{number}")
        for s in chunk_sequences(episodes, run.config.env.chunk):
            for m in measures.grasps([s], robot):
                first = m.frame - lead
                if first >= 0:
                    held = robot.opening(s.proprio[m.end].tolist()) > EMPTY
                    chunks = s.actions[first : m.frame + 1].flatten()
                    place = number * len(episodes) + s.episode
                    rows.append((s.images[first], s.proprio[first], chunks, held, place))
    run.close()
    return Grasps(
        *(torch.stack([torch.as_tensor(x) for x in column]) for column in zip(*rows, strict=True))
    )


class Foreteller(nn.Module):
    """A logit `[B]` of whether something will be held."""

    def __init__(self, views: int, size: int, proprio: int, action: int) -> None:
        super().__init__()
        self.see = nn.Sequential(
            nn.Conv2d(3 * views, 24, 5, 2, 2),
            nn.GELU(),
            nn.Conv2d(24, 48, 3, 2, 1),
            nn.GELU(),
            nn.Conv2d(48, 64, 3, 2, 1),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(64 * (size // 8) ** 2, 128),
            nn.GELU(),
            nn.Dropout(0.3),
        )
        width = 128 + proprio + action
        self.say = nn.Sequential(
            nn.Linear(width, 128), nn.GELU(), nn.Dropout(0.2), nn.Linear(128, 1)
        )

    def forward(self, views: Tensor, proprio: Tensor, action: Tensor) -> Tensor:
        """Views `[V, B, 3, H, W]` in [-1, 1]."""
        seen = self.see(views.transpose(0, 1).flatten(1, 2))
        return self.say(torch.cat([seen, proprio, action], 1))[:, 0]


def learned(shown: Grasps, seed: int) -> tuple[Foreteller, tuple[Tensor, Tensor]]:
    """Trained on as many of either outcome; and the statistics of proprio."""
    torch.manual_seed(seed)
    g = generator(seed, "foretold")
    around = shown.proprio.mean(0), shown.proprio.std(0) + 1e-3
    views, size = shown.image.shape[1], shown.image.shape[2]
    net = Foreteller(views, size, shown.proprio.shape[1], shown.action.shape[1])
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3, weight_decay=0.05)
    rate = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.01, STEPS)
    pools = [(shown.held == h).nonzero()[:, 0] for h in (True, False)]
    for _ in range(STEPS):
        rows = torch.cat([p[torch.randint(len(p), (BATCH // 2,), generator=g)] for p in pools])
        seen = augment(views_to_channels(shown.image[rows]), 2, g)
        pose = (shown.proprio[rows] - around[0]) / around[1]
        pose = pose + 0.05 * torch.randn(pose.shape, generator=g)
        logits = net(seen, pose, shown.action[rows])
        loss = F.binary_cross_entropy_with_logits(logits, shown.held[rows].float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    return net.eval(), around


@torch.no_grad()
def asked(net: Foreteller, around: tuple[Tensor, Tensor], about: Grasps) -> dict:
    """Agreement with what happened, and what any threshold could do."""
    pose = (about.proprio - around[0]) / around[1]
    logits = net(views_to_channels(about.image), pose, about.action)
    truth = about.held.tolist()
    return {
        **measures.agreement((logits > 0).tolist(), truth),
        "auc": measures.auc(logits.tolist(), truth),
    }


def main() -> None:
    """Parses the command line, trains, asks, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="finished runs of different seeds")
    parser.add_argument("--out", type=Path, default=ROOT / "results/worlds/foretold.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, dict] = {}
    for lead in LEADS:
        known = {folder.name: grasps(folder, lead) for folder in given.runs}
        train = {n: x.only(x.episode % ASKED != 0) for n, x in known.items()}
        fields = Grasps.__dataclass_fields__
        every = Grasps(*(torch.cat([getattr(x, f) for x in train.values()]) for f in fields))
        whole, statistics = learned(every, derive("foretold", lead))
        for name, own in known.items():
            about = own.only(own.episode % ASKED == 0)
            alone = learned(train[name], derive("foretold", name, lead))
            row = {
                "own": {**asked(*alone, about), "learned_from": len(train[name].held)},
                "all": {**asked(whole, statistics, about), "learned_from": len(every.held)},
            }
            found.setdefault(name, {})[str(lead)] = row
            for kind, x in row.items():
                print(
                    name,
                    "lead",
                    lead,
                    kind,
                    x["value"],
                    (x["low"], x["high"]),
                    x["auc"],
                    flush=True,
                )
    write_json(
        given.out,
        {
            **origin("bench.foretold", threads=1),
            "runs": found,
        },
    )


if __name__ == "__main__":
    main()
