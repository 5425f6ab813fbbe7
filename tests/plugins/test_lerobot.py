"""worldenv in LeRobot: keys, shapes, dtypes and errors, and that nothing changes on the way."""

import tomllib
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_world import ROBOT, small_world
from stand_in_lerobot import PLUGIN

from worldenv.config import PolicyConfig
from worldenv.envs.imagined import ImaginedVectorEnv
from worldenv.fields import to_dict
from worldenv.models.policy import Policy
from worldenv.presets import preset
from worldenv.rl.noise import OWN
from worldenv.runtime.errors import UserError
from worldenv.stages import store
from worldenv.stages.run import write_json

IMAGE, WRIST = "observation.images.image", "observation.images.image2"
SHAPES = {IMAGE: (3, 16, 16), WRIST: (3, 16, 16), "observation.state": (8,), "action": (7,)}
WORDS = "pick up the black bowl next to the plate and place it on the plate"


def lerobot(name: str):
    """Something of LeRobot's, or of the stand-in's."""
    from importlib import import_module

    module, _, thing = name.rpartition(".")
    return getattr(import_module(f"lerobot.{module}"), thing)


def batch(rows: int = 2, seed: int = 0) -> tuple[dict, dict]:
    """A batch as LeRobot gives it, and what worldenv's models are to see of it."""
    g = np.random.default_rng(seed)
    image = g.integers(0, 256, (rows, 2, 16, 16, 3), np.uint8)
    state = g.normal(0, 0.1, (rows, 8)).astype(np.float32)
    pixels = {"image": image[:, 0].copy(), "image2": image[:, 1].copy()}
    given = lerobot("envs.preprocess_observation")({"pixels": pixels, "agent_pos": state})
    words = [WORDS] * rows
    seen = {"image": torch.from_numpy(image), "proprio": torch.from_numpy(state)}
    return given | {"task": words}, seen | {"instruction": tuple(words)}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run's folder with a policy of two rounds and a reflector, and the small world."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(1)
    policy = Policy(PolicyConfig(width=32, layers=1, heads=2, encoder_channels=8), ROBOT).eval()
    world = small_world(folder)
    checkpoints = folder / "run" / "checkpoints"
    checkpoints.mkdir(parents=True)
    for name in ("policy-sft", "policy-9", "policy-10"):
        store.save("policy", policy, checkpoints / f"{name}.safetensors")
    store.save("reflector", world.reflector, checkpoints / "reflector-0.safetensors")
    return SimpleNamespace(run=folder / "run", world=world, policy=policy)


@pytest.fixture
def worlds(made, monkeypatch):
    """`create_envs` of a configuration of the small world."""
    from lerobot_policy_worldenv import world

    settings = SimpleNamespace(embodiment=ROBOT, close=lambda: None)
    monkeypatch.setattr("worldenv.stages.run.open_run", lambda folder, device: settings)
    monkeypatch.setattr(world, "open_run", lambda folder, device: settings)
    monkeypatch.setattr(world, "open_world", lambda run, number: made.world)
    config = lerobot("envs.EnvConfig").get_choice_class("worldenv_world")(run="somewhere")
    return config, lambda rows: config.create_envs(rows, use_async_envs=True)


def make_policy(checkpoint: object, config: object, cameras: tuple[str, ...] = ()):
    """By LeRobot's own way from a configuration to a policy."""
    kind = lerobot("configs.PreTrainedConfig").get_choice_class("worldenv")
    settings = kind(checkpoint=str(checkpoint), cameras=list(cameras), device="cpu")
    return lerobot("policies.make_policy")(cfg=settings, env_cfg=config)


def judge(made: SimpleNamespace, **settings: object):
    """By LeRobot's own way from a configuration to a reward model."""
    kind = lerobot("configs.rewards.RewardModelConfig").get_choice_class("worldenv_reflector")
    settings = kind(checkpoint=str(made.run), device="cpu", **settings)
    return lerobot("rewards.make_reward_model")(settings)


# ---------------------------------------------------------------- what passes


def test_every_grey_comes_back_from_a_float():
    from lerobot_policy_worldenv.skin import Skin

    grey = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(1, 3, 16, 16)
    given, _ = batch(1)
    given |= {IMAGE: grey.float() / 255, WRIST: grey}
    seen = Skin(ROBOT, SHAPES, [], "--x").observation(given, torch.device("cpu"))
    assert torch.equal(seen["image"], grey.permute(0, 2, 3, 1)[:, None].expand(1, 2, 16, 16, 3))


