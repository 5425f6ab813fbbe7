"""The action map: what is drawn where, and that a simulator which draws begins as one without."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from worldenv.config import Config, EnvConfig, SimulatorConfig
from worldenv.data.camera import Camera
from worldenv.data.embodiment import Embodiment, Entry
from worldenv.envs.libero.cameras import of_tasks
from worldenv.envs.libero.robot import embodiment
from worldenv.models.action_map import CLOSED, LENGTH, OPEN, RADIUS, ActionMap
from worldenv.models.simulator import Simulator
from worldenv.runtime.errors import UserError
from worldenv.runtime.seeds import generator
from worldenv.stages import store

AT_ORIGIN = (1.0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1)
ROBOT = replace(
    embodiment(64),
    views=("wall", "hand"),
    cameras=(Camera("wall", 90.0, "world", AT_ORIGIN), Camera("hand", 90.0, "hand", AT_ORIGIN)),
)
LIBERO = embodiment(16, cameras=of_tasks("libero_spatial", (8,)))
ALL = np.ones(3, bool)


def pose(x=0.0, y=0.0, z=-1.0, turn=(0.0, 0.0, 0.0), opening=0.07) -> torch.Tensor:
    return torch.tensor([x, y, z, *turn, opening / 2, -opening / 2])


def drawn(after: torch.Tensor, before: torch.Tensor | None = None, **changes) -> torch.Tensor:
    """Maps [V, H, W, 3] in 0..1."""
    image = ActionMap(replace(ROBOT, **changes), grid=4).draw(
        after, after if before is None else before
    )
    assert image.min() >= -1
    assert image.max() <= 1
    return (image + 1) / 2


def centre(image: torch.Tensor, colour: int) -> list[float]:
    """Mean column and row of one channel of [H, W, 3]."""
    weight, at = image[..., colour], torch.arange(64) + 0.5
    return [float((weight.sum(axis) * at).sum() / weight.sum()) for axis in (0, 1)]


def test_the_disc_is_where_the_hand_will_be():
    wall = drawn(pose(x=0.5, y=0.25))[0]
    row, column = (wall.sum(-1) > 0).nonzero().float().mean(0).tolist()
    assert abs(column - 48) < LENGTH * 64
    assert abs(row - 24) < LENGTH * 64
    # Below and left of the lines, which go right (x) and up (y) from there: the disc alone.
    alone = wall[24:, :48]
    assert (alone.sum(-1) > 0).nonzero().max() < RADIUS * 64 + 1 + 48
    assert 0.2 < float((alone.sum(-1) > 0).sum()) / (math.pi * (RADIUS * 64) ** 2 / 4) < 2
    torch.testing.assert_close(wall[25, 46], torch.tensor(OPEN), atol=0.02, rtol=0)
    assert (wall[:10] == 0).all()


def test_the_hands_own_camera_sees_where_it_goes():
    before = pose(x=3.0, y=-2.0, z=1.0)
    hand = drawn(pose(x=3.25, y=-2.0, z=0.5), before)[1]
    row, column = (hand[..., 2] > 0.5).nonzero().float().mean(0).tolist()
    assert column == pytest.approx(48, abs=1.5)  # a quarter of a metre right at half a metre
    assert row == pytest.approx(32, abs=1.5)
    assert not drawn(pose(x=3.0, y=-2.0, z=1.5), before)[1].any()  # it draws back: behind


def test_what_is_behind_a_camera_or_outside_its_picture_is_not_drawn():
    assert not drawn(pose(z=1.0))[0].any()
    assert not drawn(pose(z=0.0))[0].any()
    assert not drawn(pose(x=1.5))[0].any()
    assert not drawn(pose(x=1e4, y=-1e4, z=-0.02))[0].any()
    half = drawn(pose(x=-1.0))[0]
    assert half[:, :10].any()
    assert not half[:, 10:].any()


@pytest.mark.parametrize(
    ("opening", "colour"),
    [
        (0.0, CLOSED),
        (0.07, OPEN),
        (0.2, OPEN),
        (0.035, (0.5, 0.5, 0.5)),
    ],
)
def test_the_discs_colour_is_the_opening_of_the_gripper(opening, colour):
    wall = drawn(pose(opening=opening))[0]
    torch.testing.assert_close(wall[33, 30], torch.tensor(colour), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("turn", "ways"),
    [
        ((0.0, 0.0, 0.0), {0: (1, 0), 1: (0, -1)}),  # x to the right, y up
        ((0.0, 0.0, math.pi / 2), {0: (0, -1), 1: (-1, 0)}),
        ((0.0, math.pi / 2, 0.0), {2: (1, 0), 1: (0, -1)}),  # z to the right, x away
        ((math.pi / 2, 0.0, 0.0), {0: (1, 0), 2: (0, 1)}),  # z comes down
    ],
)
def test_lines_go_along_the_hands_axes(turn, ways):
    wall = drawn(pose(turn=turn, opening=0.0))[0]
    for axis, (right, down) in ways.items():
        tip = round(0.9 * LENGTH * 64)
        rows, columns = (slice(31 + tip * way, 33 + tip * way) for way in (down, right))
        seen = wall[rows, columns].mean((0, 1))
        assert seen.argmax() == axis
        assert seen[axis] > 0.4
        assert seen.sum() - seen[axis] < 0.1
        beyond = round(1.4 * LENGTH * 64)
        assert not wall[32 + beyond * down, 32 + beyond * right].any()


def test_maps_of_a_batch_are_those_of_its_members_and_scale_with_the_image():
    after, before = torch.randn(2, 3, 4, 8) * 0.1 - torch.tensor([0, 0, 0.5, 0, 0, 0, 0, 0])
    maps = ActionMap(ROBOT, grid=4).draw(after, before)
    assert maps.shape == (3, 4, 2, 64, 64, 3)
    alone = ActionMap(ROBOT, grid=4).draw(after[1, 2], before[1, 2])
    torch.testing.assert_close(maps[1, 2], alone, atol=1e-5, rtol=0)
    large = ActionMap(replace(ROBOT, image_size=256, render_size=256), grid=4).draw(after, before)
    small = large.unflatten(4, (64, 4)).unflatten(3, (64, 4)).mean((4, 6))
    assert (small - maps).abs().mean() < 0.01


def test_columns_are_the_maps_patches_in_the_order_of_the_tokens():
    model = ActionMap(ROBOT, grid=4, rays=True)
    after, before = pose(x=0.2, y=0.6), pose(x=0.1)
    columns = model(after[None, None], before[None, None])
    assert columns.shape == (1, 1, 32, 9 * 16 * 16)
    assert columns.shape[-1] == model.columns
    whole = torch.cat([(model.draw(after, before) + 1) / 2, model.draw_rays(after, before)], -1)
    for view, row, column in ((0, 0, 2), (1, 3, 1)):
        patch = whole[view, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
        token = columns[0, 0, view * 16 + row * 4 + column]
        torch.testing.assert_close(token.unflatten(-1, (16, 16, 9)), patch)


def test_rays_say_how_a_camera_moves():
    model = ActionMap(ROBOT, grid=4, rays=True)
    before = pose(x=1.0, turn=(0.0, math.pi / 2, 0.0))  # it looks along -x
    after = pose(x=0.5, turn=(0.0, math.pi / 2, 0.0))
    still, moved = model.draw_rays(after, before)
    assert not still[..., :3].any()
    forward = torch.tensor([0.0, 0, -0.5]).expand(64, 64, 3)  # in its own frame: ahead
    torch.testing.assert_close(moved[..., :3], forward, atol=1e-6, rtol=0)
    torch.testing.assert_close(moved[..., 3:], still[..., 3:], atol=1e-6, rtol=0)
    turned = model.draw_rays(pose(x=1.0, turn=(0.0, math.pi, 0.0)), before)[1]
    ahead = turned[31:33, 31:33, 3:].mean((0, 1))
    torch.testing.assert_close(ahead, torch.tensor([-1.0, 0, 0]), atol=1e-3, rtol=0)  # to the left


# ------------------------------------------------------------------ in the simulator


def simulator(moved: bool = True, robot: Embodiment = LIBERO, **changes) -> Simulator:
    settings = {"width": 48, "layers": 2, "heads": 2, "patch": 8, "window": 2, "frames": 2}
    torch.manual_seed(0)
    model = Simulator(SimulatorConfig(**{**settings, "action_map": True, **changes}), robot).eval()
    if moved:  # zero-initialised layers would hide mistakes
        noise = generator("weights")
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.05 * torch.randn(p.shape, generator=noise))
    return model


def windows(rows: int = 3, frames: int = 3) -> dict[str, torch.Tensor]:
    g = generator("windows")
    image = torch.randint(0, 255, (rows, frames, 2, 16, 16, 3), dtype=torch.uint8, generator=g)
    proprio = 0.1 * torch.randn(rows, frames, 8, generator=g)
    proprio[..., :3] += torch.tensor([-0.2, 0.0, 1.1])  # over the table
    proprio[..., 3] += math.pi
    action = torch.randn(rows, frames, 8, 7, generator=g)
    action[:, 0] = 0
    return {
        "image": image,
        "reference": image[:, 0],
        "proprio": proprio,
        "action": action,
        "previous_proprio": proprio[:, 0],
        "previous_action": action[:, 0],
    }


@pytest.mark.parametrize("rays", [False, True])
def test_a_simulator_with_a_map_begins_as_one_without(rays):
    with_map = simulator(moved=False, ray_maps=rays).train()
    without = simulator(moved=False, action_map=False).train()
    shared = without.state_dict()
    assert all(torch.equal(v, with_map.state_dict()[k]) for k, v in shared.items())
    new = {"columns_in.weight", "columns_in.bias"}
    assert set(with_map.state_dict()) - set(shared) == new
    losses = [m.loss(windows(), generator("loss"), True)[0] for m in (with_map, without)]
    assert torch.equal(*losses)
    shown = with_map.condition(*(torch.zeros(2, 1, *s) for s in ((8,), (8,), (8, 7), (8, 7))))
    assert shown.columns.shape == (2, 1, 8, with_map.action_map.columns)


@pytest.mark.parametrize("self_history", [False, True])
def test_training_moves_what_reads_the_map(self_history):
    model = simulator(moved=False).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for step in range(4):  # at first the zero-initialised head lets no gradient through
        loss, _ = model.loss(windows(), generator("loss", step), self_history)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    drawn_on = model.columns_in.weight.abs().amax(0) > 1e-4
    assert drawn_on.float().mean() > 0.05


def test_what_the_map_shows_matters_to_the_frame_and_carries_no_gradient():
    model = simulator()
    known = windows()["proprio"][:, :1].clone().requires_grad_()
    zeros = torch.zeros(3, 1, 8, 7)
    condition = model.condition(known, known, zeros, zeros)
    assert not condition.columns.requires_grad
    last = model.tokenizer.encode(windows()["image"][:, :1])
    attends = [lambda q, k, v: v] * 2
    frames = [
        model.denoise(
            last, last, last[:, 0], torch.ones(3, 1), shown, model.rotary(torch.ones(3, 1)), attends
        )[0]
        for shown in (condition, replace(condition, columns=torch.zeros_like(condition.columns)))
    ]
    assert (frames[0] - frames[1]).abs().mean() > 1e-4


@pytest.mark.parametrize("frames", [1, 3])
def test_the_cache_holds_what_recomputing_with_maps_gives(frames):
    model = simulator(ray_maps=True)
    context = windows(3, frames)
    image, proprio, action = (context[name] for name in ("image", "proprio", "action"))
    state = model.start(3)
    model.prefill(state, ALL, image, proprio, action, torch.arange(3))
    actions = torch.randn(5, 3, 8, 7, generator=generator("actions"))
    latents, states = [model.tokenizer.encode(image)], [proprio]
    for chunk in actions:
        model.step(state, chunk, 2, ALL)
        latents.append(state.latents[:, None].clone())
        states.append(state.proprio[:, None].clone())
    latents, states = torch.cat(latents, 1), torch.cat(states, 1)
    led = torch.cat([action, actions.transpose(0, 1)], 1)
    position = torch.arange(latents.shape[1]).expand(3, -1)
    with torch.no_grad():
        stored = model._history(latents, latents[:, 0], states, led, position)
    for layer, (k, v) in enumerate(stored):
        keys, values, valid = state.cache.gather(layer)
        assert valid.all()
        torch.testing.assert_close(keys, k[:, -2:], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(values, v[:, -2:], rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------ on disk, and refused


def config(suite: str = "libero_spatial", tasks: tuple[int, ...] = (8,), **changes) -> Config:
    part = SimulatorConfig(width=48, layers=1, heads=2, patch=16, action_map=True)
    return Config(env=EnvConfig(suite=suite, tasks=tasks), simulator=replace(part, **changes))


def test_a_checkpoint_brings_its_cameras(tmp_path):
    path = tmp_path / "simulator.safetensors"
    model = store.build("simulator", config("libero_object", (0,), ray_maps=True)).eval()
    torch.nn.init.normal_(model.columns_in.weight)
    store.save("simulator", model, path)
    again = store.load("simulator", path)
    known = [torch.rand(2, 1, *s) for s in ((8,), (8,), (8, 7), (8, 7))]
    expected, got = (m.condition(*known).columns for m in (model, again))
    assert torch.equal(expected, got)
    assert torch.equal(model.columns_in.weight, again.columns_in.weight)
    assert again.embodiment.cameras == of_tasks("libero_object", (3,))


def test_a_map_is_not_drawn_for_scenes_seen_from_elsewhere(tmp_path):
    path = tmp_path / "simulator.safetensors"
    store.save("simulator", store.build("simulator", config()), path)
    store.load("simulator", path, fits=config("libero_goal", (0, 3)))
    with pytest.raises(UserError, match="do not all stand where those did"):
        store.load("simulator", path, fits=config("libero_object", (0,)))
    plain = config(action_map=False)
    store.save("simulator", store.build("simulator", plain), path)
    store.load("simulator", path, fits=config("libero_object", (0,)))


def test_without_known_cameras_or_a_pose_there_is_no_map():
    joints = tuple(Entry(f"joint_{i}", "joint") for i in range(7))
    for robot, said in (
        (replace(LIBERO, cameras=()), "got 0 cameras and 3, 3, 2 numbers of libero-panda"),
        (replace(LIBERO, proprio=joints), "got 2 cameras and 0, 0, 0 numbers"),
    ):
        with pytest.raises(UserError, match=r"simulator\.action_map: expected") as raised:
            simulator(robot=robot)
        assert said in str(raised.value)
    with pytest.raises(UserError, match=r"env\.tasks"):  # a kitchen and a living room
        store.build("simulator", config("libero_10", (0, 2)))


def test_rays_without_a_map_are_refused():
    with pytest.raises(UserError, match="ray_maps: expected false without action_map"):
        config(action_map=False, ray_maps=True)
