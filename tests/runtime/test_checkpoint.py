"""Checkpoints outlive kills and full disks, name what is wrong with a file, and resume exactly."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from worldenv.runtime import checkpoint, seeds
from worldenv.runtime.errors import UserError


def test_round_trip(tmp_path: Path):
    tied = torch.randn(3, 4)
    tensors = {
        "a": tied,
        "tied": tied,
        "slice": torch.arange(10)[2:5],
        "transposed": torch.randn(3, 5).T,
        "half": torch.randn(2).bfloat16(),
        "scalar": torch.tensor(1.5, dtype=torch.float64),
        "empty": torch.empty(0, 3),
        "empty too": torch.empty(0),
    }
    metadata = {"step": 3, "config": {"lr": 0.1, "name": "ü"}, "list": [1, None, True]}
    path = tmp_path / "new folder" / "x.safetensors"
    checkpoint.save(path, tensors, metadata)
    back, found = checkpoint.load(path)
    assert found == metadata
    assert back.keys() == tensors.keys()
    for name in tensors:
        assert torch.equal(back[name], tensors[name]), name
        assert back[name].dtype == tensors[name].dtype
    assert os.listdir(path.parent) == ["x.safetensors"]


def test_bad_files_are_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"No checkpoint at .*none\.safetensors"):
        checkpoint.load(tmp_path / "none.safetensors")
    whole = tmp_path / "whole.safetensors"
    checkpoint.save(whole, {"a": torch.zeros(1000)}, {})
    cut = tmp_path / "cut.safetensors"
    for size in (0, 5, 40, whole.stat().st_size - 1):
        cut.write_bytes(whole.read_bytes()[:size])
        with pytest.raises(UserError, match="truncated or no safetensors file"):
            checkpoint.load(cut)
    cut.write_bytes(b"PK\x03\x04" + bytes(4096))
    with pytest.raises(UserError, match="truncated or no safetensors file"):
        checkpoint.load(cut)
    save_file({"a": torch.zeros(2)}, tmp_path / "foreign.safetensors")
    with pytest.raises(UserError, match="not one of worldenv's"):
        checkpoint.load(tmp_path / "foreign.safetensors")


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "x.safetensors"
    checkpoint.save(path, {"a": torch.ones(4)}, {"step": 1})

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    for target, name in ((checkpoint, "save_file"), (checkpoint.os, "replace")):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, full)
            with pytest.raises(UserError, match=r"disk that holds .* is full"):
                checkpoint.save(path, {"a": torch.zeros(4)}, {"step": 2})
        assert os.listdir(tmp_path) == ["x.safetensors"]
        tensors, metadata = checkpoint.load(path)
        assert metadata == {"step": 1}
        assert torch.equal(tensors["a"], torch.ones(4))


def test_a_really_full_disk(tmp_path: Path):
    """On a file system of one megabyte, where this user may mount one."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    if os.getuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small file system needs root")
    try:
        path = tmp_path / "x.safetensors"
        checkpoint.save(path, {"a": torch.ones(1000)}, {"step": 1})
        with pytest.raises(UserError, match=r"disk that holds .* is full"):
            checkpoint.save(path, {"a": torch.zeros(1_000_000)}, {"step": 2})
        assert os.listdir(tmp_path) == ["x.safetensors"]
        assert checkpoint.load(path)[1] == {"step": 1}
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_path_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Cannot write"):
        checkpoint.save(tmp_path / "file" / "x.safetensors", {"a": torch.ones(1)}, {})


def test_metadata_must_be_json(tmp_path: Path):
    with pytest.raises(ValueError, match="JSON"):
        checkpoint.save(tmp_path / "x", {}, {"loss": float("nan")})
    assert os.listdir(tmp_path) == []


def test_load_module_names_every_difference():
    source = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).state_dict()
    target = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5, bias=False))
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    with pytest.raises(UserError) as raised:
        checkpoint.load_module(target, source, "run/policy.safetensors")
    text = str(raised.value)
    assert "run/policy.safetensors does not fit Sequential" in text
    assert "unexpected 1.bias" in text
    assert "1.weight: expected [5, 4], got [2, 4]" in text
    assert all(torch.equal(before[name], t) for name, t in target.state_dict().items())
    with pytest.raises(UserError, match=r"missing 1\.weight"):
        checkpoint.load_module(target, {"0.weight": source["0.weight"]}, "x")