def test_larger_pictures_are_averaged_and_turns_are_the_robots():
    from lerobot_policy_worldenv.skin import Skin

    given, seen = batch()
    twice = {
        key: given[key].repeat_interleave(2, 2).repeat_interleave(2, 3) for key in (IMAGE, WRIST)
    }
    state = torch.tensor([[0.1, 0, 0, 3.1, 0.2, 0, 0.04, -0.04]] * 2)
    flipped = state.clone()
    angle = state[:1, 3:6].norm()
    flipped[:, 3:6] *= (angle - 2 * torch.pi) / angle  # the same turn, written the other way round
    out = Skin(ROBOT, SHAPES, [], "--x").observation(
        given | twice | {"observation.state": flipped.double()}, torch.device("cpu")
    )
    assert torch.equal(out["image"], seen["image"])
    assert out["proprio"].dtype == torch.float32
    assert (out["proprio"] - state).abs().max() < 2e-6


def test_cameras_are_told_by_names_or_as_said():
    from lerobot_policy_worldenv.skin import Skin

    own = {f"observation.images.{view}": (3, 8, 8) for view in reversed(ROBOT.views)}
    assert Skin(ROBOT, own, [], "--x").cameras == tuple(reversed(own))
    assert Skin(ROBOT, SHAPES, [], "--x").cameras == (IMAGE, WRIST)
    assert Skin(ROBOT, SHAPES, [WRIST, IMAGE], "--x").cameras == (WRIST, IMAGE)


def test_policy_decides_as_without_lerobot(made, worlds):
    config, _ = worlds
    policy = make_policy(made.run, config)
    before, after = lerobot("policies.make_pre_post_processors")(policy.config)
    given, seen = batch()
    with torch.no_grad():
        own = made.policy.command(OWN["laplace"].greedy(made.policy(seen)[0]))
    with torch.inference_mode():
        chunk = policy.predict_action_chunk(before(dict(given)))
        steps = [after(policy.select_action(before(dict(given)))) for _ in range(8)]
    assert chunk.dtype == torch.float32
    assert torch.equal(chunk, own)
    assert torch.equal(torch.stack(steps, 1), own)


def test_policy_looks_once_a_chunk_and_anew_after_reset(made, worlds):
    policy = make_policy(made.run, worlds[0])
    (one, _), (other, _) = batch(seed=1), batch(seed=2)
    first = policy.select_action(one)
    second = policy.select_action(other)
    assert torch.equal(second, policy.predict_action_chunk(one)[:, 1])
    policy.reset()
    assert torch.equal(policy.select_action(one), first)


def test_world_declares_what_it_shows(made, worlds):
    config, envs = worlds
    ((suite, tasks),) = envs(3).items()
    assert (suite, [*tasks]) == ("libero_spatial", [8])
    env = tasks[8]
    seen, info = env.reset(seed=[4, 5, 6], options={})
    assert env.observation_space.contains(seen)
    assert info["is_success"].tolist() == [False] * 3
    assert env.call("task_description") == env.get_attr("task") == (WORDS,) * 3
    assert env.call("_max_episode_steps")[0] == 8 * made.world.config.max_chunks
    assert [frame.shape for frame in env.call("render")] == [(16, 32, 3)] * 3
    assert (env.metadata["render_fps"], config.fps) == (20, 20)
    policy_features = lerobot("envs.env_to_policy_features")(config)
    assert {key: tuple(f.shape) for key, f in policy_features.items()} == SHAPES
    seen, reward, terminated, truncated, info = env.step(np.zeros((3, 7), np.float32))
    assert env.observation_space.contains(seen)
    assert (reward.dtype, terminated.dtype, truncated.dtype) == (np.float32, bool, bool)
    assert info["is_success"].shape == reward.shape == terminated.shape == truncated.shape == (3,)


def test_world_imagines_as_without_lerobot(made, worlds):
    env = worlds[1](2)["libero_spatial"][8]
    own = ImaginedVectorEnv(
        made.world.simulator, made.world.reflector, env.contexts, 2,
        max_chunks=made.world.config.max_chunks, sampling_steps=made.world.passes,
    )  # fmt: skip
    shown, _ = env.reset(seed=[7, 8])
    real, _ = own.reset(options={"starts": [env.start(7), env.start(8)]})
    actions = np.random.default_rng(0).uniform(-1, 1, (2, 16, 7)).astype(np.float32)
    for t in range(16):
        kept = {name: view.copy() for name, view in shown["pixels"].items()}
        shown, reward, *_ = env.step(actions[:, t])
        if t % 8 < 7:
            assert not reward.any()
            assert all((shown["pixels"][name] == view).all() for name, view in kept.items())
            continue
        real, judged, *_ = own.step(torch.from_numpy(actions[:, t - 7 : t + 1]))
        assert (reward == judged.numpy()).all()
        assert reward.all()
        assert (shown["agent_pos"] == real["proprio"].numpy()).all()
        for v, view in enumerate(("image", "image2")):
            assert (shown["pixels"][view] == real["image"][:, v].numpy()).all()
            assert (shown["pixels"][view] != kept[view]).any()


