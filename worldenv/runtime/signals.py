"""Signals that ask a program to stop: Ctrl-C, SIGTERM (a cluster's way) and SIGHUP (a terminal's).

All three mean the same: the first raises `Stopped`, a KeyboardInterrupt, so that whatever is under
way saves what it has and ends its workers; another one ends the process at once. Between
`end_at_once`, which needs nothing but the standard library, and `raised` there is nothing to save:
a signal ends the process with one line, for an exception out of a half-imported module would only
show as a traceback. A signal that the parent had ignored (nohup, a shell's background job) stays
ignored.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
Handler = Callable[[int, FrameType | None], None] | signal.Handlers


class Stopped(KeyboardInterrupt):
    """Ctrl-C or a signal that means the same. number: of the signal."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def exit_status(stop: KeyboardInterrupt) -> int:
    """What a shell expects of a program that a signal ended: 128 and its number."""
    return 128 + (stop.number if isinstance(stop, Stopped) else signal.SIGINT)


def end_at_once() -> None:
    """From here on a signal to stop ends the process with one line."""
    _handle(_end)


@contextmanager
def raised() -> Iterator[None]:
    """Within, the first signal to stop raises `Stopped`, another one ends the process."""
    before = _handle(_raise)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def ignored() -> Iterator[None]:
    """Within, signals to stop do nothing: what is done takes seconds, and then the process ends."""
    before = _handle(signal.SIG_IGN)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def between_steps() -> Iterator[list[int]]:
    """A signal to stop lets the step in progress finish, so that what is saved is whole: its number
    is in the list this yields, and the loop raises `Stopped` of it. Another one is raised at once.

    Handlers that someone else has set are left alone, and so is a thread, which gets no signals.
    """
    asked: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if asked:
            raise Stopped(number)
        asked.append(number)

    before = _handle(note, only=(_raise, signal.default_int_handler, signal.SIG_DFL))
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, _end if asked and handler is _raise else handler)


def _handle(handler: Handler, only: tuple | None = None) -> dict[int, object]:
    """Set a handler for every signal to stop that is not ignored; returns the former ones."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    before = {number: signal.getsignal(number) for number in STOPPING}
    before = {n: h for n, h in before.items() if h not in (signal.SIG_IGN, None)}
    before = {n: h for n, h in before.items() if only is None or h in only}
    for number in before:
        signal.signal(number, handler)
    return before


def _raise(number: int, frame: FrameType | None) -> None:
    _handle(_end)
    raise Stopped(number)


def _end(number: int, frame: FrameType | None) -> None:
    os.write(2, b"\nstopped\n")
    os._exit(128 + number)
