"""A run over the checkpoints that it kept: which there are, which of them to look at, and the subject as each of them had it.

>>> from sfumato.instruments.followed import coarse_to_fine, spread_evenly
>>> spread_evenly(list("abcdefg"), 3), spread_evenly(list("abc"), 5), spread_evenly([], 2)
(['a', 'd', 'g'], ['a', 'b', 'c'], [])
>>> "".join(coarse_to_fine("abcdefg"))
'adgbcef'
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from sfumato.engine import checkpoint
from sfumato.engine.loading import load
from sfumato.engine.run_folder import Run
from sfumato.instruments.subject import ClassifierLike, Subject

T = TypeVar("T")

MORE = "a run that keeps more checkpoints is followed over them: sfumato train ... --save-every STEPS --keep NUMBER"
"""A note for who has none to follow."""


def earlier_checkpoints(subject: Subject) -> list[Path]:
    """The checkpoints that a run kept, but for the last one, oldest first; none where the subject is no run."""
    run = _run(subject)
    return [] if run is None else checkpoint.listing(run.checkpoints)[:-1]


def last_step(subject: Subject) -> int | None:
    """The step of the last checkpoint, which is the subject itself; None where the subject is no run."""
    run = _run(subject)
    last = None if run is None else run.last_checkpoint
    return None if last is None else step_of(last)


def step_of(path: Path) -> int:
    """The step at which a checkpoint was written."""
    return int(checkpoint.peek(path)["step"])


def subject_at(subject: Subject, path: Path) -> Subject:
    """The same on the same samples, with the weights of a checkpoint."""
    method = load(path, device=str(subject.device))
    assert isinstance(method, ClassifierLike)  # the subject's own class: the checkpoint is of the same run
    return replace(subject, module=method.network)


def spread_evenly(items: Sequence[T], count: int) -> list[T]:
    """So many of them at equal distances, the first always and the last where there are two; all where there are no more."""
    if count >= len(items):
        return list(items)
    if count <= 1:
        return list(items[:count])
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def coarse_to_fine(items: Sequence[T]) -> list[T]:
    """All of them, the first one first and then ever closer to each other, so that some of them already show the whole."""
    order: dict[int, None] = {}
    step = max(1, len(items) // 2)
    while len(order) < len(items):
        order |= dict.fromkeys(range(0, len(items), step))
        step = max(1, step // 2)
    return [items[i] for i in order]


def _run(subject: Subject) -> Run | None:
    if "run" not in subject.facts or not (Path(subject.facts["run"]) / "config.yaml").is_file():
        return None
    return Run.open(subject.facts["run"])
