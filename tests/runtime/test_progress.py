"""Plain lines in a log, bars on a terminal, nesting in both."""

import io

import pytest
from rich.console import Console

from worldenv.runtime import progress


def test_plain_lines_are_few_and_end_with_the_total(capsys: pytest.CaptureFixture[str]):
    assert list(progress.track(range(1000), "frames")) == list(range(1000))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("frames: 1000/1000")


def test_plain_lines_come_at_intervals_with_numbers(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    clock = iter(range(0, 1000, 6))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    with progress.bar(10, "sft") as bar:
        bar.update(2)  # resumed
        for _ in range(8):
            bar.advance(1, loss=0.25)
    lines = capsys.readouterr().err.splitlines()
    assert 2 <= len(lines) <= 5
    assert "left" in lines[0]
    assert "loss 0.25" in lines[0]
    assert lines[-1].startswith("sft: 10/10")


def test_track_wants_a_length(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(ValueError, match="total"):
        next(progress.track(iter([1]), "x"))
    assert list(progress.track(iter([1, 2]), "x", total=2)) == [1, 2]
    assert list(progress.track(3, "x")) == [0, 1, 2]


def test_bars_nest_on_a_terminal(monkeypatch: pytest.MonkeyPatch):
    screen = io.StringIO()

    def console(stderr: bool) -> Console:
        return Console(file=screen, force_terminal=True, width=100)

    monkeypatch.setattr(progress, "Console", console)
    with progress.bar(2, "outer") as outer:
        for _ in range(2):
            for _ in progress.track(3, "inner"):
                pass
            outer.advance(1, loss=0.5)
    assert progress._display is None
    text = screen.getvalue()
    assert "outer" in text
    assert "2/2" in text
    assert "loss 0.5" in text
    with pytest.raises(KeyError), progress.bar(2, "again"):
        raise KeyError
    assert progress._display is None


def test_an_error_still_says_how_far_it_came(capsys: pytest.CaptureFixture[str]):
    def interrupted() -> None:
        with progress.bar(5, "collect") as bar:
            bar.advance(2)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert "collect: 2/5" in capsys.readouterr().err
