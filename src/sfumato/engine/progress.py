"""The progress bar of a training: loss, rate, time left. Nothing is shown when standard error is no terminal."""

from __future__ import annotations

import sys
import time
from typing import Any

from sfumato.method import Context, Result


class Progress:
    """A rich progress bar that follows a `Context`; redraws a few times a second, so it costs nothing per step."""

    def __init__(self, show: bool, title: str, ctx: Context, every: float = 0.2) -> None:
        self.show, self.title, self.ctx, self.every = show and sys.stderr.isatty(), title, ctx, every
        self.bar: Any = None
        self.drawn = 0.0

    def __enter__(self) -> Progress:
        if self.show:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = ("[bold]{task.description}", BarColumn(), MofNCompleteColumn(), "loss [cyan]{task.fields[loss]}")
            rate = (TextColumn("{task.fields[rate]}"), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
            self.bar = Bar(*columns, *rate, console=Console(stderr=True))
            self.task = self.bar.add_task(self.title, total=self.ctx.total, completed=self.ctx.step, loss="-", rate="")
            self.first, self.began = self.ctx.step, time.monotonic()
            self.bar.start()
        return self

    def update(self, result: Result) -> None:
        """Redraw when it is time; reading the loss waits for the GPU, so not every step."""
        now = time.monotonic()
        if self.bar is not None and (now - self.drawn > self.every or self.ctx.step == self.ctx.total):
            self.drawn = now
            rate = f"{(self.ctx.step - self.first) / max(1e-9, now - self.began):.1f} steps/s"
            self.bar.update(self.task, completed=self.ctx.step, loss=f"{float(result.loss):.4g}", rate=rate)

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()
