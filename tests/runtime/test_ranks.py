"""Several processes are one run: the same bits, one writer, and a lost one is named."""

import os
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
from ranked import Group

from worldenv.runtime import parallel, ranks, watch
from worldenv.runtime.errors import UserError
from worldenv.runtime.seeds import generator


def trained(folder: Path | None = None) -> dict:
    """Three steps of a network, with a parameter that only one piece needs and one that none does;
    and pieces that are shared."""
    torch.manual_seed(0)
    first, second = torch.nn.Linear(700, 500), torch.nn.Linear(500, 3)
    spare, never = (torch.nn.Parameter(torch.ones(5)) for _ in range(2))
    parameters = [*first.parameters(), *second.parameters(), spare, never]
    optimizer = torch.optim.AdamW(parameters, 1e-2, fused=True)
    logged = []

    def loss(step: int, piece: int):
        x = torch.randn(8, 700, generator=generator("x", step, piece))
        value = second(first(x).tanh()).square().mean()
        if piece == 1:
            value = value + spare.square().sum()
        return value, {"piece": piece}

    for step in range(3):
        pieces = [lambda k=k, step=step: loss(step, k) for k in range(4)]
        value, rest, norm = parallel.gradients(parameters, pieces, max_norm=0.5)
        assert never.grad is None
        optimizer.step()
        logged.append((float(value), float(norm), [r["piece"] for r in rest]))
    values = parallel.shared([lambda k=k: torch.full((2,), float(k)) for k in range(7)])
    return {"parameters": [p.detach() for p in parameters], "logged": logged, "values": values}


@pytest.mark.parametrize("count", [2, 3])
def test_gradients_and_pieces_are_bit_for_bit_those_of_one_process(count, tmp_path):
    expected = trained()
    for own in Group(trained, tmp_path, count).found():
        for got, want in zip(own["parameters"], expected["parameters"], strict=True):
            assert torch.equal(got, want)
        assert own["logged"] == expected["logged"]
        assert torch.equal(torch.stack(own["values"]), torch.stack(expected["values"]))


def told(folder: Path) -> dict:
    """What ranks tell each other, and an error of the first."""
    once = ranks.together(lambda: (os.getpid(), ranks.count()))
    try:
        ranks.together(lambda: 1 / 0)
        error = None
    except ZeroDivisionError as raised:
        error = str(raised)
    mine = [*ranks.Claims(9)]
    large = torch.arange(60_000.0).reshape(3, -1).T * (1 + ranks.number())  # not contiguous
    many = [{"a": large, "b": (large[0] > 1, large[:0])}] * (1 + ranks.number())
    return {
        "gathered": ranks.gather({"rank": ranks.number(), "x": torch.ones(2) * ranks.number()}),
        "many": ranks.gather(many),
        "once": once,
        "error": error,
        "mine": mine,
        "merged": ranks.merge({k: k * k for k in mine}),
    }


def test_ranks_tell_each_other_and_one_acts_for_all(tmp_path):
    group = Group(told, tmp_path, 2)
    every = group.found()
    for own in every:
        assert [part["rank"] for part in own["gathered"]] == [0, 1]
        assert own["gathered"][1]["x"].tolist() == [1, 1]
        assert [len(part) for part in own["many"]] == [1, 2]
        for part in [*own["many"][0], *own["many"][1]]:
            assert (part["a"].shape, part["b"][1].shape) == ((20_000, 3), (0, 3))
            assert part["b"][0].dtype == torch.bool
        assert own["many"][1][1]["a"][7].tolist() == [14.0, 40_014.0, 80_014.0]
        assert own["once"] == (group.ranks[0].pid, 1)
        assert own["error"] == "division by zero"
        assert own["merged"] == [k * k for k in range(9)]
    assert sorted(every[0]["mine"] + every[1]["mine"]) == list(range(9))


def slow_first(folder: Path) -> dict:
    """Rank 0 takes its time over each piece; rank 1 does what it has not begun."""
    mine = []
    for piece in ranks.Claims(8):
        mine.append(piece)
        time.sleep(0.4 if ranks.lead() else 0.0)
    return {"mine": mine}


def test_who_is_done_early_takes_over_what_a_slow_rank_has_not_begun(tmp_path):
    slow, fast = Group(slow_first, tmp_path, 2).found()
    assert slow["mine"] == list(range(len(slow["mine"])))
    assert fast["mine"][:4] == [4, 5, 6, 7]
    assert len(fast["mine"]) >= 6


