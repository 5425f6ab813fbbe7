"""Signals that ask to stop, sent to real processes: while importing, training, cleaning up."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from forked import Forked

from worldenv import cli  # noqa: F401 - what is forked has imported it
from worldenv.runtime import signals

# A shell starts background jobs with SIGINT ignored, nohup with SIGHUP, and children inherit that.
USUAL = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGTERM, signal.SIG_DFL)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
"""
TOY = """
import sys, time
from pathlib import Path
import torch
from worldenv import cli
from worldenv.config import Config
from worldenv.stages import training
from worldenv.stages.run import Run

def work():
    run = Run(Config(run_dir=Path(sys.argv[1]), device="cpu"))
    module = torch.nn.Linear(4, 2)
    def loss_at(step, shard):
        if shard == 0:
            print("step", step, flush=True)
        time.sleep(0.05)
        loss = module(torch.ones(1, 4)).square().mean()
        return loss, {"loss": loss.detach()}
    training.train(run, "toy", "mark", module, loss_at, steps=10_000, lr=0.1)

cli._guarded(work)
"""
SLOW_CLEANUP = """
import time
from worldenv import cli

def work():
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        print("cleaning", flush=True)
        time.sleep(60)

cli._guarded(work)
"""


def start(code: str, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", USUAL + code, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def ended(process: subprocess.Popen) -> tuple[int, str]:
    try:
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, errors


def await_library(process: subprocess.Popen, name: str) -> None:
    """Until the process has mapped a library of that name: it is in the middle of its imports."""
    maps = Path(f"/proc/{process.pid}/maps")
    deadline = time.monotonic() + 60
    while name not in maps.read_text():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.parametrize(
    ("number", "library"),
    [
        (signal.SIGINT, "_multiarray_umath"),
        (signal.SIGINT, "libtorch_cpu"),
        (signal.SIGINT, "h5py"),
        (signal.SIGTERM, "libtorch_cpu"),
        (signal.SIGHUP, "libtorch_cpu"),
    ],
)
def test_stopped_while_importing_it_says_so_in_one_line(number, library):
    process = start("from worldenv.entry import train; train()", "--help")
    await_library(process, library)
    process.send_signal(number)
    code, errors = ended(process)
    assert (code, errors) == (128 + number, "\nstopped\n")


@pytest.mark.parametrize("number", signals.STOPPING, ids=lambda n: n.name)
def test_a_stopped_training_saves_the_step_in_hand(number, tmp_path):
    process = Forked(USUAL + TOY, str(tmp_path))
    for line in process.stdout:
        if line.startswith("step 3"):
            break
    os.kill(process.pid, number)
    code, errors = process.ended()
    assert code == 128 + number
    assert "stopped; the same command goes on from here" in errors
    assert "Traceback" not in errors
    assert (tmp_path / "checkpoints" / "toy.partial.safetensors").is_file()


def test_an_impatient_second_signal_ends_at_once():
    process = Forked(USUAL + SLOW_CLEANUP)
    assert process.stdout.readline() == "ready\n"
    os.kill(process.pid, signal.SIGTERM)
    assert process.stdout.readline() == "cleaning\n"
    os.kill(process.pid, signal.SIGINT)
    begun = time.monotonic()
    assert process.ended() == (130, "\nstopped\n")
    assert time.monotonic() - begun < 30


def test_nohup_goes_on():
    code = """
import os, signal
signal.signal(signal.SIGHUP, signal.SIG_IGN)
from worldenv import cli
cli._guarded(lambda: os.kill(os.getpid(), signal.SIGHUP))
"""
    assert Forked(USUAL + code).ended() == (0, "")


def workers_of(process: subprocess.Popen) -> list[int]:
    """Its simulators; it has other children too, such as the one that tries how to render."""
    found = []
    for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        try:
            command = Path(f"/proc/{pid}/cmdline").read_text()
        except FileNotFoundError:  # it ended since it was listed
            continue
        found += [int(pid)] * ("envs.server" in command)
    return found


@pytest.mark.libero
@pytest.mark.slow
def test_a_terminated_collection_leaves_no_worker(tmp_path):
    process = start(
        "from worldenv.entry import collect; collect()",
        *("expert", "--episodes", "4", "--out", str(tmp_path)),
    )
    deadline = time.monotonic() + 120
    while not (workers := workers_of(process)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    code, errors = ended(process)
    assert code == 143
    assert "stopped; the same command goes on from here" in errors
    assert "Traceback" not in errors
    # One that was born as the signal came ends by itself, when it has started and finds nobody.
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.1)
