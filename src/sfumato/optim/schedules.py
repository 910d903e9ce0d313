"""Numbers that change with training. All are functions of `progress`, the share of the steps that is done, in [0, 1].

    cosine_warmup:  p / w  for p < w,  then  floor + (1 - floor) · ½ (1 + cos π (p - w) / (1 - w))

No part counts steps or epochs: a method says `ctx.scale_lr(cosine_warmup(ctx.progress, warmup=0.05))`.

Sources: warm-up and cosine: Loshchilov and Hutter 2017, as in He et al. 2021; log-cosine: Jacobellis et al. 2025 (WaLLoC);
sigmoid: Ganin et al. 2016 (DANN).

>>> from sfumato.optim import cosine_warmup, linear_ramp
>>> [round(cosine_warmup(p / 10, warmup=0.2), 3) for p in range(11)]
[0.0, 0.5, 1.0, 0.962, 0.854, 0.691, 0.5, 0.309, 0.146, 0.038, 0.0]
>>> linear_ramp(0.25, end=0.5, high=2.0)
1.0
"""

from __future__ import annotations

import math


def linear_ramp(progress: float, *, start: float = 0.0, end: float = 1.0, low: float = 0.0, high: float = 1.0) -> float:
    """From `low` to `high` on a straight line between two points of the training, constant outside.

    Args:
        progress: share of the training that is done, 0 to 1.
        start: where it leaves `low`.
        end: where it reaches `high`; equal to `start`: a jump.
        low: value before; may be above `high`.
        high: value after.

    Returns:
        A number between `low` and `high`.
    """
    if progress >= end:
        return high
    if progress <= start:
        return low
    return low + (high - low) * (progress - start) / (end - start)


def cosine_warmup(progress: float, *, warmup: float = 0.05, floor: float = 0.0) -> float:
    """A factor for the learning rate: a straight rise from 0 to 1, then half a cosine down to `floor`.

    Args:
        progress: share of the training that is done, 0 to 1.
        warmup: share of the training that rises, 0 to 1.
        floor: factor at the end, 0 to 1.

    Returns:
        A factor from 0 to 1.

    Reference:
        He et al. 2021, official `lr_sched`.
    """
    if progress < warmup:
        return progress / warmup
    fall = min(1.0, (progress - warmup) / (1 - warmup)) if warmup < 1 else 0.0
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * fall))


def log_cosine_warmup(progress: float, *, warmup: float, low: float, high: float) -> float:
    """A learning rate that rises over decades: its logarithm follows half a cosine from `low` to `high`, then stays.

    `log r = log low + ½ log(high / low) (1 - cos(π p / warmup))`.

    Args:
        progress: share of the training that is done, 0 to 1.
        warmup: share of the training that rises.
        low: first rate, positive.
        high: last rate, positive.

    Returns:
        A rate between `low` and `high`.
    """
    if progress >= warmup:
        return high
    return low * math.pow(high / low, 0.5 * (1 - math.cos(math.pi * progress / warmup)))


def sigmoid_ramp(progress: float, *, k: float = 5.0) -> float:
    """From 0 to nearly 1, fast at first: `2 / (1 + exp(-k p)) - 1`.

    Args:
        progress: share of the training that is done, 0 to 1.
        k: steepness; at the end the value is `tanh(k / 2)`.

    Returns:
        A number from 0 to 1.

    Reference:
        Ganin et al. 2016, section 5.2.2 (there k = 10).
    """
    return 2 / (1 + math.exp(-k * progress)) - 1