def test_world_repeats_by_seed_and_ends(made, worlds):
    env = worlds[1](2)["libero_spatial"][8]
    assert env.start(3) == env.start(3) != env.start(4)
    zeros = np.zeros((2, 7), np.float32)
    first, _ = env.reset(seed=[3, 3])
    assert (first["agent_pos"][0] == first["agent_pos"][1]).all()
    for _ in range(env.call("_max_episode_steps")[0]):
        _, _, terminated, truncated, _ = env.step(zeros)
    assert (terminated | truncated).all()
    frozen = env.step(zeros)
    assert (frozen[2] | frozen[3]).all()
    again, _ = env.reset(seed=3)  # the first row's
    assert (again["agent_pos"][0] == first["agent_pos"][0]).all()
    env.reset()  # seeds of its own


def test_lerobots_loop_runs_the_policy_in_the_world(made, worlds):
    config, envs = worlds
    policy = make_policy(made.run, config).eval()
    before, after = lerobot("policies.make_pre_post_processors")(policy.config)
    frames = []
    same = lambda value: value  # noqa: E731
    arguments = (policy, same, same, before, after)
    env = envs(2)["libero_spatial"][8]
    out = lerobot("scripts.lerobot_eval.rollout")(
        env, *arguments, seeds=[1, 2], render_callback=lambda e: frames.append(e.call("render"))
    )
    steps = out["action"].shape[1]
    assert out["action"].shape == (2, steps, 7)
    assert len(frames) == steps + 1 or len(frames) == steps
    assert out["done"][:, -1].all()
    assert (out["reward"][:, 7::8] > 0).any()
    assert not out["reward"][:, 0].any()
    again = lerobot("scripts.lerobot_eval.rollout")(env, *arguments, seeds=[1, 2])
    assert torch.equal(out["action"], again["action"])
    assert torch.equal(out["reward"], again["reward"])


def test_reflector_judges_as_without_lerobot(made):
    model = judge(made)
    before, _ = lerobot("rewards.factory.make_reward_pre_post_processors")(model.config)
    own = made.world.reflector.onlooker(2)
    every = torch.ones(2, dtype=torch.bool)
    frames = [batch(seed=k) for k in range(3)]
    for given, seen in frames:
        reward = model.compute_reward(before(dict(given)))
        expected = own.watch(seen["image"], seen["proprio"], seen["instruction"], every)
        assert torch.equal(reward, expected)
        assert (reward.shape, reward.dtype) == ((2,), torch.float32)
    keys = (IMAGE, WRIST, "observation.state")
    sequence = {key: torch.stack([given[key] for given, _ in frames], 1) for key in keys}
    assert torch.equal(model.compute_reward(sequence | {"task": [WORDS] * 2}), reward)
    alone = model.compute_reward(frames[2][0])  # its episodes begin here
    assert not torch.equal(alone, reward)
    assert not getattr(model, "is_trainable", False)
    model = judge(made, cameras=[WRIST, IMAGE])
    assert not torch.equal(model.compute_reward(frames[2][0]), alone)


# ---------------------------------------------------------------- what is refused


