"""The imagined environment keeps the real one's interface and manners."""

import numpy as np
import pytest
import torch

from worldenv.config import ReflectorConfig, SimulatorConfig
from worldenv.data.windows import FrameSequence
from worldenv.envs.imagined import ImaginedVectorEnv, first_frames, middle_frames
from worldenv.envs.libero.robot import embodiment
from worldenv.envs.start import Start
from worldenv.models.reflector import Reflector
from worldenv.models.simulator import Simulator
from worldenv.rl.rollout import rollout
from worldenv.runtime.errors import UserError
from worldenv.runtime.seeds import generator


def sequence(frames: int = 5, success_from: int = 4) -> FrameSequence:
    g = generator("sequence")
    return FrameSequence(
        images=torch.randint(0, 255, (frames, 2, 16, 16, 3), dtype=torch.uint8, generator=g),
        proprio=torch.randn(frames, 8, generator=g),
        actions=torch.randn(frames - 1, 8, 7, generator=g),
        success=torch.arange(frames) >= success_from,
        steps=torch.arange(frames) * 8,
        episode=0,
        task=0,
        instruction="lift the cup",
    )


def make(rows: int, threshold: float = 2.0, **changes) -> ImaginedVectorEnv:
    torch.manual_seed(0)
    config = SimulatorConfig(width=48, layers=1, heads=2, window=2)
    simulator = Simulator(config, embodiment(16))
    reflector = Reflector(
        ReflectorConfig(width=16, encoder_channels=8, threshold=threshold), embodiment(16)
    )
    contexts = [*first_frames([sequence()]), *middle_frames([sequence()], 8)]
    options = {"max_chunks": 4, "sampling_steps": 1, **changes}
    return ImaginedVectorEnv(simulator, reflector, contexts, rows, **options)


def actor(observation):
    n = len(observation["proprio"])
    return torch.zeros(n, 8, 7), torch.full((n, 8, 7), -1.0)


def test_contexts_come_from_the_start_and_the_middle():
    first, middle = first_frames([sequence()]), middle_frames([sequence()], 8)
    assert [c.elapsed for c in first] == [0]
    assert [c.elapsed for c in middle] == [1, 2, 3]
    s = sequence()
    assert torch.equal(middle[1].image, s.images[1:3])
    assert torch.equal(middle[1].action[1], s.actions[1])
    assert not middle[1].action[0].any()


def test_the_gripper_of_a_context_is_open_or_not():
    s = sequence()
    s.proprio[1, 6:], s.proprio[2, 6:] = torch.tensor([0.039, -0.039]), torch.tensor([0.03, -0.03])
    robot = embodiment(16)
    openings = [robot.opening(c.proprio[-1].tolist()) for c in middle_frames([s], 8)]
    assert [d > robot.gripper_open for d in openings][:2] == [True, False]


def test_interface_and_truncation():
    env = make(3)
    starts = [Start(0, 0, 1), Start(0, 1, 2), Start(0, 3, 3)]
    observation, _ = env.reset(options={"starts": starts})
    assert observation["image"].shape == env.observation_space["image"].shape
    assert torch.equal(observation["image"][0], sequence().images[0])
    assert torch.equal(observation["image"][2], sequence().images[3])
    lasted = np.zeros(3, int)
    for _ in range(4):
        live = ~(env._terminated | env._truncated)
        observation, reward, terminated, truncated, info = env.step(torch.randn(3, 8, 7))
        lasted += live
        assert ((reward > 0).numpy() == live).all()
        assert not terminated.any()
    assert lasted.tolist() == [4, 3, 1]  # chunks before the context count
    assert truncated.all()
    assert info["steps"].tolist() == [32, 24, 8]
    frozen = observation["image"].clone()
    assert torch.equal(env.step(torch.randn(3, 8, 7))[0]["image"], frozen)


def test_the_reflector_ends_episodes():
    env = make(2, threshold=0.0)
    env.reset(seed=0)
    _, reward, terminated, truncated, info = env.step(torch.zeros(2, 8, 7))
    assert terminated.all()
    assert not truncated.any()
    assert info["success"].all()
    assert (reward > 0).all()
    assert info["success_step"].tolist() == [8, 8]


def test_imagined_episodes_do_not_depend_on_rows():
    starts = [Start(0, k % 4, 100 + k) for k in range(6)]
    many = rollout(make(4), actor, starts, seeds=list(range(6)))
    lone = rollout(make(1), actor, starts, seeds=list(range(6)))
    assert torch.equal(many.length, lone.length)
    torch.testing.assert_close(many.final_reward, lone.final_reward, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(many.proprio, lone.proprio, rtol=1e-4, atol=1e-4)


def test_bad_input_is_named():
    env = make(2)
    with pytest.raises(UserError, match="context index"):
        env.reset(options={"starts": [Start(0, 99, 0), Start(0, 0, 0)]})
    env.reset(seed=0)
    with pytest.raises(UserError, match=r"\(2, 8, 7\)"):
        env.step(torch.zeros(2, 7))
    with pytest.raises(UserError, match="at least one context"):
        ImaginedVectorEnv(env.simulator, env.reflector, [], 2, max_chunks=4, sampling_steps=1)


def mistaken(rows: int, rate: float, starts: list[Start], threshold: float = 0.999):
    """Episodes of a reflector that is never sure, but for its mistakes."""
    env = make(rows, threshold=threshold, false_stops=rate)
    return rollout(env, actor, starts, seeds=[0] * len(starts))


def test_false_stops_end_episodes_as_successes_at_chunks_of_their_own_seeds():
    starts = [Start(0, 0, 1, mistakes=k) for k in range(24)]
    all_of_them, once_more = mistaken(4, 1.0, starts), mistaken(3, 1.0, starts)
    assert all_of_them.terminated.all()
    assert all(info["success"] for info in all_of_them.info)
    assert torch.equal(all_of_them.length, once_more.length)  # whatever rows they ran in
    assert set(all_of_them.length.tolist()) == {1, 2, 3, 4}  # any chunk, the last one too
    torch.testing.assert_close(all_of_them.final_reward, torch.full((24,), (1 + 0.999) / 2))
    some = mistaken(4, 0.5, starts)
    assert 6 < int(some.terminated.sum()) < 18
    stopped = some.terminated
    assert torch.equal(some.length[stopped], all_of_them.length[stopped])  # a share of the same
    assert (some.length[~stopped] == 4).all()
    late = mistaken(2, 1.0, [Start(0, 3, 1, mistakes=k) for k in range(6)])
    assert (late.length == 1).all()  # one chunk is left of a context's four


def test_without_a_rate_or_a_seed_nobody_errs():
    seeds, none = ([Start(0, 0, 1, mistakes=m) for m in ms] for ms in ([1, 2, 3], [None] * 3))
    plain = rollout(make(2, threshold=0.999), actor, none, seeds=[0] * 3)
    for got in (mistaken(2, 0.0, seeds), mistaken(2, 1.0, none)):
        assert torch.equal(got.reward, plain.reward)
        assert not got.terminated.any()


def test_where_the_reflector_says_success_itself_there_is_no_mistake():
    starts = [Start(0, 0, 1, mistakes=k) for k in range(4)]
    sure = mistaken(2, 1.0, starts, threshold=0.001)
    plain = rollout(make(2, threshold=0.001), actor, starts, seeds=[0] * 4)
    assert torch.equal(sure.final_reward, plain.final_reward)
