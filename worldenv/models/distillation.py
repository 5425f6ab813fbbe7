"""Losses that make one simulator from another: a causal one from one that sees whole clips, and
one of few passes a frame from one of many.

Causal conversion: a bidirectional model learns the commands on whole clips (`clip_loss`); the
causal one begins with its weights, and learns its velocities (`conversion_loss`) beside those of
the data. Few passes (CausVid, arXiv 2412.07772; Self-Forcing, arXiv 2506.08009): the student learns
where the teacher's ODE ends, from the levels that the student will pass, after clean frames
(warm-up) and after its own, rolled out against the cache (self-forcing).

Liberties: self-forcing matches the frame that the teacher makes in many passes of the same noise
after the student's own history, not distributions by a critic, which needs a third network. So
errors are pulled back only as far as the teacher itself recovers from them (`self_history` taught
it that). Gradients reach one pass of each frame, drawn anew, and not the frames before.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from worldenv.models.simulator import Given, World, moving
from worldenv.runtime.seeds import counter_normal

Batch = dict[str, Tensor]  # of `data.windows.FrameWindows.sample`
Metrics = dict[str, Tensor]


def clip_loss(world: World, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Metrics]:
    """Flow matching of a clip at one noise level, whose frames see each other and the first one."""
    clean, given = _clip(world, batch)
    target = clean[:, 1:]
    z, sigma = _noised(world, target, generator)
    frames, states = world.denoised(z, sigma, given)
    truth = (batch["proprio"][:, 1:] - world.proprio_mean) / world.proprio_std
    image = _velocity_error(frames, target, sigma)
    dynamics = world.dynamics_error(given.condition.proprio, truth)
    refined = F.smooth_l1_loss(states, truth, beta=0.1)
    mse = (frames - target).detach().square().mean()
    loss = image + 0.3 * (dynamics + refined)
    return loss, {"loss": loss.detach(), "psnr": -10 * torch.log10(mse / 4)}


def conversion_loss(
    student: World, teacher: World, batch: Batch, generator: torch.Generator
) -> Tensor:
    """Squared difference of the causal student's velocity, which knows clean frames before each, to
    that of a teacher that knows the first one and all noisy ones."""
    with torch.no_grad():
        clean, whole = _clip(teacher, batch)
        z, sigma = _noised(teacher, clean[:, 1:], generator)
        target, _ = teacher.denoised(z, sigma, whole)
    given = student.given(*_told(student, batch, clean))
    return _velocity_error(student.denoised(z, sigma, given)[0], target, sigma)


def distillation_loss(
    student: World,
    teacher: World,
    batch: Batch,
    generator: torch.Generator,
    *,
    steps: int,
    refine: int,
    own: bool,
) -> tuple[Tensor, Metrics]:
    """A student that samples in `steps` passes against a teacher that does in steps * refine.

    own: after frames that the student generated itself (self-forcing), from where its own passes
    arrive; otherwise after clean ones, from where the teacher's do (warm-up).
    """
    clean = student.tokenizer.encode(batch["image"])
    count, device = clean.shape[1] - 1, clean.device
    seeds = torch.randint(2**62, (len(clean),), generator=generator).to(device)
    told = _told(student, batch, clean)
    if own:
        told = _own(student, batch, seeds, steps)
    counts = [torch.full_like(seeds, f) for f in range(count)]
    noise = torch.stack([counter_normal(seeds, f, clean.shape[2:]) for f in counts], 1)
    path, target, poses = solve(teacher, noise, teacher.given(*told), steps * refine)
    given = student.given(*told)
    path = solve(student, noise, given, steps)[0] if own and steps > 1 else path[::refine]
    drawn = torch.randint(steps, noise.shape[:2], generator=generator)
    rows, frames = torch.arange(len(noise))[:, None], torch.arange(count)[None]
    z = torch.stack(path)[drawn, rows, frames]
    sigma = torch.tensor(student.sigmas(steps))[drawn].to(device)
    made, states = student.denoised(z, sigma, given)
    weight = moving(target, told[0]) if student.tokenizer.bounded else 1.0
    error = made - target
    image = (weight * error.square()).mean()
    loss = image + 0.3 * F.smooth_l1_loss(states, poses, beta=0.1)
    mse = error.detach().square().mean()
    return loss, {"loss": loss.detach(), "psnr_to_teacher": -10 * torch.log10(mse / 4)}


@torch.no_grad()
def solve(
    world: World, noise: Tensor, given: Given, steps: int
) -> tuple[list[Tensor], Tensor, Tensor]:
    """From noise `[B, F, S, Z]` to frames, as generation does, all F side by side: what enters each
    pass, the frames, and their normalised proprio `[B, F, P]`."""
    z, path = noise, []
    for now, after in itertools.pairwise(world.sigmas(steps)):
        path.append(z)
        frames, states = world.denoised(z, z.new_full(z.shape[:2], now), given)
        z = frames + (after / now) * (z - frames)
    return path, frames, states


def _told(world: World, batch: Batch, clean: Tensor) -> tuple:
    """Arguments of `World.given` for a batch whose encoded frames are `clean`."""
    before = batch["previous_proprio"], batch["previous_action"]
    reference = world.tokenizer.encode(batch["reference"])
    return clean[:, :-1], reference, batch["proprio"][:, :-1], batch["action"], before


def _own(world: World, batch: Batch, seeds: Tensor, steps: int) -> tuple:
    """The same after frames that the world generates itself: of an episode that is imagined from
    the window's first frame on, where what came before is not known."""
    history, proprio = world.roll_out(batch, seeds, steps)
    before = proprio[:, 0], torch.zeros_like(batch["previous_action"])
    return history, history[:, 0], proprio, batch["action"], before


def _clip(world: World, batch: Batch) -> tuple[Tensor, Given]:
    """Encoded frames, and what those after the first are denoised from as one clip. The poses
    before each frame are real, for student and teacher alike."""
    clean = world.tokenizer.encode(batch["image"])
    return clean, world.given(*_told(world, batch, clean), clip=True)


def _noised(world: World, target: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Clips `[B, F, S, Z]` at one noise level each, and the levels `[B, F]`."""
    sigma = world.sample_sigma((len(target), 1), generator).to(target.device)
    s, noise = sigma[..., None, None], torch.randn(target.shape, generator=generator)
    return (1 - s) * target + s * noise.to(target.device), sigma.expand(target.shape[:2])


def _velocity_error(frames: Tensor, target: Tensor, sigma: Tensor) -> Tensor:
    """Mean squared error of the velocity; of clean frames below a level of 1/4, where velocities
    magnify what float rounding leaves."""
    return ((frames - target) / sigma[..., None, None].clamp_min(0.25)).square().mean()
