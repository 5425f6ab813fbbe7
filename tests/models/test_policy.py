"""Policy, critic and augmentation."""

import torch

from worldenv.config import PolicyConfig
from worldenv.envs.libero.robot import embodiment
from worldenv.models.policy import Policy, ValueHead, augment, random_shift
from worldenv.rl.policy import Policy as Protocol
from worldenv.rl.policy import parameter_groups
from worldenv.runtime.seeds import generator

SMALL = PolicyConfig(width=32, layers=1, heads=2, encoder_channels=8)


def observation(n: int = 3) -> dict:
    image = torch.randint(0, 255, (n, 2, 32, 32, 3), dtype=torch.uint8, generator=generator("o"))
    words = ("lift the cup", "open the drawer", "lift the cup")[:n]
    return {"image": image, "proprio": torch.randn(n, 8), "instruction": words}


def test_a_chunk_comes_out_and_the_scale_stays_in_its_range():
    torch.manual_seed(0)
    mu, log_scale = Policy(SMALL, embodiment(32))(observation())
    assert mu.shape == log_scale.shape == (3, 8, 7)
    assert log_scale.min() >= SMALL.min_log_scale
    assert log_scale.max() <= 0


def test_the_scale_head_never_trains_the_trunk():
    policy = Policy(SMALL, embodiment(32))
    policy(observation())[1].sum().backward()
    touched = {n for n, p in policy.named_parameters() if p.grad is not None and p.grad.any()}
    assert touched == {"log_scale.weight", "log_scale.bias"}


def test_the_instruction_and_each_view_matter():
    torch.manual_seed(0)
    policy, view = Policy(SMALL, embodiment(32)).eval(), observation()
    mu, _ = policy(view)
    other = {**view, "instruction": ("open the drawer",) * 3}
    assert not torch.allclose(policy(other)[0][0], mu[0])
    assert torch.allclose(policy(other)[0][1], mu[1], atol=1e-6)
    for v in range(2):
        image = view["image"].clone()
        image[:, v] = 0
        assert not torch.allclose(policy({**view, "image": image})[0], mu)


def test_it_is_a_policy_as_rollouts_updates_and_imitation_know_them():
    torch.manual_seed(0)
    policy, view = Policy(SMALL, embodiment(32)).eval(), observation()
    assert isinstance(policy, Protocol)
    mu, log_scale, features = policy.both(view)
    assert all(map(torch.equal, (mu, log_scale), policy(view)))
    assert features.shape == (3, policy.feature_width)
    assert policy.command(mu) is policy.normalise(mu) is mu
    (group,) = parameter_groups(policy, 1e-3)
    assert [*map(id, group["params"])] == [*map(id, policy.parameters())]


def test_imitation_sees_images_and_proprio_disturbed_by_its_generator():
    torch.manual_seed(0)
    policy, view, still = Policy(SMALL, embodiment(32)).eval(), observation(), torch.zeros(8)
    seen = [policy.augmented(view, generator(k), 1, still)[0] for k in "aab"]
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])
    moved = policy.augmented(view, generator("a"), 1, torch.eye(8)[2])[0]
    assert not torch.equal(moved, seen[0])
    policy.proprio_std[2] = 1e9  # now only what was disturbed does not matter
    torch.testing.assert_close(
        policy.augmented(view, generator("a"), 1, torch.eye(8)[2])[0],
        policy.augmented(view, generator("a"), 1, still)[0],
    )


def test_a_value_head_gives_one_value_per_row():
    features = Policy(SMALL, embodiment(32)).both(observation())[2]
    assert ValueHead(32)(features.bfloat16()).shape == (3,)


def test_shift_moves_pixels_by_at_most_pad_and_is_reproducible():
    image = torch.zeros(16, 3, 9, 9)
    image[:, :, 4, 4] = 1
    moved = random_shift(image, 1, generator("shift"))
    assert torch.equal(moved, random_shift(image, 1, generator("shift")))
    spots = moved[:, 0].flatten(1).argmax(1)
    assert ((spots // 9 - 4).abs() <= 1).all()
    assert ((spots % 9 - 4).abs() <= 1).all()
    assert len(spots.unique()) > 3
    views = torch.rand(2, 5, 3, 9, 9)
    assert augment(views, 1, generator("a")).shape == views.shape
