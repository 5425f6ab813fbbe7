"""Drive the simulator with recorded actions: what would it have shown?"""

import dataclasses
import itertools
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from worldenv.data.disk import Table
from worldenv.data.windows import FrameSequence, folder_of
from worldenv.models.simulator import Simulator
from worldenv.runtime import parallel, progress
from worldenv.runtime.seeds import derive


def replay(
    simulator: Simulator,
    sequences: list[FrameSequence],
    steps: int,
    seed: int,
    batch: int = 16,
    given: int = 1,
) -> list[FrameSequence]:
    """Imagined versions of sequences: same first frames (`given` of them) and actions, generated
    frames and proprio after them.

    steps: denoising steps per frame. Sequences of like length run together.
    """
    simulator = simulator.for_generation()
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    groups = [order[begin : begin + batch] for begin in range(0, len(order), batch)]
    with progress.bar(len(sequences), "imagined replays") as bar:

        def piece(group: list[int]) -> list[FrameSequence]:
            done = _replay(simulator, sequences, group, steps, seed, given)
            bar.advance(len(group))
            return done

        done = parallel.shared([partial(piece, group) for group in groups])
    imagined = dict(zip(itertools.chain(*groups), itertools.chain(*done), strict=True))
    return [imagined[i] for i in range(len(sequences))]


def _replay(
    simulator: Simulator,
    sequences: list[FrameSequence],
    group: list[int],
    steps: int,
    seed: int,
    given: int,
) -> list[FrameSequence]:
    device = simulator.device
    chosen = [sequences[i] for i in group]
    state = simulator.start(len(group))
    everyone = np.ones(len(group), bool)
    image = torch.stack([s.images[:given] for s in chosen]).to(device)
    proprio = torch.stack([s.proprio[:given] for s in chosen]).to(device)
    led = torch.zeros(len(group), given, *chosen[0].actions.shape[1:], device=device)
    led[:, 1:] = torch.stack([s.actions[: given - 1] for s in chosen])
    seeds = torch.tensor([derive(seed, i) for i in group], device=device)
    simulator.prefill(state, everyone, image, proprio, led, seeds)
    frames, states = list(image.cpu().unbind(1)), list(proprio.cpu().unbind(1))
    for t in range(given - 1, max(len(s) for s in chosen) - 1):
        action = torch.stack([s.actions[min(t, len(s) - 2)] for s in chosen]).to(device)
        live = np.array([t < len(s) - 1 for s in chosen])
        picture, after = simulator.step(state, action, steps, live)
        frames.append(picture.cpu())
        states.append(after.cpu())
    pictures, poses = torch.stack(frames, 1), torch.stack(states, 1)
    return [
        dataclasses.replace(s, images=pictures[k, : len(s)], proprio=poses[k, : len(s)])
        for k, s in enumerate(chosen)
    ]


class Pictures:
    """Frames of N sequences on the disk, in place of images `[N, F, V, H, W, 3]`: indexed by
    sequence and frame."""

    def __init__(self, table: Table, lengths: list[int], device: torch.device) -> None:
        self._table, self._device = table, device
        ends = torch.tensor(lengths).cumsum(0)
        self._first = ends - torch.tensor(lengths)

    def __getitem__(self, key: tuple[Tensor, Tensor]) -> Tensor:
        rows, frames = (index.cpu() for index in key)
        return self._table.read(self._first[rows] + frames).to(self._device)


def padded(sequences: Sequence[FrameSequence], device: torch.device) -> dict:
    """Sequences as one batch: images `[N, F, ...]`, proprio, success, valid `[N, F]`, padded at
    the end. Where any lie on the disk, images are `Pictures`, read as they are asked for.
    """
    lengths = [len(s) for s in sequences]
    count, longest, first = len(sequences), max(lengths), sequences[0]
    beside = folder_of(s.unread for s in sequences)
    if beside is None:
        images = torch.zeros(count, longest, *first.images.shape[1:], dtype=torch.uint8)
    else:
        table = Table((s.unread for s in sequences), beside)
    proprio = torch.zeros(count, longest, *first.proprio.shape[1:])
    success = torch.zeros(count, longest, dtype=torch.bool)
    valid = torch.zeros(count, longest, dtype=torch.bool)
    for i, s in enumerate(sequences):
        n = len(s)
        if beside is None:
            images[i, :n] = s.images
        proprio[i, :n] = s.proprio
        success[i, :n], valid[i, :n] = s.success, True
    batch: dict[str, Tensor | Pictures | list[str]] = {
        "images": images.to(device) if beside is None else Pictures(table, lengths, device),
        "proprio": proprio.to(device),
        "success": success.to(device),
        "valid": valid.to(device),
    }
    return {**batch, "instruction": [s.instruction for s in sequences]}
