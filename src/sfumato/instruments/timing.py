"""How long a piece of work takes, measured before the whole of it is begun, at a small share of the time that is allowed."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from sfumato.instruments.batching import Pairs

PIECE, GROWTH = 4, 8
"""Samples that are timed first, and how many times more where that was quick: a call has a cost of its own."""
SHARE, LONGEST = 0.05, 3.0
"""Of the allowed time, what one timing may take; seconds, where no time was given."""


def seconds_a_sample(
    work: Callable[[Pairs], object], batch: tuple[Tensor, Tensor], limit: float | None, device: torch.device, *, cut: bool = True
) -> float:
    """Seconds for each sample of a batch: of a few samples, then of more, up to the whole batch where that is quick.

    Args:
        work: on pairs (inputs, targets); whole or in part.
        batch: the largest one that will be worked on.
        limit: seconds that everything may take; None: any.
        device: to be waited for.
        cut: whether a batch can be cut (that of a method's own loss cannot).
    """
    patience = LONGEST if limit is None else SHARE * limit
    whole = len(batch[0])
    size = min(PIECE, whole) if cut else whole
    work([(batch[0][:1], batch[1][:1]) if cut else batch])  # sets things up, which can take longer than the work itself
    while True:
        part = (batch[0][:size], batch[1][:size])
        found = seconds_of(lambda part=part: work([part]), device, patience) / size  # type: ignore[misc]
        larger = min(whole, GROWTH * size)
        if size == whole or 2 * found * larger > patience:
            return found
        size = larger


def samples_that_fit(count: int, seconds: float, times: int, limit: float | None, fewest: int) -> int:
    """How many samples of `seconds` each can be read `times` times within the limit: `count` at most, and not below `fewest`.

    >>> samples_that_fit(512, 0.01, 40, 60, 16), samples_that_fit(512, 1, 40, 60, 16), samples_that_fit(512, 1, 40, None, 16)
    (150, 16, 512)
    """
    return count if limit is None else min(count, max(fewest, int(limit / (times * seconds))))


def told_cut(count: int, of: int) -> tuple[str, ...]:
    """The note that only `count` samples `of` so many are looked at; empty where all are."""
    return (f"only {count} samples were taken, to fit the time: more minutes take more",) if count < of else ()


def seconds_of(work: Callable[[], object], device: torch.device, patience: float = LONGEST) -> float:
    """Seconds of `work`: the faster of two runs, or of one that took longer than `patience`."""
    found: list[float] = []
    while len(found) < 2 and sum(found) <= patience:
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - started)
    return max(min(found), 1e-6)
