"""WoVR's reward networks: the published layout, the formula, and what a folder must hold."""

import pytest
import torch
import torch.nn.functional as F
from published.damage import RAN, Payload

from worldenv.config import ReflectorConfig
from worldenv.envs.libero.robot import embodiment
from worldenv.layouts import vae as published
from worldenv.models.wovr_reward import ImageNet, TaskNet, WoVRReflector, WoVRReward, load_reward
from worldenv.runtime.errors import UserError
from worldenv.runtime.seeds import generator

TASKS = published.TASKS


def images(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, (*shape, 3), dtype=torch.uint8, generator=generator("judged"))


def features(state: dict, x: torch.Tensor, at: str) -> torch.Tensor:
    """The encoder written out, from its tensors alone."""

    def conv(x, name, stride=1):
        weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
        return F.conv2d(x, weight, bias, stride, padding=weight.shape[-1] // 2)

    def norm(x, name):
        mean, var, weight, bias = (
            state[f"{name}.{part}"][:, None, None]
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / torch.sqrt(var + 1e-5) * weight + bias

    x = F.relu(norm(conv(x, f"{at}.0.0", 2), f"{at}.0.1"))
    x = F.max_pool2d(x, 3, 2, 1)
    for stage in range(1, 5):
        for block in range(2):
            name, stride = f"{at}.{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            y = F.relu(norm(conv(x, f"{name}.conv1", stride), f"{name}.bn1"))
            y = norm(conv(y, f"{name}.conv2"), f"{name}.bn2")
            x = F.relu(y + (conv(x, f"{name}.conv3", stride) if stride == 2 else x))
    return x.mean((2, 3))


def test_tensors_have_the_published_names_and_sizes():
    with torch.device("meta"):
        plain, by_task = ImageNet().state_dict(), TaskNet().state_dict()
    assert len(plain) == 127
    assert plain["net.0.0.weight"].shape == (64, 3, 7, 7)
    assert plain["net.4.1.conv2.bias"].shape == (512,)
    assert plain["net.2.0.conv3.weight"].shape == (128, 64, 1, 1)
    assert plain["net.7.weight"].shape == (1, 512)
    assert by_task["fusion_layer.0.weight"].shape == (256, 576)
    assert by_task["fusion_layer.3.weight"].shape == (1, 256)
    # The published file of Goal has 45,379,978 bytes: these, and how PyTorch packs them.
    size = sum(tensor.nbytes for tensor in by_task.values())
    assert size == 45_343_884


def test_an_image_is_judged_by_the_published_formula(tmp_path):
    state = published.reward(tmp_path).state_dict()
    judge = load_reward(tmp_path)
    image = images(4, 2, 32, 32)
    x = (image[:, 0].float() / 127.5 - 1).permute(0, 3, 1, 2)
    logit = features(state, x, "net") @ state["net.7.weight"].T + state["net.7.bias"]
    watcher = judge.onlooker(4)
    watcher.reset(torch.ones(4, dtype=torch.bool))
    got = watcher.watch(image, torch.zeros(4, 3), ["anything"] * 4, torch.ones(4).bool())
    torch.testing.assert_close(got, torch.sigmoid(logit)[:, 0], rtol=1e-5, atol=1e-6)
    assert torch.equal(got > judge.threshold, torch.round(got) == 1)
    other = WoVRReward(judge.network, view=1)(image, [""] * 4)
    assert not torch.allclose(other, got)


def test_of_a_run_s_reflector_the_thresholds_alone_are_kept(tmp_path):
    published.reward(tmp_path)
    config = ReflectorConfig(kind="wovr", folder=tmp_path, calibrate=False, threshold=0.5)
    state = WoVRReflector(config, embodiment(16)).state_dict()
    assert set(state) == {"threshold", "real_threshold", "proprio_mean", "proprio_std"}
    assert float(state["threshold"]) == float(state["real_threshold"]) == 0.5


def test_a_task_is_joined_with_the_image(tmp_path):
    state = published.reward(tmp_path, by_task=True).state_dict()
    judge = load_reward(tmp_path, TASKS)
    image, words = images(3, 1, 32, 32), [TASKS[2], TASKS[0], TASKS[2]]
    x = (image[:, 0].float() / 127.5 - 1).permute(0, 3, 1, 2)
    joined = torch.cat(
        [features(state, x, "visual_encoder"), state["task_embedding.weight"][[2, 0, 2]]], 1
    )
    hidden = F.relu(joined @ state["fusion_layer.0.weight"].T + state["fusion_layer.0.bias"])
    logit = hidden @ state["fusion_layer.3.weight"].T + state["fusion_layer.3.bias"]
    got = judge(image, words)
    torch.testing.assert_close(got, torch.sigmoid(logit)[:, 0], rtol=1e-5, atol=1e-6)
    with pytest.raises(UserError, match="Did you mean 'open the drawer'"):
        judge(image, [TASKS[0], TASKS[1], "open the drawr"])


def test_training_mode_does_not_reach_it(tmp_path):
    published.reward(tmp_path)
    judge, image = load_reward(tmp_path), images(2, 1, 32, 32)
    before = judge(image, [""] * 2)
    judge.train()
    assert torch.equal(judge(image, [""] * 2), before)
    assert not any(p.requires_grad for p in judge.parameters())


def test_a_checkpoint_around_the_weights_is_unwrapped(tmp_path):
    state = published.reward(tmp_path / "a").state_dict()
    torch.save({"model_state_dict": state, "epoch": 3}, tmp_path / "resnet_rm.pth")
    image = images(2, 1, 32, 32)
    expected = load_reward(tmp_path / "a")(image, [""] * 2)
    assert torch.equal(load_reward(tmp_path / "resnet_rm.pth")(image, [""] * 2), expected)


def test_bad_folders_are_named(tmp_path, capsys):
    def refused(words, tasks=()):
        with pytest.raises(UserError) as caught:
            load_reward(tmp_path, tasks)
        assert words in str(caught.value)
        assert str(tmp_path) in str(caught.value)

    refused("got neither")
    state = published.reward(tmp_path, by_task=True).state_dict()
    refused("expected instructions for its 3 tasks, got 2", TASKS[:2])
    file = tmp_path / "taskemb_resnet_rm.pth"
    torch.save({k: v for k, v in state.items() if "embedding" not in k}, file)
    refused("got 0")
    published.reward(tmp_path)
    refused("got resnet_rm.pth and taskemb_resnet_rm.pth")
    file.unlink()
    file = tmp_path / "resnet_rm.pth"
    good = torch.load(file, weights_only=True)
    torch.save({**good, "net.7.weight": torch.zeros(2, 32)}, file)
    refused("net.7.weight: expected [1, 32], got [2, 32]")
    torch.save({**good, "net.7.bias": torch.tensor([float("nan")])}, file)
    refused("net.7.bias [1]: expected finite weights, got 1 NaN")
    torch.save({"backbone.0.weight": torch.zeros(2)}, file)
    refused("got backbone.0.weight")
    # A public port had to stand in for a function that some of these files refer to.
    torch.save({"model_state_dict": good, "train": Payload()}, file)
    refused("expected tensors alone, got a pickle")
    assert RAN not in capsys.readouterr().out
