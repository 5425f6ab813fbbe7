"""Several processes are one run: the same bits, one writer, and a lost one is named."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from worldenv.runtime import ranks, watch

SCRIPT = Path(__file__).with_name("ranked.py")


@pytest.fixture(scope="module")
def store():
    """A store as torchrun's agent keeps one: it outlives every rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return torch.distributed.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)


def start(what: str, folder: Path, count: int, store=None, **more: str) -> list[subprocess.Popen]:
    folder.mkdir(parents=True, exist_ok=True)
    environment = {k: v for k, v in os.environ.items() if k != "RANK"}
    if store is not None:
        environment |= {
            "WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": str(abs(hash(folder)) % 10**6),
        }
    return [
        subprocess.Popen(
            [sys.executable, SCRIPT, what, folder],
            env=environment | ({"RANK": str(rank)} if store is not None else {}) | more,
            stdout=(folder / f"rank-{rank}.log").open("w"),
        )
        for rank in range(count)
    ]


def found(folder: Path, count: int, processes: list[subprocess.Popen]) -> list[dict]:
    for process in processes:
        assert process.wait(60) == 0
    return [torch.load(folder / str(rank), weights_only=False) for rank in range(count)]


def test_gradients_and_pieces_are_bit_for_bit_those_of_one_process(tmp_path, store):
    (alone,) = start("trained", tmp_path, 1)
    assert alone.wait(60) == 0
    expected = torch.load(tmp_path / "alone", weights_only=False)
    for count in (2, 3):
        folder = tmp_path / f"of-{count}"
        for own in found(folder, count, start("trained", folder, count, store)):
            for got, want in zip(own["parameters"], expected["parameters"], strict=True):
                assert torch.equal(got, want)
            assert own["logged"] == expected["logged"]
            assert torch.equal(torch.stack(own["values"]), torch.stack(expected["values"]))


def test_ranks_tell_each_other_and_one_acts_for_all(tmp_path, store):
    every = found(tmp_path, 2, start("told", tmp_path, 2, store))
    for own in every:
        assert [part["rank"] for part in own["gathered"]] == [0, 1]
        assert own["gathered"][1]["x"].tolist() == [1, 1]
        assert own["once"] == (every[0]["once"][0], 1)
        assert own["error"] == "division by zero"
        assert own["merged"] == [k * k for k in range(9)]
    assert sorted(every[0]["mine"] + every[1]["mine"]) == list(range(9))


@pytest.mark.parametrize(
    ("how", "number", "words"),
    [
        ("fail", None, "rank 1 is gone: it ended with: RuntimeError: the disk is on fire"),
        ("die", signal.SIGKILL, "rank 1 is gone: it was killed; the last it said"),
    ],
)
def test_a_lost_rank_is_named_with_its_last_words(how, number, words, tmp_path, store):
    first, last = start("lost", tmp_path, 2, store, HOW=how)
    if number:
        until(lambda: (tmp_path / "pid-1").exists() and (tmp_path / "pid-0").exists())
        last.send_signal(number)
    assert first.wait(60) == 0
    last.wait(10)
    assert words in torch.load(tmp_path / "0", weights_only=False)["blamed"]


def test_a_rank_that_stands_still_is_given_up(tmp_path, store):
    """In seconds here, where it is half a minute else."""
    code = f"import worldenv.runtime.watch as w; w.BEAT, w.SILENCE = .1, 2.; import runpy, sys; sys.argv = ['', 'lost', {str(tmp_path)!r}]; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    environment = {
        "HOW": "hang",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "77",
    }
    first, last = (
        subprocess.Popen(
            [sys.executable, "-c", code],
            env=os.environ | environment | {"RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    )
    until(lambda: (tmp_path / "pid-1").exists() and (tmp_path / "pid-0").exists())
    last.send_signal(signal.SIGSTOP)
    try:
        _, said = first.communicate(timeout=60)
    finally:
        last.kill()
        last.communicate()
    assert first.returncode == 2
    assert "rank 1 is gone: no sign of life for 2 s" in said


def until(true) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_one_process_needs_no_others(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    ranks.join(torch.device("cpu"))
    assert (ranks.count(), ranks.number(), ranks.lead()) == (1, 0, True)
    assert ranks.gather(3) == [3]
    assert ranks.together(lambda: 4) == 4
    assert list(ranks.Claims(3)) == [0, 1, 2]
    assert ranks.share(5) == slice(0, 5)


@pytest.mark.parametrize(
    ("name", "value"), [("MASTER_ADDR", ""), ("MASTER_PORT", "none"), ("RANK", "first")]
)
def test_an_environment_that_torchrun_did_not_set_is_refused(name, value, monkeypatch):
    stated = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for key, given in (stated | {name: value}).items():
        monkeypatch.setenv(key, given)
    with pytest.raises(ranks.UserError, match=f"{name}: expected what torchrun sets"):
        ranks.join(torch.device("cpu"))


def test_silence_is_longer_than_any_pause():
    assert watch.SILENCE >= 10 * watch.BEAT
