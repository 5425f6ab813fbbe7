"""Distillation's losses: what they regress to, and where their gradients go."""

import copy
from dataclasses import replace

import pytest
import torch

from worldenv.config import SimulatorConfig
from worldenv.envs.libero.robot import embodiment
from worldenv.models import distillation
from worldenv.models.simulator import Simulator
from worldenv.runtime.seeds import counter_normal, generator

TINY = SimulatorConfig(
    width=48, layers=2, heads=2, patch=8, window=2, frames=3, prediction="velocity"
)
TWO = {"steps": 2, "refine": 3}


def simulator(moved: float = 0.05, **changes) -> Simulator:
    torch.manual_seed(0)
    model = Simulator(replace(TINY, **changes), embodiment(16)).eval()
    with torch.no_grad():  # zero-initialised layers would hide mistakes
        for p in model.parameters():
            p.add_(moved * torch.randn_like(p))
    return model


def windows(n: int = 3, frames: int = 4, name: str = "windows") -> dict[str, torch.Tensor]:
    g = generator(name)
    image = torch.randint(0, 255, (n, frames, 2, 16, 16, 3), dtype=torch.uint8, generator=g)
    action = torch.randn(n, frames, 8, 7, generator=g)
    action[:, 0] = 0
    return {
        "image": image,
        "reference": image[:, 0],
        "proprio": torch.randn(n, frames, 8, generator=g),
        "action": action,
        "previous_proprio": torch.randn(n, 8, generator=g),
        "previous_action": torch.randn(n, 8, 7, generator=g),
    }


def given_after(model: Simulator, batch: dict, seeds: torch.Tensor, steps: int):
    told = distillation._own(model, batch, seeds, steps)
    return told[0], model.given(*told)


@pytest.mark.parametrize("window", [0, 2])
@torch.no_grad()
def test_frames_side_by_side_are_those_generated_one_after_the_other(window):
    model, batch, seeds = simulator(window=window), windows(), torch.tensor([5, 6, 7])
    history, given = given_after(model, batch, seeds, steps=2)
    assert history.shape == (3, 3, 8, 192)
    noise = [counter_normal(seeds, f, history.shape[2:]) for f in range(3)]
    path, frames, _ = distillation.solve(model, torch.stack(noise, 1), given, 2)
    assert len(path) == 2
    frames = model.tokenizer.clip(frames)
    torch.testing.assert_close(frames[:, :-1], history[:, 1:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("own", [False, True])
def test_gradients_reach_what_draws_and_neither_the_teacher_nor_the_prediction_of_poses(own):
    teacher, student = simulator(), simulator(0.06)
    before = copy.deepcopy(student.state_dict())
    loss, _ = distillation.distillation_loss(
        student, teacher, windows(), generator("g"), own=own, **TWO
    )
    loss.backward()
    assert all(p.grad is None for p in teacher.parameters())
    found = {name for name, p in student.named_parameters() if p.grad is not None}
    rest = {name for name, _ in student.named_parameters()} - found
    assert {name.split(".")[0] for name in rest} == {"dynamics"}
    assert all(student.get_parameter(name).grad.abs().max() > 0 for name in found)
    assert all(torch.equal(before[k], v) for k, v in student.state_dict().items())


def test_a_student_that_is_its_teacher_in_as_many_passes_has_nothing_to_learn():
    model, g = simulator(), generator("g")
    loss, metrics = distillation.distillation_loss(
        model, model, windows(), g, steps=1, refine=1, own=True
    )
    assert loss.item() < 1e-9
    assert float(metrics["psnr_to_teacher"]) > 90


def test_a_clip_sees_all_its_frames_and_of_clean_ones_the_first_alone():
    model, batch = simulator(), windows()
    before = batch["previous_proprio"], batch["previous_action"]
    clean = model.tokenizer.encode(batch["image"])
    z, sigma = torch.randn(3, 3, 8, 192, generator=generator("z")), torch.full((3, 3), 0.7)

    def frames(history, noisy):
        told = history, clean[:, 0], batch["proprio"][:, :-1], batch["action"], before
        return model.denoised(noisy, sigma, model.given(*told, clip=True))[0]

    want = frames(clean[:, :-1], z)
    later = clean[:, :-1].clone()
    later[:, 1:] += 1
    assert torch.equal(frames(later, z), want)
    changed = z.clone()
    changed[:, 2] += 1
    assert (frames(clean[:, :-1], changed)[:, 0] != want[:, 0]).any()


def test_conversion_asks_for_the_velocity_of_the_clip():
    teacher, student, batch = simulator(), simulator(0.06), windows()
    loss = distillation.conversion_loss(student, teacher, batch, generator("g"))
    loss.backward()
    assert loss.item() > 0
    assert all(p.grad is None for p in teacher.parameters())
    alone = windows(frames=2)  # one frame a clip: nothing that the causal one does not see
    same = simulator(window=0)
    assert distillation.conversion_loss(same, same, alone, generator("g")).item() < 1e-9


def fit(model: Simulator, steps: int, loss_at, lr: float = 2e-3) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr)
    for step in range(steps):
        optimizer.zero_grad()
        loss_at(step).backward()
        optimizer.step()


def coin(name: object, n: int = 16) -> dict[str, torch.Tensor]:
    """A world without arm or past, whose next frame is all dark or all bright, as chance has it."""
    batch = windows(n, 3)
    bright = torch.rand(n, 3, generator=generator("coin", name)) < 0.5
    shade = torch.where(bright, 255, 0).to(torch.uint8)
    image = shade[..., None, None, None, None].expand_as(batch["image"])
    still = {k: torch.zeros_like(v) for k, v in batch.items()}
    return {**still, "image": image, "reference": image[:, 0]}


def test_one_pass_tosses_the_coin_as_many_passes_do():
    """One pass of what was trained by flow matching gives the mean of both sides, grey."""
    torch.manual_seed(0)
    sizes = {"width": 48, "layers": 1, "heads": 2, "patch": 16, "window": 1}
    config = SimulatorConfig(**sizes, prediction="velocity", pure_noise=0.2)
    teacher = Simulator(config, embodiment(16))
    fit(teacher, 150, lambda k: teacher.loss(coin(k), generator("fit", k), False)[0])
    teacher.requires_grad_(False).eval()
    student = copy.deepcopy(teacher).requires_grad_(True)
    student.tokenizer.requires_grad_(False)
    one = {"steps": 1, "refine": 8}

    def lost(model: Simulator) -> float:
        with torch.no_grad():
            g, batch = generator("test"), coin("test", 32)
            return float(
                distillation.distillation_loss(model, teacher, batch, g, own=True, **one)[0]
            )

    naive = lost(student)
    for own in (False, True):
        draw = lambda k, o=own: distillation.distillation_loss(  # noqa: E731
            student, teacher, coin(k), generator("distil", int(o), k), own=o, **one
        )[0]
        fit(student, 60, draw)
    assert lost(student) < 0.6 * naive
