"""Teach a simulator whether closing fingers hold something: `models.heads.OpeningHead`.

It sees real frames and imagined ones (the episodes again by their real actions, fingers as they
really were), and learns how wide the fingers were open one chunk later.
"""

import numpy as np
import torch
from torch import Tensor

from worldenv.data.windows import FrameSequence, from_first_step
from worldenv.models.layers import views_to_channels
from worldenv.models.policy import augment
from worldenv.models.simulator import World
from worldenv.runtime import progress
from worldenv.runtime.seeds import derive, generator
from worldenv.stages import training
from worldenv.stages.run import Run

BATCH = 96


def learn(
    run: Run, mark: str, number: int, simulator: World, sequences: list[FrameSequence]
) -> dict:
    """Train the head on all closings of the sequences; its last metrics."""
    seed = derive(run.config.seed, "grasp replay", number)
    imagined = _told_replay(simulator, from_first_step(sequences), run.config.sampling_steps(number), seed)
    rows = _closings(simulator, sequences), _closings(simulator, imagined)
    data = [torch.cat(column) for column in zip(*rows, strict=True)]
    image, known, moving, target = data
    pools = [moving.nonzero()[:, 0]]
    head = simulator.opening

    def loss_at(step: int, shard: int) -> tuple[Tensor, dict[str, Tensor]]:
        g = generator(run.config.seed, "grasps", number, step, shard)
        size = training.shard_size(run, BATCH)
        picks = torch.cat([p[torch.randint(len(p), (size,), generator=g)] for p in pools])
        views = augment(views_to_channels(image[picks]), 2, g)
        jitter = 0.05 * torch.randn(known[picks].shape, generator=g)
        jitter[:, -2 * head.BINS :] = 0
        logits = head(views, known[picks] + jitter)
        loss = head.loss(logits, target[picks])
        return loss, {"loss": loss.detach()}

    name = f"grasps-{number}"
    torch.manual_seed(derive(run.config.seed, "grasp dropout", number))
    head.train()
    tail = training.train(
        run, name, mark, head, loss_at, steps=run.config.simulator.grasp_steps, lr=1e-3,
        weight_decay=0.05,
    )
    head.eval()
    training.finish(run, name)
    return {"closings": len(pools[0]), **{f"grasp_{k}": v for k, v in tail.items()}}


@torch.no_grad()
def _closings(
    simulator: World, sequences: list[FrameSequence]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Frames before a chunk that closes the gripper: image, what is known, whether the fingers
    have not closed yet, and how wide they are open afterwards."""
    found: list[list[Tensor]] = [[], [], [], []]
    zeros = torch.zeros_like(sequences[0].actions[:1])
    for s in sequences:
        n = len(s) - 1
        closes = simulator.closes(s.actions[:n]).nonzero()[:, 0]
        if not len(closes):
            continue
        earlier = (closes - 1).clamp_min(0)
        led = torch.cat([zeros, s.actions])[closes]
        known = simulator.known(s.proprio[closes], s.proprio[earlier], led, s.actions[closes])
        width = simulator.openings(s.proprio)
        moving = ~simulator.settled(s.proprio[closes], s.proprio[earlier])
        for column, value in zip(
            found, (s.images[closes], known, moving, width[closes + 1]), strict=True
        ):
            column.append(value)
    return tuple(torch.cat(column) for column in found)


@torch.no_grad()
def _told_replay(
    simulator: World, sequences: list[FrameSequence], steps: int, seed: int, batch: int = 16
) -> list[FrameSequence]:
    import dataclasses

    done: list[FrameSequence] = []
    with progress.bar(len(sequences), "imagined grasps") as bar:
        for begin in range(0, len(sequences), batch):
            group = sequences[begin : begin + batch]
            state = simulator.start(len(group))
            everyone = np.ones(len(group), bool)
            image = torch.stack([s.images[:1] for s in group])
            proprio = torch.stack([s.proprio[:1] for s in group])
            led = torch.zeros(len(group), 1, *group[0].actions.shape[1:])
            seeds = torch.tensor([derive(seed, begin + i) for i in range(len(group))])
            simulator.prefill(state, everyone, image, proprio, led, seeds)
            frames, states = [image[:, 0]], [proprio[:, 0]]
            for t in range(max(len(s) for s in group) - 1):
                action = torch.stack([s.actions[min(t, len(s) - 2)] for s in group])
                live = np.array([t < len(s) - 1 for s in group])
                told = torch.stack([s.proprio[min(t + 1, len(s) - 1)] for s in group])
                simulator.told = simulator.openings(told)
                picture, after = simulator.step(state, action, steps, live)
                frames.append(picture)
                states.append(after)
            simulator.told = None
            pictures, poses = torch.stack(frames, 1), torch.stack(states, 1)
            for k, s in enumerate(group):
                pose = poses[k, : len(s)].clone()
                pose[:, simulator.fingers] = s.proprio[:, simulator.fingers]
                done.append(dataclasses.replace(s, images=pictures[k, : len(s)], proprio=pose))
            bar.advance(len(group))
    return done