def lost(how: str, folder: Path) -> dict:
    """Rank 1 fails or stands still; what rank 0 says of it."""
    watch.BEAT, watch.SILENCE = 0.1, 2.0
    watching = watch.Watch(folder)
    print("about to", how)
    (folder / f"begun-{ranks.number()}").touch()
    try:
        if ranks.number() == 1 and how == "fail":
            raise RuntimeError("the disk is on fire")
        while how == "hang" or (ranks.number() == 1 and how == "die"):
            time.sleep(0.1)
        ranks.gather(0)
    except RuntimeError as error:
        if ranks.number() == 1:
            watching.say(error)
            os._exit(1)
        return {"blamed": str(watching.explain())}
    return {}


def failing(folder: Path) -> dict:
    return lost("fail", folder)


def dying(folder: Path) -> dict:
    return lost("die", folder)


def hanging(folder: Path) -> dict:
    return lost("hang", folder)


def test_a_rank_that_fails_is_named_with_its_last_words(tmp_path):
    blamed = Group(failing, tmp_path, 2).of(0)["blamed"]
    assert "rank 1 is gone: it ended with: RuntimeError: the disk is on fire" in blamed


def test_a_rank_that_is_killed_is_named_with_the_end_of_its_log(tmp_path):
    group = Group(dying, tmp_path, 2)
    group.wait_for_all()
    os.kill(group.ranks[1].pid, signal.SIGKILL)
    blamed = group.of(0)["blamed"]
    assert "rank 1 is gone: it was killed; the last it said" in blamed
    assert "about to die" in blamed


def test_a_rank_that_stands_still_is_given_up(tmp_path):
    """In seconds here, where it is half a minute else."""
    group = Group(hanging, tmp_path, 2)
    group.wait_for_all()
    os.kill(group.ranks[1].pid, signal.SIGSTOP)
    try:
        group.of(0, code=2)
    finally:
        group.ranks[1].kill()
    said = (tmp_path / "rank-0.log").read_text()
    assert "rank 1 is gone: no sign of life for 2 s; the last it said" in said
    assert watch.SILENCE >= 10 * watch.BEAT


def test_one_process_needs_no_others(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    ranks.join(torch.device("cpu"))
    assert (ranks.count(), ranks.number(), ranks.lead()) == (1, 0, True)
    assert ranks.gather(3) == [3]
    assert ranks.together(lambda: 4) == 4
    assert [*ranks.Claims(3)] == [0, 1, 2]
    assert ranks.share(5) == slice(0, 5)


@pytest.mark.parametrize(
    ("name", "value"),
    [("MASTER_ADDR", ""), ("MASTER_PORT", "none"), ("RANK", "first"), ("RANK", "2")],
)
def test_an_environment_that_torchrun_did_not_set_is_refused(name, value, monkeypatch):
    stated = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for key, given in (stated | {name: value}).items():
        monkeypatch.setenv(key, given)
    with pytest.raises(
        UserError, match=f"{name}: expected (what torchrun sets|one of 0..1, got 2)"
    ):
        ranks.join(torch.device("cpu"))


@pytest.mark.parametrize(
    ("own", "said"),
    [
        (
            "0",
            r"rank 2, 3 \(of node 1\): expected at 127.0.0.1:\d+ within 1 s, never came; .* 2 of 4",
        ),
        (
            "1",
            "rank 1 did not meet the other 3 at 127.0.0.1:1: .*MASTER_ADDR is the node of rank 0",
        ),
    ],
)
def test_ranks_that_do_not_come_are_named_in_time(own, said, monkeypatch):
    """One that leads, beside rank 1; and one that is sent where nobody is."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    stated = {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "RANK": own, "MASTER_ADDR": "127.0.0.1"}
    stated |= {"MASTER_PORT": str(port) if own == "0" else "1", "WORLDENV_JOIN_SECONDS": "1"}
    for key, given in stated.items():
        monkeypatch.setenv(key, given)
    if own == "0":
        agent = torch.distributed.TCPStore("127.0.0.1", port, None, True, wait_for_workers=False)
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
        torch.distributed.PrefixStore("worldenv/0", agent).add("here/1", 1)
    begun = time.monotonic()
    with pytest.raises(UserError, match=said):
        ranks.join(torch.device("cpu"))
    assert time.monotonic() - begun < 30
    monkeypatch.setenv("WORLDENV_JOIN_SECONDS", "soon")
    with pytest.raises(UserError, match="WORLDENV_JOIN_SECONDS: expected whole seconds"):
        ranks.join(torch.device("cpu"))
