"""How commands speak: results on standard output, remarks on standard error, both plain when piped."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any


def say(text: str) -> None:
    """A result, as it is."""
    print(text, flush=True)


def say_json(value: Any) -> None:
    """A result for a script."""
    print(json.dumps(value, indent=2, ensure_ascii=False), flush=True)


def hint(text: str) -> None:
    """A remark that is no result."""
    style = ("\033[2m", "\033[0m") if sys.stderr.isatty() else ("", "")
    print(f"{style[0]}{text}{style[1]}", file=sys.stderr, flush=True)


def tell_data(images: Any) -> Any:
    """Say once what was skipped or converted in a data set; returns it."""
    for note in images.notes:
        hint(note)
    if images.skipped:
        path, reason = images.skipped[0]
        more = f" and {len(images.skipped) - 1} more" if len(images.skipped) > 1 else ""
        hint(f"skipped {path} ({reason}){more}")
    return images


def progress(items: list[Any], title: str) -> Iterable[Any]:
    """The items, with a bar on a terminal."""
    if not sys.stderr.isatty() or len(items) < 2:
        return items
    from rich.console import Console
    from rich.progress import track

    return track(items, description=title, console=Console(stderr=True), transient=True)


@contextmanager
def bar(title: str, total: float) -> Iterator[Callable[[float], None]]:
    """A bar on a terminal, and what moves it by some of the total."""
    if not sys.stderr.isatty():
        yield lambda amount: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task(title, total=total)
        yield lambda amount: shown.advance(task, amount)
