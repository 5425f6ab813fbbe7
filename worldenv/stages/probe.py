"""Finds things in the pictures of one camera that does not move, for measuring imagined ones.

A small convolutional detector, fitted in seconds to real frames with their true places: per thing a
softmax over cells of 4 x 4 pixels and "nowhere", and an offset within the cell. What nowhere looks
like is taught with things painted over by a square of another frame; as many squares are pasted
where nothing is, so that the paste itself says nothing. Frames are blurred and made noisy at
random, for a picture that is merely less sharp has lost nothing. A liberty: a thing that is hidden
from the camera counts as present where it is.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldenv.data.camera import Camera
from worldenv.data.episode import Episode
from worldenv.data.rig import project
from worldenv.runtime import parallel, progress
from worldenv.runtime.seeds import generator
from worldenv.stages.measures import Places

CELL = 4  # pixels
CANDIDATES = 8  # frames tried to paint with
STEPS, BATCH = 350, 32
REACH = 0.08  # m from the middle of a thing to beyond its edge
THINGS = "object_"  # what extras of an episode that hold true places begin with


class Probe(nn.Module):
    """K things in images `[N, H, W, 3]` uint8 of `size` pixels."""

    def __init__(self, size: int, things: int, width: int = 32) -> None:
        super().__init__()
        self.size, self.things, self.grid = size, things, size // CELL
        layers: list[nn.Module] = [nn.Conv2d(5, width // 2, 4, 2, 1), nn.SiLU()]
        layers += [nn.Conv2d(width // 2, width, 4, 2, 1), nn.SiLU()]
        for reach in (1, 2, 4, 1):
            layers += [nn.Conv2d(width, width, 3, padding=reach, dilation=reach), nn.SiLU()]
        self.net = nn.Sequential(*layers, nn.Conv2d(width, 3 * things, 1))
        self.net.to(memory_format=torch.channels_last)  # a third faster to train on a CPU
        self.nowhere = nn.Parameter(torch.zeros(things))
        line = torch.linspace(-1, 1, size)
        rows, columns = torch.meshgrid(line, line, indexing="ij")
        self.register_buffer("place", torch.stack([rows, columns]))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits `[N, K, cells + 1]`, the last for nowhere, and offsets `[N, K, 2, cells]` in
        cells. images: float `[N, 3, H, W]` in [0, 1]."""
        seen = torch.cat([images - 0.5, self.place.expand(len(images), -1, -1, -1)], 1)
        out = self.net(seen.contiguous(memory_format=torch.channels_last))
        out = out.contiguous().unflatten(1, (self.things, 3)).flatten(3)
        nowhere = self.nowhere[:, None].expand(len(images), -1, -1)
        return torch.cat([out[:, :, 0], nowhere], -1), out[:, :, 1:]

    @torch.no_grad()
    def find(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels `[N, K, 2]` (column, row) and whether each thing is seen `[N, K]`; of what is not,
        its likeliest place."""
        logits, offsets = self(unit(images))
        seen = logits.softmax(-1)[..., -1] < 0.5
        cell = logits[..., :-1].argmax(-1)
        corner = torch.stack([cell % self.grid, cell // self.grid], -1)
        inside = offsets.gather(-1, cell[..., None, None].expand(-1, -1, 2, 1))[..., 0]
        return (corner + inside) * CELL, seen


def unit(images: Tensor) -> Tensor:
    """`[N, H, W, 3]` uint8 to float `[N, 3, H, W]` in [0, 1]."""
    return images.permute(0, 3, 1, 2).float() / 255


def fit(
    images: Tensor,
    pixels: Tensor,
    radius: float,
    g: torch.Generator,
    steps: int,
    tick: Callable[[], None] = lambda: None,
) -> Probe:
    """A probe of images `[N, H, W, 3]` uint8 and the true pixels `[N, K, 2]` of K things.

    radius: in pixels, of a square that covers any of them. It depends on g's state alone; `tick` is
    called after every step.
    """
    probe = Probe(images.shape[1], pixels.shape[1])
    for weight in probe.parameters():
        if weight.ndim > 1:
            nn.init.kaiming_normal_(weight, nonlinearity="relu", generator=g)
        else:
            nn.init.zeros_(weight)
    optimizer = torch.optim.AdamW(probe.parameters(), 2e-3, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps)
    for _ in range(steps):
        rows = torch.randint(len(images), (BATCH,), generator=g)
        shown, present = painted(images, pixels, rows, radius, g)
        loss = _loss(probe, _blurred(unit(shown), g), pixels[rows], present)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        tick()
    return probe.eval()


def _loss(probe: Probe, images: Tensor, pixels: Tensor, present: Tensor) -> Tensor:
    logits, offsets = probe(images)
    place = pixels.clamp(0, probe.size - 1e-3) / CELL  # [B, K, 2]
    corner = place.floor()
    cell = (corner[..., 1] * probe.grid + corner[..., 0]).long().clamp(0, probe.grid**2 - 1)
    target = torch.where(present, cell, probe.grid**2)
    inside = offsets.gather(-1, cell[..., None, None].expand(-1, -1, 2, 1))[..., 0]
    missed = (inside - (place - corner)).abs().sum(-1)
    found = F.cross_entropy(logits.flatten(0, 1), target.flatten())
    return found + (missed * present).sum() / present.sum().clamp_min(1)


def painted(
    images: Tensor, pixels: Tensor, rows: Tensor, radius: float, g: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Frames `rows` [B] of images `[N, H, W, 3]`, half of them with one thing painted over, the
    others with a square pasted away from all things: ([B, H, W, 3], present [B, K] bool).

    What is pasted is a square of another frame at about the same height that shows none of the
    things; where none is found, nothing is.
    """
    size, count, batch = images.shape[1], pixels.shape[1], len(rows)
    every = torch.arange(batch)
    own = pixels[rows]
    hide = torch.rand(batch, generator=g) < 0.5
    thing = torch.randint(count, (batch,), generator=g)
    anywhere = torch.rand(batch, 2, generator=g) * size
    centre = torch.where(hide[:, None], own[every, thing], anywhere)
    donors = torch.randint(len(images), (batch, CANDIDATES), generator=g)
    across, down = torch.rand(2, batch, CANDIDATES, generator=g)
    column = radius + across * (size - 2 * radius)
    row = (centre[:, 1:] + (2 * down - 1) * radius).clamp(radius, size - radius)
    source = torch.stack([column, row], -1)  # [B, CANDIDATES, 2]
    empty = ((pixels[donors] - source[:, :, None]).abs().amax(-1) > 2 * radius).all(-1)
    covered = (own - centre[:, None]).abs().amax(-1)  # [B, K]
    usable = empty.any(-1) & (hide | (covered > 2 * radius).all(-1))
    pick = empty.float().argmax(-1)
    donor, shift = donors[every, pick], (source[every, pick] - centre).round().long()
    at = torch.arange(size)
    near = (at + 0.5 - centre[..., None]).abs() < radius  # [B, 2, size]
    paste = (near[:, 1, :, None] & near[:, 0, None]) & usable[:, None, None]
    along = (at + shift[..., None]) % size
    other = images[donor[:, None, None], along[:, 1, :, None], along[:, 0, None]]
    shown = torch.where(paste[..., None], other, images[rows])
    return shown, ~((covered < 0.7 * radius) & (usable & hide)[:, None])


def _blurred(images: Tensor, g: torch.Generator) -> Tensor:
    """Less sharp, noisier, darker or lighter by chance, as imagined frames are."""
    amount = torch.rand(3, len(images), 1, 1, 1, generator=g)
    soft = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    images = torch.lerp(images, soft, amount[0])
    noise = 0.08 * amount[1] * torch.randn(images.shape, generator=g)
    return images * (0.85 + 0.3 * amount[2]) + noise


# ---------------------------------------------------------------- episodes


def names(episode: Episode) -> list[str]:
    """The things whose true places [F, 3] an episode holds; what the task moves comes first."""
    return sorted(name for name in episode.extras if name.startswith(THINGS))


def truth(episode: Episode, steps: Sequence[int], camera: Camera, size: int) -> Places:
    """Where its things are in a camera's images before steps [F], which were looked at."""
    rows = np.searchsorted(episode.frame_steps, np.asarray(steps))
    points = np.stack([episode.extras[name][rows] for name in names(episode)], 1)
    shape = (*points.shape[:2], 4, 4)
    pixels, depth = project(camera, torch.as_tensor(points), torch.eye(4).expand(shape), size)
    scale = 100 * depth * 2 * math.tan(math.radians(camera.fov) / 2) / size
    return Places(pixels, scale, torch.ones(scale.shape, dtype=torch.bool))


class Finder:
    """Two probes, each fitted to every other episode: what one is asked about it has not seen."""

    def __init__(self, episodes: list[Episode], view: int, camera: Camera, seed: int) -> None:
        self.view, size = view, episodes[0].images.shape[2]
        self.images = [torch.from_numpy(e.images[:, view].copy()) for e in episodes]
        self.places = [truth(e, e.frame_steps, camera, size) for e in episodes]
        self.radius = math.ceil(
            100 * REACH / float(torch.cat([p.scale for p in self.places]).min())
        )
        with progress.bar(2 * STEPS, "probes") as bar:
            folds = [
                partial(
                    fit,
                    torch.cat(self.images[other::2]),
                    torch.cat([p.pixels for p in self.places[other::2]]),
                    self.radius,
                    generator(seed, "probe", other),
                    STEPS,
                    bar.advance,
                )
                for other in (1, 0)
            ]
            self.probes = parallel.run(folds)

    def find(self, number: int, images: Tensor, true: Places) -> Places:
        """Things in images `[F, V, H, W, 3]` of episode `number`, or imagined after it; true: where
        they should be."""
        pixels, seen = self.probes[number % 2].find(images[:, self.view])
        return Places(pixels, true.scale, seen)

    def hidden(self, seed: int) -> list[bool]:
        """Of things painted over in frames that the probe was not fitted to: is each missed?"""
        missed: list[bool] = []
        for half in (0, 1):
            g = generator(seed, "painted", half)
            images = torch.cat(self.images[half::2])
            pixels = torch.cat([p.pixels for p in self.places[half::2]])
            rows = torch.randint(len(images), (4 * BATCH,), generator=g)
            shown, present = painted(images, pixels, rows, self.radius, g)
            missed += (~self.probes[half].find(shown)[1])[~present].tolist()
        return missed
