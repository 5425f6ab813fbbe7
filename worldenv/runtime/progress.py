"""Progress that a person watches: rich bars on a terminal, an occasional plain line in a log file.

Bars may nest: an inner one joins the display of the outer one and leaves it when done.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

T = TypeVar("T")
PLAIN_INTERVAL = 15.0  # seconds between two plain lines

_display: Progress | None = None  # the bars on screen now, which a nested bar joins


class Bar:
    """What `bar` yields: counts completed units and shows a few numbers beside them."""

    def __init__(self, total: int, description: str) -> None:
        self.total = total
        self.description = description
        self.completed = 0
        self._fields = ""
        self._turn = threading.Lock()

    def advance(self, amount: int = 1, **numbers: float) -> None:
        """Count `amount` more units, from any thread; `numbers`, if any, replace those shown."""
        with self._turn:
            self.update(self.completed + amount, **numbers)

    def update(self, completed: int, **numbers: float) -> None:
        """Set the count, as a resumed stage does; `numbers`, if any, replace those shown."""
        self.completed = completed
        if numbers:
            self._fields = "  ".join(f"{name} {value:.4g}" for name, value in numbers.items())
        self._show()

    def _show(self) -> None:
        raise NotImplementedError

    def _finish(self) -> None:
        raise NotImplementedError


class _RichBar(Bar):
    def __init__(self, total: int, description: str, display: Progress, nested: bool) -> None:
        super().__init__(total, description)
        self._display = display
        self._nested = nested
        self._task: TaskID = display.add_task(description, total=total, fields="")

    def _show(self) -> None:
        self._display.update(self._task, completed=self.completed, fields=self._fields)

    def _finish(self) -> None:
        self._display.stop_task(self._task)
        if self._nested:
            self._display.remove_task(self._task)


class _PlainBar(Bar):
    def __init__(self, total: int, description: str) -> None:
        super().__init__(total, description)
        self._start = self._printed = time.monotonic()
        self._first: int | None = None

    def _show(self) -> None:
        if self._first is None:
            self._first = self.completed
        if time.monotonic() - self._printed >= PLAIN_INTERVAL:
            self._print()

    def _finish(self) -> None:
        self._print()

    def _print(self) -> None:
        self._printed = time.monotonic()
        spent = self._printed - self._start
        parts = [f"{self.description}: {self.completed}/{self.total}", f"{spent:.0f} s"]
        done = self.completed - (self._first or 0)
        if done > 0 and self.completed < self.total:
            left = spent / done * (self.total - self.completed)
            parts.append(f"about {left:.0f} s left")
        print("  ".join([*parts, self._fields]).rstrip(), file=sys.stderr, flush=True)


@contextmanager
def bar(total: int, description: str) -> Iterator[Bar]:
    """A progress bar over `total` units, on stderr; a nested one leaves the screen when done."""
    global _display
    if _display is not None:
        shown: Bar = _RichBar(total, description, _display, nested=True)
        try:
            yield shown
        finally:
            shown._finish()
        return
    console = Console(stderr=True)
    if not console.is_terminal:
        shown = _PlainBar(total, description)
        try:
            yield shown
        finally:
            shown._finish()
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[fields]}", style="dim"),
    )
    with Progress(*columns, console=console) as _display:
        shown = _RichBar(total, description, _display, nested=False)
        try:
            yield shown
        finally:
            shown._finish()
            _display = None


def track(items: Iterable[T] | int, description: str, total: int | None = None) -> Iterator:
    """Iterate over `items` (or `range(items)`) behind a bar.

    total: needed only where `items` has no length.
    """
    sequence = range(items) if isinstance(items, int) else items
    if total is None:
        if not isinstance(sequence, Sized):
            raise ValueError("`items` has no length: pass `total`")
        total = len(sequence)
    with bar(total, description) as shown:
        for item in sequence:
            yield item
            shown.advance()