def _train(path: Path, kill_at: int = -1) -> None:
    """Forty steps with a checkpoint every five; goes on from `path` if it exists."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 2))
    groups = [{"params": model[0].parameters(), "lr": 1e-2}, {"params": model[2].parameters()}]
    optimizer = torch.optim.AdamW(groups, lr=3e-3, betas=(0.8, 0.95))
    start = 0
    if path.exists():
        tensors, metadata = checkpoint.load(path)
        checkpoint.load_training(model, optimizer, tensors, path)
        start = metadata["step"]
    for step in range(start, 40):
        if step == 20:
            optimizer.param_groups[0]["lr"] *= 0.5
        x = torch.randn(8, 6, generator=seeds.generator(0, "demo", step))
        loss = (model(x) - x[:, :2].sin()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if step % 5 == 4:
            state = checkpoint.training_tensors(model, optimizer)
            checkpoint.save(path, state, {"step": step + 1})


def test_a_killed_run_resumes_bit_for_bit(tmp_path: Path):
    _train(tmp_path / "whole")
    command = [sys.executable, __file__, str(tmp_path / "killed"), "27"]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert checkpoint.load(tmp_path / "killed")[1] == {"step": 25}
    _train(tmp_path / "killed")
    whole, killed = checkpoint.load(tmp_path / "whole"), checkpoint.load(tmp_path / "killed")
    assert whole[1] == killed[1] == {"step": 40}
    assert whole[0].keys() == killed[0].keys()
    assert any(name.endswith("exp_avg_sq") for name in whole[0])
    assert whole[0]["optimizer/group/0/lr"] == 5e-3
    for name in whole[0]:
        assert torch.equal(whole[0][name], killed[0][name]), name


def test_optimizer_state_of_another_model_is_refused():
    first, second = nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2))
    optimizer = torch.optim.AdamW(first.parameters())
    first(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    tensors = checkpoint.optimizer_tensors(optimizer, first)
    other = torch.optim.AdamW(second.parameters())
    with pytest.raises(UserError, match="which the model lacks"):
        checkpoint.load_optimizer(other, second, tensors)
    with pytest.raises(UserError, match="lacks the optimizer's 'lr'"):
        checkpoint.load_optimizer(other, second, {})
    with pytest.raises(ValueError, match="is not the module's"):
        checkpoint.optimizer_tensors(optimizer, second)


def test_metadata_sits_in_the_header(tmp_path: Path):
    """Other tools can read it without worldenv."""
    path = tmp_path / "x.safetensors"
    checkpoint.save(path, {"a": torch.zeros(1)}, {"step": 9})
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert json.loads(header["__metadata__"]["worldenv"]) == {"step": 9}


if __name__ == "__main__":  # the run that is killed
    torch.set_num_threads(1)
    _train(Path(sys.argv[1]), int(sys.argv[2]))


def test_moments_come_back_in_the_layout_of_their_parameter(tmp_path):
    """The fused optimizer pairs parameters and moments by memory order."""

    def fresh():
        torch.manual_seed(0)
        module = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        return module, torch.optim.AdamW(module.parameters(), 0.1, fused=True)

    def step(module, optimizer, number: int) -> None:
        x = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(number))
        optimizer.zero_grad()
        module(x).square().sum().backward()
        optimizer.step()

    whole, whole_optimizer = fresh()
    for number in range(4):
        step(whole, whole_optimizer, number)
    first, optimizer = fresh()
    for number in range(2):
        step(first, optimizer, number)
    path = tmp_path / "partial.safetensors"
    checkpoint.save(path, checkpoint.training_tensors(first, optimizer), {})
    resumed, optimizer = fresh()
    checkpoint.load_training(resumed, optimizer, checkpoint.load(path)[0], path)
    for number in range(2, 4):
        step(resumed, optimizer, number)
    assert all(map(torch.equal, whole.parameters(), resumed.parameters()))
