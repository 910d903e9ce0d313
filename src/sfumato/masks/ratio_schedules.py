"""How much to hide at each moment of a training: from easy to hard, then constant.

    cosine:     r(p) = low + (high - low) (1 - c(p) / c(0)),    c(p) = cos²( (p / knee + s) / (1 + s) · π / 2 ),  s = 0.008
    piecewise:  low to mid over [0, knee / 4], mid until knee / 2, mid to high at knee
    linear:     low to high over [0, knee]

and `high` from `knee` on. A ratio is one number for the whole batch, so that all samples hide equally many tokens.

Source: "LMD: Faster Image Reconstruction with Latent Masking Diffusion", AAAI 2024, arXiv 2312.07971. The cosine is the one of
Nichol and Dhariwal 2021. The released piecewise schedule jumps at knee / 2 and overshoots; this one is continuous. The linear
one is the plain reading of the paper's third schedule, whose form is not published.

>>> from sfumato.masks import ratio_schedule
>>> [round(ratio_schedule(p / 6), 3) for p in range(7)]
[0.15, 0.242, 0.454, 0.663, 0.75, 0.75, 0.75]
>>> [round(ratio_schedule(p / 6, "piecewise"), 3) for p in range(7)]
[0.15, 0.4, 0.4, 0.575, 0.75, 0.75, 0.75]
"""

from __future__ import annotations

import math
from collections.abc import Callable

from sfumato.errors import BadSetting

_OFFSET = 0.008  # keeps the first steps of the cosine from standing still


def ratio_schedule(
    progress: float,
    kind: str = "cosine",
    *,
    low: float = 0.15,
    high: float = 0.75,
    knee: float = 2 / 3,
    mid: float = 0.4,
) -> float:
    """The share of tokens that is hidden when a share of the training is done.

    Args:
        progress: share of the training that is done, 0 to 1.
        kind: "cosine", "piecewise" or "linear".
        low: ratio at the start.
        high: ratio from `knee` on; equal to `low`: constant.
        knee: share of the training after which the ratio stays, 0 to 1; 0: it is `high` at once.
        mid: ratio of the plateau of "piecewise".

    Returns:
        A number from `low` to `high`, exactly `low` at 0 and exactly `high` from `knee` on.

    Raises:
        BadSetting: an unknown kind.
    """
    if kind not in _RISES:
        raise BadSetting(f"ratio schedule {kind!r} is not known: {', '.join(_RISES)}")
    if progress >= knee:
        return high
    if progress <= 0:
        return low
    return _RISES[kind](progress / knee, low, high, mid)


def _cosine(u: float, low: float, high: float, _mid: float) -> float:
    def c(u: float) -> float:
        return math.cos((u + _OFFSET) / (1 + _OFFSET) * math.pi / 2) ** 2

    return low + (high - low) * (1 - c(u) / c(0.0))


def _piecewise(u: float, low: float, high: float, mid: float) -> float:
    if u < 0.5:
        return low + (mid - low) * min(1.0, 4 * u)
    return mid + (high - mid) * (2 * u - 1)


def _linear(u: float, low: float, high: float, _mid: float) -> float:
    return low + (high - low) * u


_RISES: dict[str, Callable[[float, float, float, float], float]] = {"cosine": _cosine, "piecewise": _piecewise, "linear": _linear}
"""How the ratio rises over u = progress / knee, from 0 to 1."""
