"""The progress of a probe, counted in batches that were read: a bar with the time left, and a place to stop at.

>>> from sfumato.instruments import Progress
>>> with Progress("probe", total=2, show=False) as bar, bar.until_stopped():
...     for x, y in bar.over([(1, 2), (3, 4)]):
...         print(x, y)
1 2
3 4
>>> bar.done, bar.stopped
(2, False)
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from sfumato.engine.signals import stop_signals

OVERRUN = 1.2
"""Share of the allowed time that a further piece may reach."""


class Stop(Exception):
    """Ctrl-C or SIGTERM arrived; carried to the nearest `Progress.until_stopped`."""


class Progress:
    """Counts batches. Within `with`, Ctrl-C and SIGTERM stop at the next batch; a second Ctrl-C stops at once.

    Args:
        title: what is measured.
        total: batches in all.
        show: draw a bar, where standard error is a terminal.
    """

    def __init__(self, title: str, total: int, *, show: bool = True) -> None:
        self.title, self.total, self.show = title, total, show and sys.stderr.isatty()
        self.done, self.stopped, self.started = 0, False, time.monotonic()
        self._bar: Any = None
        self._asked: list[int] = []
        self._open = ExitStack()

    def __enter__(self) -> Progress:
        self._asked = self._open.enter_context(stop_signals())
        self.started = time.monotonic()
        if self.show:
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = ("[bold]{task.description}", BarColumn(24), "{task.fields[stage]}", TimeElapsedColumn(), TextColumn("left"))
            bar = Bar(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
            self._bar = self._open.enter_context(bar)
            self._task = bar.add_task(self.title, total=self.total, stage="")
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self.started

    def late(self, done: int, limit: float | None) -> bool:
        """Whether one more piece, as long as the `done` ones were, would go far beyond the limit in seconds."""
        return limit is not None and done > 0 and self.seconds * (done + 1) / done > OVERRUN * limit

    def stage(self, text: str) -> None:
        """Say what is going on now."""
        if self._bar is not None:
            self._bar.update(self._task, stage=text)

    def over(self, batches: Any) -> Batches:
        """The same batches, every one of them counted whenever it is read."""
        return Batches(batches, self)

    def advance(self) -> None:
        """One batch was read."""
        if self._asked:
            raise Stop
        self.done += 1
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done)

    @contextmanager
    def until_stopped(self) -> Iterator[None]:
        """Leave the block early when asked to stop; what it has gathered by then stays."""
        try:
            yield
        except Stop:
            self.stopped = True


class Batches:
    """An iterable over batches that may be read again and again."""

    def __init__(self, batches: Any, progress: Progress) -> None:
        self._batches, self._progress = batches, progress

    def __iter__(self) -> Iterator[Any]:
        for batch in self._batches:
            self._progress.advance()
            yield batch
