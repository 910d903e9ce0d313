"""Does a sampler know what it is drawing? The variance of its guess of the clean picture over the last steps.

    Hal(x) = mean over coordinates of Var_{i in W} [x̂_0^(i)],      W a window of sampling steps

Samples that belong to no mode of the data keep changing; those with the largest variance are dropped.

Source: Aithal, Maini, Lipton, Kolter, "Understanding Hallucinations in Diffusion Models through Mode Interpolation", NeurIPS
2024, section 5.

>>> import torch
>>> from sfumato.diffusion import Schedule, X0Variance, beta_schedule, filter_by_variance, sample_ddim
>>> schedule, steady = Schedule(beta_schedule("linear")), X0Variance((15, 20))
>>> x = sample_ddim(lambda x, t: 0 * x + 1, torch.randn(8, 2), schedule, steps=20, predict="x0", callback=steady)
>>> steady.variance.max()  # a guess that never changes
tensor(0.)
>>> filter_by_variance(x, steady.variance, keep=0.5).shape
torch.Size([4, 2])
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from sfumato.diffusion.samplers import Callback, SamplerStep
from sfumato.errors import BadData, BadSetting


class X0Variance:
    """A callback of the samplers that keeps a running variance of x̂_0, in the memory of two pictures a sample.

    It begins anew at the first step of the window, so one serves batch after batch.

    Args:
        window: first step and the one after the last, counted from 0 in the order of sampling: `(990, 1000)` for the last ten
            of 1000.

    Raises:
        BadSetting: an empty window.
    """

    def __init__(self, window: tuple[int, int]) -> None:
        low, high = window
        if not 0 <= low < high:
            raise BadSetting(f"window={window} holds no step: use 0 <= first < end")
        self.window, self.count = (low, high), 0
        self._mean = self._squares = torch.zeros(())

    @torch.no_grad()
    def __call__(self, step: SamplerStep) -> None:
        """See one step."""
        low, high = self.window
        if not low <= step.step < high:
            return
        if step.step == low:
            self.count, self._mean, self._squares = 0, torch.zeros_like(step.x0), torch.zeros_like(step.x0)
        self.count += 1
        change = step.x0 - self._mean  # Welford's update: no difference of large sums
        self._mean = self._mean + change / self.count
        self._squares = self._squares + change * (step.x0 - self._mean)

    @property
    def variance(self) -> Tensor:
        """`[B]`: population variance over the steps seen, mean over the coordinates.

        Raises:
            BadData: the sampler took no step in the window.
        """
        if not self.count:
            raise BadData(f"no step fell into the window {self.window}: it must lie within the sampler's steps")
        return (self._squares / self.count).flatten(1).mean(1)


def filter_by_variance(samples: Tensor, var: Tensor, *, keep: float = 0.96) -> Tensor:
    """Drop the samples whose trajectories varied most.

    Args:
        samples: `[B, ...]`; `torch.arange(B)` gives the numbers of those kept.
        var: `[B]`, as from `X0Variance`.
        keep: share to keep, above 0 to 1; rounded up to whole samples.

    Returns:
        The `ceil(keep * B)` steadiest ones, in their order.

    Raises:
        BadSetting: a share outside (0, 1].
        BadData: another number of variances than of samples.
    """
    if not 0 < keep <= 1:
        raise BadSetting(f"keep={keep} is not a share above 0 up to 1")
    if var.shape != samples.shape[:1]:
        raise BadData(f"{len(samples)} samples need a variance each, not {list(var.shape)}")
    count = math.ceil(round(keep * len(samples), 6))  # 0.07 * 100 is 7, not 7.000000000000001
    return samples[var.argsort(stable=True)[:count].sort().values]


class DrawWithCallback(Protocol):
    """Draws `[n, ...]` samples; `callback` sees every step."""

    def __call__(self, n: int, generator: torch.Generator | None = None, *, callback: Callback | None = None) -> Tensor:
        """Draw them."""
        ...


class Filtered(NamedTuple):
    """Samples that were kept, `[n, ...]`, their variances `[n]`, and how the ones that were dropped looked: `[m, ...]`, `[m]`."""

    samples: Tensor
    variance: Tensor
    dropped: Tensor
    dropped_variance: Tensor


def sample_filtered(
    draw: DrawWithCallback,
    n: int,
    *,
    window: tuple[int, int],
    keep: float = 0.96,
    batch: int = 256,
    generator: torch.Generator | None = None,
) -> Filtered:
    """Draw more samples than are wanted, and keep the steadiest.

    Args:
        draw: the sampler, such as a method's `sample`.
        n: samples to keep, 1 or more.
        window: steps over which the variance is taken, as in `X0Variance`.
        keep: share of the drawn samples that is kept, above 0 to 1: `ceil(n / keep)` are drawn.
        batch: samples that are drawn at once.
        generator: source of the draws.

    Raises:
        BadSetting: no samples, or a share outside (0, 1].
        BadData: the sampler takes no step in the window.
    """
    if n < 1 or not 0 < keep <= 1:
        raise BadSetting(f"n={n}, keep={keep}: keep one sample or more, and a share above 0 up to 1")
    total, steady = math.ceil(round(n / keep, 6)), X0Variance(window)
    samples, variances = [], []
    for first in range(0, total, batch):
        samples.append(draw(min(batch, total - first), generator, callback=steady))
        variances.append(steady.variance)
    x, var = torch.cat(samples), torch.cat(variances)
    kept = filter_by_variance(torch.arange(total, device=x.device), var, keep=n / total)
    rest = torch.ones(total, dtype=torch.bool, device=x.device)
    rest[kept] = False
    return Filtered(x[kept], var[kept], x[rest], var[rest])


def last_steps(steps: int, share: float = 0.02, *, least: int = 2) -> tuple[int, int]:
    """The window of the last steps of a sampler: a share of all, but at least two, of which there is a variance.

    >>> last_steps(1000, 0.01), last_steps(250), last_steps(50)
    ((990, 1000), (245, 250), (48, 50))

    Raises:
        BadSetting: a sampler of one step.
    """
    if steps < 2:
        raise BadSetting("a trajectory of one step has no variance: sample in more steps")
    return max(0, steps - max(least, round(share * steps))), steps


def default_window(steps: int, *, points: bool) -> tuple[int, int]:
    """Where to look as long as nobody has chosen: for points the last 2 % of the steps, for pictures those from half to 70 % on.

    In two small trainings of simple shapes (`examples/window_for_pictures.py`) an early window and the last steps each told next
    to nothing once, the middle a little every time (AUC 0.60 to 0.73). Choose for your own by `scan_windows`.

    >>> default_window(250, points=True), default_window(50, points=False), default_window(3, points=False)
    ((245, 250), (25, 35), (1, 3))

    Raises:
        BadSetting: a sampler of one step.
    """
    last = last_steps(steps)
    if points:
        return last
    low = min(round(0.5 * steps), last[0])
    return low, max(low + 2, round(0.7 * steps))


def parse_window(text: str, steps: int) -> tuple[int, int]:
    """`FIRST:END` in steps counted from 0, within those of a sampler; either may be left out.

    >>> parse_window("15:30", 50), parse_window("40:", 50)
    ((15, 30), (40, 50))

    Raises:
        BadSetting: no such window, or one of fewer than two steps.
    """
    first, colon, end = text.partition(":")
    try:
        low, high = int(first or 0), int(end or steps)
    except ValueError:
        low = high = -1
    if not colon or not 0 <= low < high - 1 or high > steps:
        raise BadSetting(f"window {text!r} is not FIRST:END with two or more of the {steps} steps, such as {steps // 2}:{steps}")
    return low, high
