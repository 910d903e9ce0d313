"""How long a piece of work takes, measured before the whole of it is begun."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of `work`, run twice: the first time, which sets things up, counts only where it was the faster one."""
    found = []
    for _ in range(2):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - started)
    return max(min(found), 1e-6)