def test_another_version_of_lerobot_is_refused(plugin):
    for found in ("0.5.9", "0.7.0", "1.0"):
        with pytest.raises(UserError, match=rf"expected lerobot 0\.6\.x.*got {found}.*pip install"):
            plugin._check(found)
    plugin._check("0.6.4")
    project = tomllib.loads((PLUGIN / "pyproject.toml").read_text())["project"]
    assert f"lerobot[dataset,evaluation]>={plugin.LEROBOT}.1,<0.7" in project["dependencies"]
    assert project["name"].startswith("lerobot_policy_")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({WRIST: (3, 8, 8), "observation.images.top": (3, 8, 8), IMAGE: None},
         r"expected 2 camera\(s\).*got .*--policy\.cameras \(2 of them: agentview"),
        ({WRIST: None}, r"expected 2 camera\(s\).*got observation\.images\.image\. "),
        ({"observation.state": (6,)}, r"observation\.state: expected \[8\] \(x, y.*got \[6\]"),
        ({"action": (4,)}, r"action: expected \[7\].*libero-panda, got \[4\]\. This is another"),
    ],
)  # fmt: skip
def test_another_robot_is_refused(made, worlds, changed, words):
    config, _ = worlds
    feature, types = lerobot("configs.PolicyFeature"), lerobot("configs.FeatureType")
    shapes = SHAPES | {"observation.images.other": (3, 8, 8)} if IMAGE in changed else SHAPES
    shapes = {k: v for k, v in (shapes | changed).items() if v is not None}
    kinds = {"action": types.ACTION, "observation.state": types.STATE}
    config.features = {
        key: feature(kinds.get(key, types.VISUAL), (*s[1:], s[0]) if len(s) == 3 else s)
        for key, s in shapes.items()
    }
    config.features_map = {key: key for key in shapes}
    with pytest.raises(UserError, match=words):
        make_policy(made.run, config)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({IMAGE: torch.full((2, 3, 16, 16), 1.5)}, r"image: expected numbers.* 0 to 1, got 1\.5"),
        ({IMAGE: torch.full((2, 3, 16, 16), torch.nan)}, "image: expected numbers from 0 to 1"),
        ({IMAGE: torch.zeros(2, 16, 16, 3)}, r"expected \[2, 3, H, W\].*got \[2, 16, 16, 3\]"),
        ({IMAGE: torch.zeros(2, 3, 16, 20)}, "expected square images"),
        ({IMAGE: None}, r"image: expected a tensor, got none\. There is: observation"),
        ({"observation.state": torch.zeros(2, 9)}, r"state: expected \[8\].*got \[9\]"),
        ({"task": None}, "task: expected 2 instructions.*got None"),
        ({"task": ["one"]}, r"task: expected 2 instructions.*got \['one'\]"),
    ],
)  # fmt: skip
def test_other_observations_are_refused(made, worlds, changed, words):
    policy = make_policy(made.run, worlds[0])
    with pytest.raises(UserError, match=words):
        policy.select_action(batch()[0] | changed)


def test_what_is_no_checkpoint_is_refused(made, tmp_path):
    from lerobot_policy_worldenv.skin import checkpoint

    flag = "--policy.checkpoint"
    assert checkpoint("policy", str(made.run), flag).name == "policy-10.safetensors"
    file = made.run / "checkpoints" / "policy-sft.safetensors"
    assert checkpoint("policy", str(file), flag) == file
    with pytest.raises(UserError, match=r"--policy\.checkpoint: expected a policy, got none"):
        checkpoint("policy", None, flag)
    with pytest.raises(UserError, match=r"expected simulator-0\.safetensors.*got policy-10\.safe"):
        checkpoint("simulator", str(made.run), flag)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match=r"expected reflector-0\.safetensors.*got none"):
        checkpoint("reflector", str(tmp_path), flag)
    with pytest.raises(UserError, match="nobody/nothing here"):
        checkpoint("policy", "nobody/nothing", flag)


def test_a_run_without_a_world_is_refused(tmp_path):
    kind = lerobot("envs.EnvConfig").get_choice_class("worldenv_world")
    with pytest.raises(UserError, match=r"--env\.run: expected the folder"):
        kind().create_envs(1)
    config = replace(preset("smoke"), run_dir=tmp_path)
    real = replace(config.posttrain, world="real", rounds=1)
    for asked, words in (
        (replace(config, posttrain=real), "expected a run with a learned world"),
        (config, "has not run"),
    ):
        write_json(tmp_path / "config.json", to_dict(asked))
        with pytest.raises(UserError, match=words):
            kind(run=str(tmp_path)).create_envs(1)


def test_the_world_refuses_other_actions_and_rows(worlds):
    env = worlds[1](2)["libero_spatial"][8]
    env.reset(seed=[0, 1])
    with pytest.raises(UserError, match=r"actions: expected \[2, 7\] finite.*got \[2, 4\]"):
        env.step(np.zeros((2, 4), np.float32))
    with pytest.raises(UserError, match=r"got \[2, 7\] \(1 not finite\)"):
        env.step(np.array([[np.nan] + [0] * 6, [0] * 7]))
    with pytest.raises(UserError, match=r"expected 2 seeds.*got 1"):
        env.reset(seed=[0])
    with pytest.raises(UserError, match="reset_mask"):
        env.reset(options={"reset_mask": np.array([True, False])})


def test_neither_is_trained_in_lerobot(made, worlds):
    policy = make_policy(made.run, worlds[0])
    for ask in (
        policy.get_optim_params,
        lambda: policy.forward({}),
        policy.config.get_scheduler_preset,
    ):
        with pytest.raises(UserError, match=r"got training\. worldenv-train trains"):
            ask()


def test_a_judge_watches_as_many_episodes_as_begun(made):
    model = judge(made)
    model.compute_reward(batch(2)[0])
    with pytest.raises(UserError, match=r"expected the 2 episodes.*got 3\. Call reset"):
        model.compute_reward(batch(3)[0])
    model.reset()
    assert model.compute_reward(batch(3)[0]).shape == (3,)
