"""How long a piece of work takes, measured before the whole of it is begun, at a small share of the time that is allowed."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

PIECE = 4
"""Samples that are timed first."""
SHARE, LONGEST = 0.05, 3.0
"""Of the allowed time, what one timing may take; seconds, where no time was given."""

Pairs = list[tuple[Tensor, Tensor]]


def seconds_a_sample(
    work: Callable[[Pairs], object], batch: tuple[Tensor, Tensor], limit: float | None, device: torch.device, *, cut: bool = True
) -> float:
    """Seconds for each sample of a batch: of a few samples, and where that is quick of the whole batch.

    Args:
        work: on pairs (inputs, targets); whole or in part.
        batch: the largest one that will be worked on.
        limit: seconds that everything may take; None: any.
        device: to be waited for.
        cut: whether a batch can be cut (that of a method's own loss cannot).
    """
    patience = LONGEST if limit is None else SHARE * limit
    piece = PIECE if cut else len(batch[0])
    few = (batch[0][:piece], batch[1][:piece])
    found = seconds_of(lambda: work([few]), device, patience) / len(few[0])
    if 2 * found * len(batch[0]) < patience and len(batch[0]) > piece:
        found = seconds_of(lambda: work([batch]), device, patience) / len(batch[0])
    return found


def samples_that_fit(count: int, seconds: float, times: int, limit: float | None, fewest: int) -> int:
    """How many samples of `seconds` each can be read `times` times within the limit: `count` at most, and not below `fewest`.

    >>> samples_that_fit(512, 0.01, 40, 60, 16), samples_that_fit(512, 1, 40, 60, 16), samples_that_fit(512, 1, 40, None, 16)
    (150, 16, 512)
    """
    return count if limit is None else min(count, max(fewest, int(limit / (times * seconds))))


def seconds_of(work: Callable[[], object], device: torch.device, patience: float = LONGEST) -> float:
    """Seconds of `work`: of a second run, since the first one sets things up, unless the first took longer than `patience`."""
    found: list[float] = []
    while len(found) < 2 and sum(found) <= patience:
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - started)
    return max(min(found), 1e-6)
