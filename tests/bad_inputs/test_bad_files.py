"""Every kind of file that is read, in every state that a file can be found in."""

import os
import zipfile
from dataclasses import replace

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from table import Row, ends_in_a_named_error

from worldenv import cli
from worldenv.config import Config, EnvConfig, PolicyConfig, ReflectorConfig, load
from worldenv.data.episodes import read_episodes
from worldenv.runtime.errors import UserError
from worldenv.runtime.logging import read_metrics
from worldenv.stages import imagine, store
from worldenv.stages.run import open_run

SMALL = replace(
    Config(env=EnvConfig(image_size=16)),
    policy=PolicyConfig(width=8, layers=1, heads=1, encoder_channels=8),
    reflector=ReflectorConfig(width=8, encoder_channels=8),
    simulator=replace(Config().simulator, patch=8, width=16, layers=1, heads=1),
)


def missing(path, whole):
    return


def folder(path, whole):
    path.mkdir()


def empty(path, whole):
    path.write_bytes(b"")


def truncated(path, whole):
    path.write_bytes(whole[: len(whole) // 2])


def one_byte_short(path, whole):
    path.write_bytes(whole[:-1])


def text(path, whole):
    path.write_text("Not Found\n")


def zeros(path, whole):
    path.write_bytes(bytes(len(whole)))


def zipped(path, whole):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("content", whole)


def dangling_link(path, whole):
    path.symlink_to(path.with_name("gone"))


def link_to_itself(path, whole):
    path.symlink_to(path)


def device(path, whole):
    path.symlink_to("/dev/null")


def unreadable(path, whole):
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    path.write_bytes(whole)
    path.chmod(0)


STATES = (
    *(missing, folder, empty, truncated, one_byte_short, text, zeros, zipped),
    *(dangling_link, link_to_itself, device, unreadable),
)


def checkpoint_bytes(kind: str, folder) -> bytes:
    path = folder / "whole.safetensors"
    store.save(kind, store.build(kind, SMALL), path)
    return path.read_bytes()


def episodes_bytes(folder) -> bytes:
    path = folder / "whole.hdf5"
    with h5py.File(path, "w") as file:
        demo = file.create_group("data/demo_0")
        demo["actions"], demo["dones"] = np.zeros((4, 7)), np.zeros(4, bool)
    return path.read_bytes()


def in_every_state():
    kinds = {
        "policy.safetensors": (
            lambda f: checkpoint_bytes("policy", f),
            lambda p: store.load("policy", p),
        ),
        "simulator.safetensors": (
            lambda f: checkpoint_bytes("simulator", f),
            lambda p: store.load("simulator", p),
        ),
        "reflector.safetensors": (
            lambda f: checkpoint_bytes("reflector", f),
            lambda p: store.load("reflector", p),
        ),
        "config.json": (lambda f: b'{"seed": 1}', load),
        "run/config.json": (lambda f: b'{"seed": 1}', lambda p: open_run(p.parent)),
        "task_demo.hdf5": (episodes_bytes, read_episodes),
    }
    for name, (whole, read) in kinds.items():
        for state in STATES:

            def act(folder, name=name, whole=whole, read=read, state=state):
                path = folder / name
                path.parent.mkdir(exist_ok=True)
                scratch = folder / "scratch"
                scratch.mkdir()
                state(path, whole(scratch))
                return read(path)

            yield Row(f"{name}: {state.__name__}", act, name.split("/")[-1])


@pytest.mark.parametrize("row", list(in_every_state()), ids=str)
def test_a_file_in_a_bad_state_is_named(row, tmp_path, capsys):
    ends_in_a_named_error(row, tmp_path, capsys)


FOREIGN = {
    "published weights": lambda p: save_file({"w": torch.zeros(2)}, p),
    "weights with other facts": lambda p: save_file({"w": torch.zeros(2)}, p, {"format": "pt"}),
    "a reflector": lambda p: store.save("reflector", store.build("reflector", SMALL), p),
    "a torch pickle": lambda p: torch.save({"w": torch.zeros(2)}, p),
    "an array": lambda p: np.save(p.open("wb"), np.zeros(3)),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_another_programs_checkpoint_is_named(name, tmp_path, capsys):
    def act(folder):
        FOREIGN[name](folder / "policy.safetensors")
        return store.load("policy", folder / "policy.safetensors")

    ends_in_a_named_error(Row(name, act, "policy.safetensors"), tmp_path, capsys)


LOGS = {
    "absent": (None, 0),
    "empty": (b"", 0),
    "cut short": (b'{"stage": "a", "step": 1}\n{"stage": "a", "st', 1),
    "not JSON": (b"hello\n", None),
    "a list": (b"[1]\n", None),
    "a number": (b"3\n", None),
    "without a step": (b'{"stage": "a"}\n', None),
    "Latin-1": ('{"stage": "für", "step": 1}\n'.encode("latin-1"), None),
    "nested deep": (b"[" * 100_000 + b"\n", None),
}


@pytest.mark.parametrize("name", LOGS)
def test_a_damaged_log_is_read_as_far_as_it_is_whole_or_named(name, tmp_path):
    content, rows = LOGS[name]
    if content is not None:
        (tmp_path / "metrics.jsonl").write_bytes(content)
    if rows is None:
        with pytest.raises(UserError, match=r"metrics\.jsonl"):
            read_metrics(tmp_path)
    else:
        assert len(read_metrics(tmp_path)) == rows


# ------------------------------------------------------------------ worldenv-imagine and collect


def call(script: str, *arguments: str):
    def act(folder):
        cli.sys.argv = [f"worldenv-{script}", *(a.format(folder=folder) for a in arguments)]
        return {"imagine": cli._imagine, "collect": cli._collect, "eval": cli._evaluate}[script]()

    return Row(" ".join(arguments), act, arguments[0] if arguments else "")


CALLS = [
    call("imagine", "--starts"),
    call("imagine", "--starts", "1000001"),
    call("imagine", "--starts", "-1"),
    call("imagine", "--steps", "-1"),
    call("imagine", "--steps", "0"),
    call("imagine", "--count", "0"),
    call("imagine", "--count", "-3"),
    call("imagine", "--drive", "hands"),
    call("collect", "--episodes", "0"),
    call("collect", "--episodes", "51"),
    call("collect", "--tasks", "10"),
    call("collect", "--tasks"),
    call("collect", "--noise", "nan"),
    call("collect", "--push", "-0.1"),
    call("collect", "--scale", "0"),
    call("collect", "--seed", "-1"),
    call("eval", "--starts", "0"),
    call("eval", "--starts", "0", "1000001"),
    call("eval", "--fixture-seeds"),
    call("eval", "--fixture-seeds", "1", "1"),
    call("eval", "--fixture-seeds", "99999999999999999999"),
]


@pytest.mark.parametrize(("name", "value"), [("chunk", 4), ("image_size", 32)])
def test_collecting_with_a_policy_of_other_sizes_is_refused(name, value, tmp_path, monkeypatch):
    """It ended in a matmul traceback, or in a wrong word about actions after an episode."""
    config = replace(SMALL, env=EnvConfig(**{"image_size": 64, "chunk": 8, name: value}))
    path = tmp_path / "policy.safetensors"
    store.save("policy", store.build("policy", config), path)
    words = ["collect", "policy", "--policy", str(path), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(cli.sys, "argv", words)
    with pytest.raises(UserError, match=rf"trained with env.{name} {value}, got"):
        cli._collect()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("row", CALLS, ids=str)
def test_a_bad_argument_is_named(row, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli.sys, "argv", [])
    ends_in_a_named_error(row, tmp_path, capsys)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"episodes": []}, "nothing|at least one episode"),
        ({"steps": 0}, "at least 1 denoising step"),
        ({"steps": -1}, "at least 1 denoising step"),
        ({"drive": "policy"}, "expected a policy"),
    ],
)
def test_imagining_nothing_is_refused(arguments, words, tmp_path):
    episodes = arguments.pop("episodes", ["an episode"])
    with pytest.raises(UserError, match=words):
        imagine.imagine(None, episodes, None, None, tmp_path, "label", **arguments)
